// A small persistent thread pool. Results never depend on the number of threads: callers split
// work so that every output element is computed by one thread, in one order.
#pragma once
#include <cstddef>

namespace shadowc {

struct Pool;

// The threads that run one task together.
struct Team {
  int rank;
  int size;
  Pool* pool;
  void barrier() const;  // all ranks of the team must call it equally often
};

using Task = void (*)(void* argument, const Team& team);

// Runs task on up to `threads` threads, the caller being rank 0, and returns when all are done.
// When another thread is using the pool the task runs on the caller alone.
void run(int threads, Task task, void* argument);

// Threads of another runtime that a call came from. They may run the ranks of a team one after the
// other, so these must not wait for one another.
struct Host {
  virtual void run(int ranks, void (*rank)(void* job, size_t rank), void* job) const = 0;
};

// While it lives, what this thread runs goes to the host instead of the pool.
struct Lent {
  explicit Lent(const Host& host);
  ~Lent();
};
bool is_lent();

// A 64-byte aligned buffer of the calling thread, kept until the thread asks for a bigger one in
// the same slot. Contents are undefined.
void* scratch(int slot, size_t bytes);

}  // namespace shadowc
