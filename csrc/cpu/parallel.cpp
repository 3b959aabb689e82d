#include "cpu/parallel.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <exception>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>  // NOLINT(modernize-deprecated-headers): POSIX's masks
#endif

namespace onepass {
namespace {

constexpr auto kUnlimited = static_cast<std::size_t>(-1);

// The CPUs that a folder of the cgroup file system grants, in the words of version 2 and of version 1.
std::size_t quota_in(const std::string& folder) {
  const auto cpus = [](double quota, double period) {
    return quota > 0 && period > 0 ? std::max<std::size_t>(1, static_cast<std::size_t>(std::lround(quota / period)))
                                   : kUnlimited;
  };
  std::string quota;
  double period = 0;
  if (std::ifstream file(folder + "/cpu.max"); file >> quota >> period) {
    return quota == "max" ? kUnlimited : cpus(std::strtod(quota.c_str(), nullptr), period);
  }
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us");
  std::ifstream period_file(folder + "/cpu.cfs_period_us");
  double value = 0;
  return quota_file >> value && period_file >> period ? cpus(value, period) : kUnlimited;
}

// The least that this process's cgroup and the ones above it grant. Read once.
std::size_t cgroup_quota() {
  static const std::size_t quota = [] {
    std::size_t least = std::min(quota_in("/sys/fs/cgroup"), quota_in("/sys/fs/cgroup/cpu"));
    std::ifstream file("/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {  // "0::/a/b" in version 2, "4:cpu,cpuacct:/a/b" in version 1
      const std::size_t controllers = line.find(':') + 1;
      const std::size_t path = line.find(':', controllers) + 1;
      if (controllers == 0 || path == 0) continue;
      std::string names(",");
      names.append(line, controllers, path - controllers - 1).append(",");
      const bool v2 = names == ",,";
      if (!v2 && names.find(",cpu,") == std::string::npos) continue;
      for (std::string folder = line.substr(path); folder.size() > 1; folder.resize(folder.rfind('/'))) {
        least = std::min(least, quota_in((v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu") + folder));
        if (folder.rfind('/') == std::string::npos) break;
      }
    }
    return least;
  }();
  return quota;
}

#if defined(__linux__)
// The CPUs that the calling thread may run on.
class CpuMask {
 public:
  static CpuMask of_this_thread() {
    CpuMask mask;
    if (sched_getaffinity(0, sizeof mask.words_, mask.set()) != 0) CPU_ZERO_S(sizeof mask.words_, mask.set());
    return mask;
  }
  std::size_t count() { return static_cast<std::size_t>(CPU_COUNT_S(sizeof words_, set())); }
  CpuMask without(int cpu) const {
    CpuMask mask = *this;
    if (cpu >= 0) CPU_CLR_S(static_cast<std::size_t>(cpu), sizeof words_, mask.set());
    return mask;
  }
  void apply(pthread_t thread) { pthread_setaffinity_np(thread, sizeof words_, set()); }
  bool operator==(const CpuMask&) const = default;

 private:
  cpu_set_t* set() { return reinterpret_cast<cpu_set_t*>(words_.data()); }
  std::array<unsigned long, 256> words_{};  // 16384 CPUs
};

std::size_t affine_cpus() { return std::max<std::size_t>(1, CpuMask::of_this_thread().count()); }
#else
std::size_t affine_cpus() { return std::max<std::size_t>(1, std::thread::hardware_concurrency()); }
#endif

// The parts that one thread takes first. Each step divides its work in the same way, so a thread finds in its caches
// what it left there at the last step; what a thread does not get to, the others take over.
struct alignas(64) Lane {
  std::atomic<std::size_t> next{0};
  std::size_t end = 0;
};

struct Job {
  void (*body)(void*, std::size_t);
  void* context;
  std::size_t parts;
  std::size_t threads;
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

// Signals belong to the program's own threads: one that comes to a worker would not wake the system call that a thread
// sleeps in, and none of a program that waits for it in sigwait(), and blocks it everywhere else, may find a thread
// that does not. Left to workers are those that their own code raises, and SIGPROF, by which a profiler asks who works.
class SignalsBlocked {
 public:
  SignalsBlocked() {
#if defined(__unix__) || defined(__APPLE__)
    sigset_t mask;
    sigfillset(&mask);
    for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS, SIGPROF}) sigdelset(&mask, own);
    pthread_sigmask(SIG_BLOCK, &mask, &before_);
#endif
  }
  ~SignalsBlocked() {
#if defined(__unix__) || defined(__APPLE__)
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
#endif
  }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

#if defined(__unix__) || defined(__APPLE__)
 private:
  sigset_t before_{};
#endif
};

class Pool {
 public:
  // False, and nothing done, if the pool serves another caller.
  bool run(Job job) {
    const std::unique_lock<std::mutex> caller(callers_, std::try_to_lock);
    if (!caller.owns_lock()) return false;
    {
      const std::scoped_lock lock(mutex_);
      if (job.threads > lanes_.size()) lanes_ = std::vector<Lane>(job.threads);
      grow(job.threads - 1);
      place(job.threads);
      for (std::size_t t = 0; t < job.threads; ++t) {
        lanes_[t].next.store(job.parts * t / job.threads, std::memory_order_relaxed);
        lanes_[t].end = job.parts * (t + 1) / job.threads;
      }
      job_ = job;
      open_ = true;
      announced_.fetch_add(1, std::memory_order_release);
    }
    for (std::size_t t = 0; t + 1 < job.threads && t < workers_.size(); ++t) workers_[t].wake.notify_one();
    work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    open_ = false;  // a worker that wakes from here on does not join
    if (active_ > 0 && spins_) {
      lock.unlock();
      spin_while([this] { return active_ > 0; });
      lock.lock();
    }
    done_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  void work(std::size_t thread) {
    for (std::size_t k = 0; k < job_.threads; ++k) {
      Lane& lane = lanes_[(thread + k) % job_.threads];
      for (std::size_t part = lane.next++; part < lane.end; part = lane.next++) job_.body(job_.context, part);
    }
  }

  void grow(std::size_t wanted) {
    if (workers_.size() >= wanted) return;
    const SignalsBlocked blocked;  // a thread begins with its maker's mask
    while (workers_.size() < wanted) {
      Worker& worker = workers_.emplace_back();
      try {
        std::thread thread([this, &worker, number = workers_.size()] { serve(worker, number); });
        worker.handle = thread.native_handle();
        thread.detach();
      } catch (const std::exception&) {
        workers_.pop_back();
        return;  // the machine gives no more threads: those that there are share the work
      }
      placed_ = 0;
    }
  }

  // Workers go where the caller may go, and not where it is: a scheduler that wakes a worker on its waker's CPU, and
  // balances later, makes two threads slower than one (SGD over a million floats, 2 CPUs: 103 us, and 53 with this).
  void place(std::size_t threads) {
#if defined(__linux__)
    CpuMask allowed = CpuMask::of_this_thread();
    const int cpu = sched_getcpu();
    const bool room = threads <= std::min(cgroup_quota(), allowed.count());
    if (placed_ >= threads && cpu == caller_cpu_ && room == spins_ && allowed == allowed_) return;
    CpuMask mask = room ? allowed.without(cpu) : allowed;
    for (std::size_t t = 0; t + 1 < threads && t < workers_.size(); ++t) mask.apply(workers_[t].handle);
    allowed_ = allowed;
    caller_cpu_ = cpu;
    spins_ = room;
    placed_ = threads;
#else
    spins_ = threads <= usable_cpus();
#endif
  }

  struct Worker {
    std::condition_variable wake;
    std::thread::native_handle_type handle{};
  };

  void serve(Worker& self, std::size_t thread) {
    std::size_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      const auto invited = [this, thread, &seen] { return open_ && announced_ != seen && thread < job_.threads; };
      if (!invited() && spins_) {
        const std::size_t before = announced_;
        lock.unlock();
        spin_while([this, before] { return announced_ == before; });
        lock.lock();
      }
      self.wake.wait(lock, invited);
      seen = announced_;
      ++active_;
      lock.unlock();
      work(thread);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_;  // held by the one caller that is served
  std::mutex mutex_;    // guards what follows; job and lanes change only while no worker is active
  std::condition_variable done_;
  Job job_{};
  std::vector<Lane> lanes_;
  bool open_ = false;  // for workers to join the job
  std::deque<Worker> workers_;
  std::size_t placed_ = 0;  // threads whose CPUs are those for `allowed_` and `caller_cpu_`
  bool spins_ = false;      // a CPU for each thread: looking out for work takes it from nobody
#if defined(__linux__)
  CpuMask allowed_;
  int caller_cpu_ = -1;
#endif
  std::atomic<std::size_t> active_{0};     // workers that have joined and not yet left the job
  std::atomic<std::size_t> announced_{0};  // jobs so far
};

// The pool is never destroyed: its workers sleep until the process ends. A forked child, which has none of the threads
// and perhaps a mutex that one of them held, leaves its parent's pool alone and starts a new one at its first need.
std::atomic<Pool*> current_pool{nullptr};
std::atomic<std::size_t> chosen_threads{0};
thread_local bool inside_parallel_for = false;

struct Inside {
  Inside() { inside_parallel_for = true; }
  ~Inside() { inside_parallel_for = false; }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;
};

void watch_forks() {
#if defined(__unix__) || defined(__APPLE__)
  static std::once_flag once;
  std::call_once(once, [] {
    pthread_atfork(nullptr, nullptr, [] {
      current_pool.store(nullptr, std::memory_order_release);
      inside_parallel_for = false;
    });
  });
#endif
}

Pool& pool() {
  Pool* found = current_pool.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  watch_forks();
  auto* const created = new Pool;  // NOLINT(cppcoreguidelines-owning-memory): see above
  if (current_pool.compare_exchange_strong(found, created, std::memory_order_acq_rel)) return *created;
  delete created;  // NOLINT(cppcoreguidelines-owning-memory): another thread was first
  return *found;
}

}  // namespace

std::size_t usable_cpus() { return std::min(cgroup_quota(), affine_cpus()); }

std::size_t thread_count() {
  const std::size_t chosen = chosen_threads.load(std::memory_order_relaxed);
  return chosen > 0 ? chosen : usable_cpus();
}

void prepare_threads() {
  cgroup_quota();
  watch_forks();
}

void set_thread_count(std::size_t count) { chosen_threads.store(count, std::memory_order_relaxed); }

void parallel_for(std::size_t threads, std::size_t parts, void (*body)(void*, std::size_t), void* context) {
  threads = std::min(threads, parts);
  if (threads > 1 && !inside_parallel_for) {
    const Inside inside;
    if (pool().run({body, context, parts, threads})) return;
  }
  for (std::size_t part = 0; part < parts; ++part) body(context, part);
}

}  // namespace onepass
