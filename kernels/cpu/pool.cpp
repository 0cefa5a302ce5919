#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

namespace shadowc {
namespace {

constexpr int kMostThreads = 255;
constexpr int kSpins = 500;  // 10 to 20 us: longer than the last piece of work of an undisturbed thread
// Longer than the interpreter spends between two ops of a decode step, so workers stay awake.
constexpr auto kYield = std::chrono::microseconds(200);

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `value` is no longer `old`: spins, then lets others run, then sleeps.
uint32_t wait_change(const std::atomic<uint32_t>& value, uint32_t old) {
  uint32_t now;
  const auto changed = [&] { return (now = value.load(std::memory_order_acquire)) != old; };
  for (int i = 0; i < kSpins; ++i, pause())
    if (changed()) return now;
  const auto end = std::chrono::steady_clock::now() + kYield;
  for (; std::chrono::steady_clock::now() < end; std::this_thread::yield())
    if (changed()) return now;
  for (; !changed(); value.wait(old, std::memory_order_acquire)) {
  }
  return now;
}

}  // namespace

struct Pool {
  std::mutex busy;
  // Number << 16 | most workers << 8 | those that joined, in one word: joining is one exchange of it,
  // which fails once the job is closed (no workers) or replaced. So a worker touches a job's other
  // fields only while the caller waits for it.
  std::atomic<uint32_t> job{0};
  std::atomic<uint32_t> done{0};
  std::atomic<bool> failed{false};  // no thread but the caller has somebody who catches
  Task task = nullptr;
  void* argument = nullptr;
  int workers = 0;

  void attempt() {
    try {
      task(argument);
    } catch (const std::bad_alloc&) {
      failed.store(true, std::memory_order_relaxed);
    }
  }

  void work() {
    uint32_t last = 0;  // number of the job that this worker did; numbers start at 1
    for (uint32_t now = job.load(std::memory_order_acquire);;) {
      if (now >> 16 == last || (now & 255) >= (now >> 8 & 255)) {
        now = wait_change(job, now);
      } else if (job.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel,
                                           std::memory_order_acquire)) {
        last = now >> 16;
        attempt();
        done.fetch_add(1, std::memory_order_release);
        done.notify_one();
        now = job.load(std::memory_order_acquire);
      }
    }
  }

  // Makes sure that there are `size` threads with the caller; fewer when the system gives no more.
  int grow(int size) {
    while (workers + 1 < size) {
      try {
        std::thread(&Pool::work, this).detach();
      } catch (const std::exception&) {
        break;
      }
      ++workers;
    }
    return workers + 1 < size ? workers + 1 : size;
  }

  void run(int size, Task new_task, void* new_argument) {
    task = new_task;
    argument = new_argument;
    done.store(0, std::memory_order_relaxed);
    const uint32_t number = job.load(std::memory_order_relaxed) >> 16;
    const uint32_t next = number == 0xffff ? 1 : number + 1;
    job.store(next << 16 | static_cast<uint32_t>(size - 1) << 8, std::memory_order_release);
    job.notify_all();
    attempt();  // the workers must be done with what is on the stack, whatever happens
    const uint32_t joined = job.exchange(next << 16, std::memory_order_acq_rel) & 255;
    for (uint32_t now; (now = done.load(std::memory_order_acquire)) != joined;)
      wait_change(done, now);
    if (failed.exchange(false)) throw std::bad_alloc();
  }
};

namespace {

// Never destroyed: its detached workers may outlive static destructors. A forked child has none of
// the parent's workers, so it starts with a pool of its own.
Pool* pool = nullptr;

void new_pool() { pool = new Pool; }

struct Start {
  Start() {
    new_pool();
    pthread_atfork(nullptr, nullptr, new_pool);
  }
} start;

struct OpenMp final : Host {
  Parallel parallel = nullptr;

  void run(int ranks, void (*rank)(void*, size_t), void* job) const override {
    struct Region {
      void (*rank)(void*, size_t);
      void* job;
    } region{rank, job};
    const auto enter = [](void* region) { ((Region*)region)->rank(((Region*)region)->job, 0); };
    parallel(enter, &region, ranks, 0);
  }
} openmp;

thread_local const Host* lent = nullptr;

struct HostJob {
  Task task;
  void* argument;
  std::atomic<bool> failed{false};  // nothing may be thrown across the host
};

}  // namespace

Lent::Lent(const Host& host) { lent = &host; }
Lent::~Lent() { lent = nullptr; }

void use_openmp(Parallel parallel) { openmp.parallel = parallel; }

void run(int threads, Task task, void* argument) {
  const Host* host = lent != nullptr ? lent : openmp.parallel != nullptr ? &openmp : nullptr;
  if (host != nullptr && threads > 1) {
    HostJob job{task, argument};
    const auto rank = [](void* job, size_t) {
      HostJob& one = *(HostJob*)job;
      try {
        one.task(one.argument);
      } catch (const std::bad_alloc&) {
        one.failed = true;
      }
    };
    host->run(threads, rank, &job);
    if (job.failed) throw std::bad_alloc();
    return;
  }
  if (threads > kMostThreads) threads = kMostThreads;
  if (threads > 1) {
    std::unique_lock<std::mutex> lock(pool->busy, std::try_to_lock);
    if (lock.owns_lock() && (threads = pool->grow(threads)) > 1) {
      pool->run(threads, task, argument);
      return;
    }
  }
  task(argument);
}

void* scratch(int slot, size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[5];
  Buffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    const size_t size = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, size);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.bytes = size;
  }
  return buffer.data;
}

}  // namespace shadowc
