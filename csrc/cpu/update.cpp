#include "cpu/update.h"

#include <algorithm>
#include <atomic>

#include "core/partition.h"
#include "cpu/dispatch.h"
#include "cpu/float_mode.h"
#include "cpu/parallel.h"

namespace onepass {
namespace {

// Elements that are gathered at a time: 4 streams of doubles take 16 KiB of stack and stay in the first-level cache.
constexpr std::size_t kGatherBlock = 512;

// Parts per thread: claimed one by one, so that a core that is busy elsewhere does not hold up the others.
constexpr std::size_t kPartsPerThread = 4;

const void* advance(const void* pointer, std::size_t bytes) { return static_cast<const std::byte*>(pointer) + bytes; }
void* advance(void* pointer, std::size_t bytes) { return static_cast<std::byte*>(pointer) + bytes; }

Isa update_direct(const Tensor& tensor, std::size_t first, std::size_t count) {
  const std::size_t offset = first * info(tensor.dtype).itemsize;
  Streams streams{advance(tensor.streams.param, offset), advance(tensor.streams.grad, offset), {}};
  for (std::size_t k = 0; k < tensor.kernel->slots.count; ++k) {
    streams.slots[k] = advance(tensor.streams.slots[k], offset);
  }
  return tensor.kernel->update[static_cast<std::size_t>(tensor.dtype)](streams, count, tensor.coefficients,
                                                                       *tensor.around);
}

Isa update_gathered(const Tensor& tensor, std::size_t first, std::size_t count) {
  alignas(kCacheLine) std::byte buffers[1 + kMaxSlots][kGatherBlock * sizeof(double)];
  const std::size_t itemsize = info(tensor.dtype).itemsize;
  const std::size_t slots = tensor.kernel->slots.count;
  const Walk& walk = *tensor.walk;
  Isa isa = Isa::scalar;
  for (std::size_t begin = first; begin < first + count; begin += kGatherBlock) {
    const std::size_t n = std::min(kGatherBlock, first + count - begin);
    const std::size_t offset = begin * itemsize;
    Streams streams{advance(tensor.streams.param, offset), nullptr, {}};
    if (walk.gather[0]) {
      gather(walk.axes[0], tensor.streams.grad, itemsize, begin, n, buffers[0]);
      streams.grad = buffers[0];
    } else {
      streams.grad = advance(tensor.streams.grad, offset);
    }
    for (std::size_t k = 0; k < slots; ++k) {
      if (walk.gather[1 + k]) {
        gather(walk.axes[1 + k], tensor.streams.slots[k], itemsize, begin, n, buffers[1 + k]);
        streams.slots[k] = buffers[1 + k];
      } else {
        streams.slots[k] = advance(tensor.streams.slots[k], offset);
      }
    }
    isa =
        tensor.kernel->update[static_cast<std::size_t>(tensor.dtype)](streams, n, tensor.coefficients, *tensor.around);
    for (std::size_t k = 0; k < slots; ++k) {
      if (!walk.gather[1 + k]) continue;
      scatter(walk.axes[1 + k], tensor.streams.slots[k], itemsize, begin, n, buffers[1 + k]);
    }
  }
  return isa;
}

Isa update_part(const Tensor& tensor, std::size_t first, std::size_t count) {
  return tensor.walk == nullptr ? update_direct(tensor, first, count) : update_gathered(tensor, first, count);
}

std::atomic<std::size_t> least_parallel_bytes{std::size_t{4} << 20};

struct Parts {
  std::span<const Tensor> tensors;
  std::span<const Extent> extents;
  std::size_t parts;
  std::atomic<Isa> isa;
};

}  // namespace

std::size_t traffic(const Tensor& tensor) {
  const std::size_t streams = 3 + 2 * tensor.kernel->slots.count;  // gradient in, parameter and slots in and out
  return streams * info(tensor.dtype).itemsize * tensor.count;
}

std::size_t serial_bytes() { return least_parallel_bytes.load(std::memory_order_relaxed); }
void set_serial_bytes(std::size_t bytes) { least_parallel_bytes.store(bytes, std::memory_order_relaxed); }

Isa update(std::span<const Tensor> tensors, std::size_t threads) {
  std::size_t total = 0;
  for (const Tensor& tensor : tensors) total += traffic(tensor);
  if (threads <= 1 || total == 0 || total < serial_bytes()) {
    const FloatMode mode;
    Isa isa = active_kernels().isa;
    for (const Tensor& tensor : tensors) {
      if (tensor.count > 0) isa = update_part(tensor, 0, tensor.count);
    }
    return isa;
  }

  thread_local std::vector<Extent> extents;  // keeps its memory from step to step
  extents.clear();
  std::size_t end = 0;
  for (const Tensor& tensor : tensors) {
    end += traffic(tensor);
    extents.push_back(
        {reinterpret_cast<std::uintptr_t>(tensor.streams.param), info(tensor.dtype).itemsize, tensor.count, end});
  }
  Parts parts{tensors, extents, threads * kPartsPerThread, active_kernels().isa};
  parallel_for(
      threads, parts.parts,
      [](void* context, std::size_t part) {
        Parts& p = *static_cast<Parts*>(context);
        const FloatMode mode;
        for_each_in_part(p.extents, part, p.parts, [&](std::size_t t, std::size_t first, std::size_t count) {
          p.isa.store(update_part(p.tensors[t], first, count), std::memory_order_relaxed);
        });
      },
      &parts);
  return parts.isa.load(std::memory_order_relaxed);
}

}  // namespace onepass
