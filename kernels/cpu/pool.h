// A small persistent thread pool. Results never depend on the number of threads: callers split
// work so that every output element is computed by one thread, in one order.
#pragma once
#include <cstddef>

namespace shadowc {

using Task = void (*)(void* argument);

// Runs task on up to `threads` threads at once, the caller among them, and returns when all that
// began are done. A task takes pieces of work until none is left: a thread that comes late, as the
// system gave its core to others, is not waited for. When another thread is using the pool the task
// runs on the caller alone.
void run(int threads, Task task, void* argument);

// Threads of another runtime that a call came from.
struct Host {
  virtual void run(int ranks, void (*rank)(void* job, size_t rank), void* job) const = 0;
};

// While it lives, what this thread runs goes to the host instead of the pool.
struct Lent {
  explicit Lent(const Host& host);
  ~Lent();
};

// How a compiler's code enters a parallel region of OpenMP (GOMP_parallel, in every such library).
using Parallel = void (*)(void (*rank)(void* job), void* job, unsigned ranks, unsigned flags);

// From now on OpenMP's threads are used in place of a pool: where it is used all along its threads
// stay awake on the cores that others would need.
void use_openmp(Parallel parallel);

// A 64-byte aligned buffer of the calling thread, kept until the thread asks for a bigger one in
// the same slot. Contents are undefined.
void* scratch(int slot, size_t bytes);

}  // namespace shadowc
