#include "bindings/buffer_pool.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "core/partition.h"

namespace onepass {
namespace {

constexpr std::size_t kDefaultLimit = std::size_t{1} << 30;

// Smaller arrays are the C library's: it recycles them itself and has no page faults to save.
constexpr std::size_t kSmallest = std::size_t{128} << 10;

// Huge pages are fewer faults, but a page is only filled for the most part if there are many.
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kLeastHuge = 8 * kHugePage;

// What is allocated for an array: its bytes, which may begin anywhere in a cache line, rounded up to 8 steps for each
// power of two, so that batches of slightly different size share buffers and little more than an eighth is lost.
std::size_t capacity_for(std::size_t bytes) {
  const std::size_t step = std::max(bytes < kSmallest ? kCacheLine : std::bit_floor(bytes) / 8, std::size_t{1});
  const std::size_t rounded = (bytes + step - 1) / step * step + kCacheLine;
  const std::size_t page = rounded < kLeastHuge ? kCacheLine : kHugePage;
  return (rounded + page - 1) / page * page;
}

void* allocate(std::size_t capacity) {
  void* const memory = std::aligned_alloc(capacity < kLeastHuge ? kCacheLine : kHugePage, capacity);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (capacity >= kLeastHuge) madvise(memory, capacity, MADV_HUGEPAGE);
#endif
  return memory;
}

struct Buffer {
  void* memory;
  std::size_t capacity;
};

class BufferPool {
 public:
  Buffer take(std::size_t bytes) {
    const std::size_t capacity = capacity_for(bytes);
    {
      const std::scoped_lock lock(mutex_);
      const auto found = std::ranges::find(free_, capacity, &Buffer::capacity);
      if (found != free_.end()) {
        const Buffer buffer = *found;
        free_.erase(found);
        kept_ -= capacity;
        return buffer;
      }
    }
    return {allocate(capacity), capacity};
  }

  void give(Buffer buffer) noexcept {
    std::list<Buffer> dropped;
    try {
      std::list<Buffer> one{buffer};
      const std::scoped_lock lock(mutex_);
      if (buffer.capacity >= kSmallest && buffer.capacity <= limit_) {
        free_.splice(free_.begin(), one);  // the last one returned is the first one reused
        kept_ += buffer.capacity;
        shrink(limit_, dropped);
      } else {
        dropped.splice(dropped.begin(), one);
      }
    } catch (const std::bad_alloc&) {
      std::free(buffer.memory);
    }
    release(dropped);
  }

  void set_limit(std::size_t bytes) {
    std::list<Buffer> dropped;
    {
      const std::scoped_lock lock(mutex_);
      limit_ = bytes;
      shrink(bytes, dropped);
    }
    release(dropped);
  }
  void clear() {
    std::list<Buffer> dropped;
    {
      const std::scoped_lock lock(mutex_);
      shrink(0, dropped);
    }
    release(dropped);
  }
  std::size_t limit() {
    const std::scoped_lock lock(mutex_);
    return limit_;
  }
  std::size_t kept() {
    const std::scoped_lock lock(mutex_);
    return kept_;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // Drops the buffers that have waited longest.
  void shrink(std::size_t most, std::list<Buffer>& dropped) {
    while (kept_ > most) {
      kept_ -= free_.back().capacity;
      dropped.splice(dropped.begin(), free_, std::prev(free_.end()));
    }
  }
  static void release(const std::list<Buffer>& dropped) {
    for (const Buffer& buffer : dropped) std::free(buffer.memory);
  }

  std::mutex mutex_;
  std::list<Buffer> free_;
  std::size_t kept_ = 0;
  std::size_t limit_ = kDefaultLimit;
};

// Never destroyed: arrays may outlive the module.
BufferPool& pool() {
  static BufferPool* const instance = [] {
    auto* const created = new BufferPool;  // NOLINT(cppcoreguidelines-owning-memory): see above
#if defined(__unix__) || defined(__APPLE__)
    // No fork while another thread is inside: the child would wait for it for ever.
    pthread_atfork([] { pool().mutex().lock(); }, [] { pool().mutex().unlock(); }, [] { pool().mutex().unlock(); });
#endif
    return created;
  }();
  return *instance;
}

// What an array owns.
struct Taken {
  explicit Taken(std::size_t bytes) : buffer(pool().take(bytes)) {}
  ~Taken() { pool().give(buffer); }
  Taken(const Taken&) = delete;
  Taken& operator=(const Taken&) = delete;
  const Buffer buffer;
};

}  // namespace

py::array pooled_array(std::span<const std::ptrdiff_t> shape, DType dtype, const void* like) {
  const std::vector<py::ssize_t> lengths(shape.begin(), shape.end());
  const py::dtype type(info(dtype).name);
  std::size_t bytes = info(dtype).itemsize;
  for (const std::ptrdiff_t length : shape) bytes *= static_cast<std::size_t>(length);
  auto taken = std::make_unique<const Taken>(bytes);
  const auto* const start = static_cast<const std::byte*>(taken->buffer.memory);
  const py::capsule owner(taken.get(), [](void* pointer) { delete static_cast<const Taken*>(pointer); });
  [[maybe_unused]] const Taken* const owned = taken.release();
  const std::size_t item = info(dtype).itemsize;
  return {type, lengths, start + reinterpret_cast<std::uintptr_t>(like) % kCacheLine / item * item, owner};
}

void create_pool() { pool(); }
void empty_cache() { pool().clear(); }
std::size_t cache_limit() { return pool().limit(); }
void set_cache_limit(std::size_t bytes) { pool().set_limit(bytes); }
std::size_t cached_bytes() { return pool().kept(); }

}  // namespace onepass
