// What the C++ benchmarks share: memory, numbers to fill it with, and coefficients that suit every rule.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/dtype.h"
#include "core/kernel.h"
#include "core/type_list.h"

namespace onepass::bench {

// Calls visit(D{}) with the type that `dtype` stands for.
template <class Visit, class... Ds>
void visit_dtype(DType dtype, Visit visit, TypeList<Ds...> /*dtypes*/) {
  ((dtype == Ds::id ? visit(Ds{}) : void()), ...);
}
template <class Visit>
void visit_dtype(DType dtype, Visit visit) {
  visit_dtype(dtype, visit, DTypes{});
}

// An array that begins at a cache line, all pages of which have been touched. Large ones are in huge pages where the
// system grants them, as NumPy's are.
class Memory {
 public:
  Memory() = default;
  // `turn`: by how many pages the array begins behind the boundary of a huge page. Arrays of consecutive turns lie as
  // an allocator places them that takes each from the system, and not in the same bank of the memory.
  Memory(std::size_t bytes, std::size_t turn) : size_(bytes) {
    const bool large = bytes >= kHugePage;
    const std::size_t align = large ? kHugePage : kLine;
    const std::size_t offset = large ? turn * kPage : 0;
    const std::size_t whole = (bytes + offset + align) / align * align;
    block_.reset(static_cast<std::byte*>(std::aligned_alloc(align, whole)));
    if (block_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (large) madvise(block_.get(), whole, MADV_HUGEPAGE);
#endif
    data_ = block_.get() + offset;
    std::memset(data_, 0, bytes);
  }
  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  static constexpr std::size_t kLine = 64;
  static constexpr std::size_t kPage = 4096;
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;

  struct Free {
    void operator()(std::byte* block) const { std::free(block); }
  };

  std::unique_ptr<std::byte, Free> block_;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// Numbers between 0.5 and 1.5, the same ones again after kPattern of them.
inline void fill_with_numbers(DType dtype, std::byte* to, std::size_t count, std::uint32_t seed) {
  constexpr std::size_t kPattern = std::size_t{1} << 16;
  visit_dtype(dtype, [&]<class D>(D /*dtype*/) {
    std::vector<typename D::Storage> pattern(count < kPattern ? count : kPattern);
    for (typename D::Storage& value : pattern) {
      seed = seed * 1664525U + 1013904223U;
      value = D::narrow(static_cast<typename D::Compute>(0.5 + static_cast<double>(seed >> 8U) * 0x1p-24));
    }
    for (std::size_t k = 0; k < count; k += pattern.size()) {
      const std::size_t n = count - k < pattern.size() ? count - k : pattern.size();
      std::memcpy(to + k * sizeof(typename D::Storage), pattern.data(), n * sizeof(typename D::Storage));
    }
  });
}

// Whether all values are finite, and none of them is zero if `moved`: if they began as zeros.
inline bool all_finite(DType dtype, const std::byte* values, std::size_t count, bool moved) {
  unsigned bad = 0;
  visit_dtype(dtype, [&]<class D>(D /*dtype*/) {
    using S = typename D::Compute;
    for (std::size_t k = 0; k < count; ++k) {
      typename D::Storage stored;
      std::memcpy(&stored, values + k * sizeof stored, sizeof stored);
      const S magnitude = std::abs(static_cast<S>(D::widen(stored)));
      bad += magnitude <= std::numeric_limits<S>::max() && (magnitude > S(0) || !moved) ? 0U : 1U;
    }
  });
  return count > 0 && bad == 0;
}

// Coefficients for a rule of which nothing is known: one half for each of them. What a state is multiplied with makes
// it decay, what is added to a divisor keeps that from zero, and with positive gradients no sum cancels. So parameters
// and states stay finite and normal for any number of steps, and the numbers in them are no round ones, by which some
// processors divide sooner.
inline std::vector<double> neutral_coefficients() { return std::vector<double>(kMaxCoefficients, 0.5); }

// The yardstick with the streams of a rule; null if there is none.
inline const Kernel* yardstick_of(const KernelTable& table, const Kernel& rule) {
  for (std::size_t k = 0; k < table.count; ++k) {
    const Kernel& kernel = table.kernels[k];
    if (kernel.yardstick && kernel.slots.count == rule.slots.count) return &kernel;
  }
  return nullptr;
}

}  // namespace onepass::bench
