// Blocks as loops, threads as fibers.
#include "execution.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "fibers.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

constinit thread_local uint3 threadIdx = {0, 0, 0}, blockIdx = {0, 0, 0};
constinit thread_local dim3 blockDim, gridDim;

namespace onepass_host {

void die(const char* message) {
  std::fprintf(stderr, "cuda_on_host: %s (block %u,%u,%u, thread %u,%u,%u)\n", message, blockIdx.x, blockIdx.y,
               blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  std::fflush(stderr);
  std::abort();
}

namespace {

// The arithmetic of a kernel that was compiled with --ftz=true: subnormals are zero, results are rounded to nearest.
class Arithmetic {
 public:
#if defined(__SSE__)
  Arithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x9fc0); }  // all exceptions masked, FTZ, DAZ
  ~Arithmetic() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
  Arithmetic() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(std::uint64_t{1} << 24));
  }
  ~Arithmetic() { asm volatile("msr fpcr, %0" ::"r"(before_)); }
#else
#error "Say here how subnormals are flushed."
#endif
  Arithmetic(const Arithmetic&) = delete;
  Arithmetic& operator=(const Arithmetic&) = delete;

 private:
#if defined(__SSE__)
  unsigned before_;
#else
  std::uint64_t before_ = 0;
#endif
};

enum class State : std::uint8_t { fresh, ready, at_barrier, at_cluster_barrier, in_warp, done };

struct Thread {
  State state = State::fresh;
  unsigned block = 0;  // in the cluster
  unsigned index = 0;  // in the block
  Fiber* fiber = nullptr;
  // While in_warp:
  const char* what = nullptr;
  std::uint32_t mask = 0;
  std::uint64_t value = 0;
  Lanes* lanes = nullptr;
};

// All that have not returned meet; the last one to arrive, or to return, lets the others go.
struct Barrier {
  unsigned alive = 0, waiting = 0, sum = 0, result = 0;
};

constexpr std::size_t shared_guard = 256;

struct Block {
  Barrier barrier;
  uint3 index = {};
  std::unique_ptr<std::byte[]> memory;
  std::byte* shared = nullptr;
};

class Runner {
 public:
  void run(const Launch& launch, const Work& work, Order order);
  bool running() const { return work_ != nullptr; }

  std::byte* shared() { return block().shared; }
  unsigned rank() { return self().block; }
  unsigned size() const { return static_cast<unsigned>(blocks_.size()); }
  void* map(void* place, unsigned rank);
  unsigned barrier(unsigned value) { return meet(block().barrier, State::at_barrier, value); }
  void cluster_barrier() { meet(cluster_, State::at_cluster_barrier, 0); }
  void exchange(const char* what, std::uint32_t mask, std::uint64_t value, Lanes& lanes);

 private:
  static void entry();
  Thread& self() {
    if (self_ == nullptr) die("a function of the device was called outside of a kernel");
    return *self_;
  }
  Block& block() { return blocks_[self().block]; }
  void run_cluster();
  void start_block(Block& block);
  void resume(Thread& thread);
  void yield();
  void leave(Thread& thread);
  unsigned meet(Barrier& barrier, State state, unsigned value);
  bool complete(Barrier& barrier, State state, unsigned first_thread, unsigned threads);
  bool complete_warp(unsigned first, const char* what, std::uint32_t mask);
  [[noreturn]] void deadlock() const;

  const Launch* launch_ = nullptr;
  const Work* work_ = nullptr;
  Thread* self_ = nullptr;
  Fiber scheduler_;
  unsigned threads_per_block_ = 0;
  std::vector<Thread> threads_;
  std::vector<Block> blocks_;
  Barrier cluster_;
  Order order_;
  Shuffle shuffle_{0};
  std::vector<unsigned> sequence_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
};

Runner& runner() {
  static thread_local Runner one;
  return one;
}

// Written so that no frame of it is left open on the stack that it abandons: ThreadSanitizer keeps count of frames.
__attribute__((no_sanitize("thread"))) void Runner::entry() {
  Runner& one = runner();
  Thread& thread = *one.self_;
  thread.fiber->arrived();
  one.work_->thread();
  one.leave(thread);
  one.scheduler_.enter(*thread.fiber, true);
  die("a thread that had returned went on");
}

void Runner::resume(Thread& thread) {
  if (thread.state == State::fresh) {
    if (idle_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>(&Runner::entry));
      idle_.push_back(fibers_.back().get());
    }
    thread.fiber = idle_.back();
    idle_.pop_back();
    thread.fiber->restart();
    thread.state = State::ready;
  }
  const unsigned x = blockDim.x, y = blockDim.y;
  threadIdx = {thread.index % x, thread.index / x % y, thread.index / x / y};
  blockIdx = blocks_[thread.block].index;
  self_ = &thread;
  thread.fiber->enter(scheduler_, false);
  self_ = nullptr;
  if (thread.state == State::done) idle_.push_back(thread.fiber);
}

void Runner::yield() {
  Thread& thread = self();
  scheduler_.enter(*thread.fiber, false);
}

// A thread has returned: whoever waits for it alone may go on.
void Runner::leave(Thread& thread) {
  thread.state = State::done;
  Barrier& barrier = block().barrier;
  --barrier.alive;
  complete(barrier, State::at_barrier, thread.block * threads_per_block_, threads_per_block_);
  --cluster_.alive;
  complete(cluster_, State::at_cluster_barrier, 0, static_cast<unsigned>(threads_.size()));
  const unsigned first = thread.index / 32 * 32;
  const std::uint32_t own = 1U << (thread.index % 32);
  for (unsigned i = first; i < first + 32 && i < threads_per_block_; ++i) {
    const Thread& other = threads_[thread.block * threads_per_block_ + i];
    if (other.state == State::in_warp && (other.mask & own) != 0) {
      complete_warp(thread.block * threads_per_block_ + first, other.what, other.mask);
    }
  }
}

unsigned Runner::meet(Barrier& barrier, State state, unsigned value) {
  Thread& thread = self();
  const bool of_block = state == State::at_barrier;
  thread.state = state;
  ++barrier.waiting;
  barrier.sum += value;
  complete(barrier, state, of_block ? thread.block * threads_per_block_ : 0,
           of_block ? threads_per_block_ : static_cast<unsigned>(threads_.size()));
  // The last one to arrive waits for its turn as well, so that the order of threads is the one asked for.
  yield();
  return barrier.result;
}

bool Runner::complete(Barrier& barrier, State state, unsigned first_thread, unsigned threads) {
  if (barrier.waiting == 0 || barrier.waiting != barrier.alive) return false;
  barrier.result = barrier.sum;
  barrier.waiting = barrier.sum = 0;
  for (unsigned i = first_thread; i < first_thread + threads; ++i) {
    if (threads_[i].state == state) threads_[i].state = State::ready;
  }
  return true;
}

void Runner::exchange(const char* what, std::uint32_t mask, std::uint64_t value, Lanes& lanes) {
  Thread& thread = self();
  const unsigned lane = thread.index % 32;
  if ((mask >> lane & 1) == 0) die("a thread that its own mask does not name takes part in an operation of a warp");
  lanes.self = lane;
  thread.what = what;
  thread.mask = mask;
  thread.value = value;
  thread.lanes = &lanes;
  thread.state = State::in_warp;
  complete_warp(thread.block * threads_per_block_ + thread.index - lane, what, mask);
  yield();
}

bool Runner::complete_warp(unsigned first, const char* what, std::uint32_t mask) {
  const unsigned end = (first / threads_per_block_ + 1) * threads_per_block_;
  std::uint32_t present = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0 || first + i >= end) continue;
    const Thread& thread = threads_[first + i];
    if (thread.state == State::done) continue;
    if (thread.state != State::in_warp || thread.mask != mask || std::strcmp(thread.what, what) != 0) return false;
    present |= 1U << i;
  }
  Lanes all;
  for (unsigned i = 0; i < 32; ++i)
    all.values[i] = (present >> i & 1) != 0 ? threads_[first + i].value : ~std::uint64_t{0};
  all.present = present;
  for (unsigned i = 0; i < 32; ++i) {
    if ((present >> i & 1) == 0) continue;
    all.self = i;
    *threads_[first + i].lanes = all;
    threads_[first + i].state = State::ready;
  }
  return true;
}

void* Runner::map(void* place, unsigned rank) {
  const Block& own = block();
  const auto offset = static_cast<std::byte*>(place) - own.shared;
  if (offset < 0 || static_cast<std::size_t>(offset) > launch_->shared) {
    die("a place outside of dynamic shared memory was mapped to another block of the cluster");
  }
  if (rank >= blocks_.size()) die("a place was mapped to a block that the cluster does not have");
  if (blocks_[rank].barrier.alive == 0) die("a place was mapped to a block of the cluster that has ended");
  return blocks_[rank].shared + offset;
}

void Runner::deadlock() const {
  unsigned counts[6] = {};
  for (const Thread& thread : threads_) ++counts[static_cast<unsigned>(thread.state)];
  std::string message = "deadlock: " + std::to_string(counts[2]) + " threads wait at __syncthreads, " +
                        std::to_string(counts[3]) + " at the cluster's barrier, " + std::to_string(counts[4]) +
                        " in operations of a warp";
  for (const Thread& thread : threads_) {
    if (thread.state != State::in_warp) continue;
    char text[96];
    std::snprintf(text, sizeof(text), " (thread %u: %s, mask %08x)", thread.index, thread.what, thread.mask);
    message += text;
    break;
  }
  message += "; " + std::to_string(counts[5]) + " have returned";
  die(message.c_str());
}

void Runner::start_block(Block& block) {
  // Aligned to 16 bytes and no more: a kernel may not expect more.
  const auto start = reinterpret_cast<std::uintptr_t>(block.memory.get()) + shared_guard;
  block.shared = block.memory.get() + shared_guard + (32 - start % 32) % 32 + 16;
  std::memset(block.shared - shared_guard, 0xff, launch_->shared + 2 * shared_guard);
  block.barrier = {threads_per_block_, 0, 0, 0};
}

void Runner::run_cluster() {
  const auto count = static_cast<unsigned>(threads_.size());
  for (Block& block : blocks_) start_block(block);
  cluster_ = {count, 0, 0, 0};
  for (unsigned i = 0; i < count; ++i) {
    threads_[i].state = State::fresh;
    threads_[i].block = i / threads_per_block_;
    threads_[i].index = i % threads_per_block_;
  }
  while (cluster_.alive > 0) {
    bool any = false;
    if (order_.threads == onepass_host_shuffled) shuffle_.apply(sequence_);
    for (unsigned i = 0; i < count; ++i) {
      const unsigned which = order_.threads == onepass_host_shuffled    ? sequence_[i]
                             : order_.threads == onepass_host_backwards ? count - 1 - i
                                                                        : i;
      Thread& thread = threads_[which];
      if (thread.state != State::fresh && thread.state != State::ready) continue;
      any = true;
      resume(thread);
    }
    if (!any) deadlock();
  }
  for (const Block& block : blocks_) {
    for (std::size_t i = 0; i < shared_guard; ++i) {
      if (block.shared[-1 - static_cast<std::ptrdiff_t>(i)] != std::byte{0xff} ||
          block.shared[launch_->shared + i] != std::byte{0xff}) {
        die("a block wrote outside of its dynamic shared memory");
      }
    }
  }
}

void Runner::run(const Launch& launch, const Work& work, Order order) {
  const Arithmetic arithmetic;
  launch_ = &launch;
  work_ = &work;
  order_ = order;
  shuffle_ = Shuffle(order.seed);
  blockDim = launch.block;
  gridDim = launch.grid;
  const dim3 cluster = launch.cluster;
  threads_per_block_ = launch.block.x * launch.block.y * launch.block.z;
  blocks_.resize(std::size_t{cluster.x} * cluster.y * cluster.z);
  for (Block& block : blocks_)
    block.memory = std::make_unique_for_overwrite<std::byte[]>(launch.shared + 3 * shared_guard + 64);
  threads_.resize(blocks_.size() * threads_per_block_);
  sequence_.resize(threads_.size());
  std::iota(sequence_.begin(), sequence_.end(), 0U);

  const std::uint64_t across = launch.grid.x / cluster.x, down = launch.grid.y / cluster.y;
  const std::uint64_t clusters = across * down * (launch.grid.z / cluster.z);
  std::vector<std::uint64_t> places;
  if (order.blocks == onepass_host_shuffled) {
    places.resize(clusters);
    std::iota(places.begin(), places.end(), std::uint64_t{0});
    shuffle_.apply(places);
  }
  for (std::uint64_t i = 0; i < clusters; ++i) {
    const std::uint64_t place = order.blocks == onepass_host_shuffled    ? places[i]
                                : order.blocks == onepass_host_backwards ? clusters - 1 - i
                                                                         : i;
    const uint3 first = {static_cast<unsigned>(place % across) * cluster.x,
                         static_cast<unsigned>(place / across % down) * cluster.y,
                         static_cast<unsigned>(place / across / down) * cluster.z};
    for (unsigned rank = 0; rank < blocks_.size(); ++rank) {
      blocks_[rank].index = {first.x + rank % cluster.x, first.y + rank / cluster.x % cluster.y,
                             first.z + rank / cluster.x / cluster.y};
    }
    run_cluster();
  }
  work_ = nullptr;
  launch_ = nullptr;
}

}  // namespace

void run(const Launch& launch, const Work& work, Order order) { runner().run(launch, work, order); }

bool running() { return runner().running(); }

unsigned barrier(unsigned value) { return runner().barrier(value); }

void exchange(const char* what, std::uint32_t mask, std::uint64_t value, Lanes& lanes) {
  runner().exchange(what, mask, value, lanes);
}

}  // namespace onepass_host

void* onepass_host_shared_memory() { return onepass_host::runner().shared(); }
unsigned onepass_host_cluster_rank() { return onepass_host::runner().rank(); }
unsigned onepass_host_cluster_size() { return onepass_host::runner().size(); }
void onepass_host_cluster_sync() { onepass_host::runner().cluster_barrier(); }
void* onepass_host_cluster_map(void* shared, unsigned rank) { return onepass_host::runner().map(shared, rank); }
