#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace onepass {
namespace {

struct Job {
  void (*body)(void*, std::size_t);
  void* context;
  std::size_t parts;
  std::atomic<std::size_t> next{0};

  void work() {
    for (std::size_t part = next.fetch_add(1, std::memory_order_relaxed); part < parts;
         part = next.fetch_add(1, std::memory_order_relaxed)) {
      body(context, part);
    }
  }
};

// Waking a sleeping thread takes 25 to 40 us on a virtual machine, half of what a step of a million floats takes. So a
// worker that has just worked, and a caller whose workers are about to finish, look out for this long before they
// sleep.
constexpr std::chrono::microseconds kSpin{50};

template <class Condition>
void spin_while(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  while (condition() && std::chrono::steady_clock::now() < end) {
#if defined(__SSE2__)
    for (int k = 0; k < 16; ++k) _mm_pause();
#endif
  }
}

class Pool {
 public:
  // False, and nothing done, if the pool serves another caller.
  bool run(std::size_t threads, Job& job) {
    const std::unique_lock<std::mutex> caller(callers_, std::try_to_lock);
    if (!caller.owns_lock()) return false;
    {
      const std::scoped_lock lock(mutex_);
      grow(threads - 1);
      job_ = &job;
      seats_ = std::min(threads - 1, workers_);
    }
    announced_.fetch_add(1, std::memory_order_release);
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // a worker that wakes from here on takes no seat
    seats_ = 0;
    if (active_ > 0) {
      lock.unlock();
      spin_while([this] { return active_ > 0; });
      lock.lock();
      done_.wait(lock, [this] { return active_ == 0; });
    }
    return true;
  }

 private:
  void grow(std::size_t wanted) {
    while (workers_ < wanted) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        return;  // the machine gives no more threads: those that there are share the work
      }
      ++workers_;
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (seats_ == 0) {
        const std::size_t seen = announced_;
        lock.unlock();
        spin_while([this, seen] { return announced_ == seen; });
        lock.lock();
      }
      wake_.wait(lock, [this] { return seats_ > 0; });
      --seats_;
      ++active_;
      Job& job = *job_;
      lock.unlock();
      job.work();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_;  // held by the one caller that is served
  std::mutex mutex_;    // guards what follows
  std::condition_variable wake_;
  std::condition_variable done_;
  Job* job_ = nullptr;
  std::size_t seats_ = 0;  // workers that may still join the job
  std::size_t workers_ = 0;
  std::atomic<std::size_t> active_{0};     // workers that have joined and not yet left the job; written under mutex_
  std::atomic<std::size_t> announced_{0};  // jobs so far
};

// The pool is never destroyed: its workers sleep until the process ends. A forked child, which has none of the threads
// and perhaps a mutex that one of them held, leaves its parent's pool alone and starts a new one at its first need.
std::atomic<Pool*> current_pool{nullptr};
std::atomic<std::size_t> chosen_threads{0};
thread_local bool inside_parallel_for = false;

Pool& pool() {
  Pool* found = current_pool.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
#if defined(__unix__) || defined(__APPLE__)
  static std::once_flag once;
  std::call_once(once, [] {
    pthread_atfork(nullptr, nullptr, [] {
      current_pool.store(nullptr, std::memory_order_release);
      inside_parallel_for = false;
    });
  });
#endif
  auto* const created = new Pool;  // NOLINT(cppcoreguidelines-owning-memory): see above
  if (current_pool.compare_exchange_strong(found, created, std::memory_order_acq_rel)) return *created;
  delete created;  // NOLINT(cppcoreguidelines-owning-memory): another thread was first
  return *found;
}

std::size_t cgroup_quota() {
  constexpr auto unlimited = static_cast<std::size_t>(-1);
  const auto cpus = [](double quota, double period) {
    return quota > 0 && period > 0 ? std::max<std::size_t>(1, static_cast<std::size_t>(std::lround(quota / period)))
                                   : unlimited;
  };
  std::string quota;
  double period = 0;
  if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); v2 >> quota >> period) {
    return quota == "max" ? unlimited : cpus(std::strtod(quota.c_str(), nullptr), period);
  }
  std::ifstream v1_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
  std::ifstream v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double value = 0;
  if (v1_quota >> value && v1_period >> period) return cpus(value, period);
  return unlimited;
}

std::size_t affine_cpus() {
#if defined(__linux__)
  constexpr int most = 1 << 14;
  if (cpu_set_t* const set = CPU_ALLOC(most)) {
    const std::size_t size = CPU_ALLOC_SIZE(most);
    const int count = sched_getaffinity(0, size, set) == 0 ? CPU_COUNT_S(size, set) : 0;
    CPU_FREE(set);
    if (count > 0) return static_cast<std::size_t>(count);
  }
#endif
  return std::max<std::size_t>(1, std::thread::hardware_concurrency());
}

}  // namespace

std::size_t usable_cpus() {
  static const std::size_t quota = cgroup_quota();
  return std::min(quota, affine_cpus());
}

std::size_t thread_count() {
  const std::size_t chosen = chosen_threads.load(std::memory_order_relaxed);
  return chosen > 0 ? chosen : usable_cpus();
}

void set_thread_count(std::size_t count) { chosen_threads.store(count, std::memory_order_relaxed); }

void parallel_for(std::size_t threads, std::size_t parts, void (*body)(void*, std::size_t), void* context) {
  Job job{body, context, parts};
  threads = std::min(threads, parts);
  if (threads > 1 && !inside_parallel_for) {
    inside_parallel_for = true;
    const bool served = pool().run(threads, job);
    inside_parallel_for = false;
    if (served) return;
  }
  job.work();
}

}  // namespace onepass
