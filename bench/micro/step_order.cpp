// Would a step gain if the same bytes were moved in another order?
//
// Adam reads four arrays and writes three of them, a cache line of each in turn. Memory likes long runs of one array,
// and dislikes to change between reading and writing.
//
//   step_order [--quick]     two threads, float32; medians in ms, and the ratio to `loop`
//
// * `onepass`: the library's step.
// * `loop`: its arithmetic alone, in a loop that a compiler would make of the formula.
// * `N ahead`: the same, which asks for each array N bytes ahead.
// * `bursts of N`: while N bytes of each array are worked on, the next N are asked for, one array after the other.
// * `bursts of N, past caches`: results wait in a buffer, and are then stored past the caches, one array after the
// other.
// * `N apart`: the loop over arrays each of which begins N bytes further behind the boundary of a huge page than the
// one
//   before; those of the others all begin at one.
//
// All run in turns. A program for processors with AVX2; docs/performance.md says what it showed.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "arrays.h"
#include "contest.h"
#include "cpu/dispatch.h"
#include "cpu/update.h"

#if !defined(__AVX2__)
#error "compile it for AVX2"
#endif

namespace {

using onepass::DType;
using onepass::bench::kThreads;
using onepass::bench::Memory;
using onepass::bench::Range;

constexpr std::size_t kVector = 8;
constexpr std::size_t kLine = 64;
constexpr std::size_t kMost = std::size_t{64} << 10;  // bytes of a burst

enum Name : std::size_t { kParams, kGrads, kFirst, kSecond, kArrays };
constexpr std::array kWritten = {kParams, kFirst, kSecond};

class Arrays {
 public:
  Arrays(std::size_t count, std::size_t apart) : count_(count) {
    for (std::size_t k = 0; k < kArrays; ++k) {
      memory_[k] = Memory(count * sizeof(float) + k * apart, 0);
      onepass::bench::fill_with_numbers(DType::float32, memory_[k].data() + k * apart, count, 1);
      starts_[k] = reinterpret_cast<float*>(memory_[k].data() + k * apart);
    }
  }
  std::size_t count() const { return count_; }
  float* at(std::size_t array, std::size_t element) const { return starts_[array] + element; }

 private:
  std::size_t count_;
  std::array<Memory, kArrays> memory_;
  std::array<float*, kArrays> starts_{};
};

struct Results {
  __m256 params, first, second;
};

Results step(const Arrays& arrays, std::size_t k) {
  const __m256 grads = _mm256_loadu_ps(arrays.at(kGrads, k));
  const __m256 squares = _mm256_mul_ps(grads, grads);
  const __m256 first = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(arrays.at(kFirst, k)), _mm256_set1_ps(0.9F)),
                                     _mm256_mul_ps(grads, _mm256_set1_ps(0.1F)));
  const __m256 second = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(arrays.at(kSecond, k)), _mm256_set1_ps(0.999F)),
                                      _mm256_mul_ps(squares, _mm256_set1_ps(0.001F)));
  const __m256 divisor = _mm256_add_ps(_mm256_sqrt_ps(second), _mm256_set1_ps(1e-8F));
  const __m256 change = _mm256_div_ps(_mm256_mul_ps(first, _mm256_set1_ps(1e-3F)), divisor);
  return {_mm256_sub_ps(_mm256_loadu_ps(arrays.at(kParams, k)), change), first, second};
}

void fetch(const float* from, std::size_t bytes) {
  _mm_prefetch(reinterpret_cast<const char*>(from) + bytes, _MM_HINT_T0);
}

// `ahead`: bytes; 0: nothing is asked for.
void loop(const Arrays& arrays, Range range, std::size_t ahead) {
  for (std::size_t k = range.begin; k < range.end; k += kVector) {
    if (ahead != 0 && k % (kLine / sizeof(float)) == 0) {
      for (std::size_t array = 0; array < kArrays; ++array) fetch(arrays.at(array, k), ahead);
    }
    const Results results = step(arrays, k);
    _mm256_storeu_ps(arrays.at(kParams, k), results.params);
    _mm256_storeu_ps(arrays.at(kFirst, k), results.first);
    _mm256_storeu_ps(arrays.at(kSecond, k), results.second);
  }
}

void bursts(const Arrays& arrays, Range range, std::size_t bytes, bool past_caches) {
  alignas(kLine) thread_local std::array<std::array<float, kMost / sizeof(float)>, kWritten.size()> waiting;
  const std::size_t block = bytes / sizeof(float);
  const auto ask = [&](std::size_t from) {
    if (from >= range.end) return;
    const std::size_t end = std::min(block, range.end - from) * sizeof(float);
    for (std::size_t array = 0; array < kArrays; ++array) {
      for (std::size_t byte = 0; byte < end; byte += kLine) fetch(arrays.at(array, from), byte);
    }
  };
  ask(range.begin);
  for (std::size_t start = range.begin; start < range.end; start += block) {
    const Range part{start, std::min(start + block, range.end)};
    ask(part.end);
    if (!past_caches) {
      loop(arrays, part, 0);
      continue;
    }
    for (std::size_t k = part.begin; k < part.end; k += kVector) {
      const Results results = step(arrays, k);
      _mm256_store_ps(waiting[0].data() + (k - start), results.params);
      _mm256_store_ps(waiting[1].data() + (k - start), results.first);
      _mm256_store_ps(waiting[2].data() + (k - start), results.second);
    }
    for (std::size_t array = 0; array < kWritten.size(); ++array) {
      for (std::size_t k = part.begin; k < part.end; k += kVector) {
        _mm256_stream_ps(arrays.at(kWritten[array], k), _mm256_load_ps(waiting[array].data() + (k - start)));
      }
    }
  }
  _mm_sfence();
}

class Library {
 public:
  explicit Library(const Arrays& arrays) {
    tensor_.kernel = onepass::find_kernel(onepass::active_kernels(), "adam");
    tensor_.count = arrays.count();
    tensor_.coefficients = coefficients_.data();
    tensor_.around = &around_;
    const std::array<std::size_t, kArrays> streams = {onepass::kParam, onepass::kGrad, onepass::kFirstSlot,
                                                      onepass::kFirstSlot + 1};
    for (std::size_t k = 0; k < kArrays; ++k) tensor_.set(streams[k], arrays.at(k, 0), DType::float32);
  }
  void step() const { onepass::update({&tensor_, 1}, kThreads); }

 private:
  std::vector<double> coefficients_ = onepass::bench::neutral_coefficients();
  onepass::Around around_;
  onepass::Tensor tensor_;
};

std::string bytes_text(std::size_t bytes) {
  return bytes % 1024 == 0 ? std::to_string(bytes / 1024) + " KiB" : std::to_string(bytes) + " B";
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = onepass::bench::is_quick(argc, argv);
  const std::size_t count = quick ? std::size_t{1} << 16 : std::size_t{1} << 24;
  const Arrays arrays(count, 0);
  const Library library(arrays);
  std::vector<std::unique_ptr<Arrays>> set_apart;

  onepass::bench::Contest contest;
  const auto on_both = [count](const auto& body) {
    return [count, body] {
      onepass::bench::on_threads(
          [&](std::size_t thread) { body(onepass::bench::part_of(count, kMost / sizeof(float), thread)); });
    };
  };
  contest.add("onepass", [&] { library.step(); });
  contest.add("loop", on_both([&](Range range) { loop(arrays, range, 0); }));
  for (const std::size_t ahead : {512, 1024, 4096}) {
    contest.add(bytes_text(ahead) + " ahead", on_both([&, ahead](Range range) { loop(arrays, range, ahead); }));
  }
  for (const std::size_t bytes : {1024, 4096, 16384, 65536}) {
    contest.add("bursts of " + bytes_text(bytes),
                on_both([&, bytes](Range range) { bursts(arrays, range, bytes, false); }));
  }
  for (const std::size_t bytes : {1024, 4096}) {
    contest.add("bursts of " + bytes_text(bytes) + ", past caches",
                on_both([&, bytes](Range range) { bursts(arrays, range, bytes, true); }));
  }
  for (const std::size_t apart : {64, 1024, 4160, 66560}) {
    const Arrays& own = *set_apart.emplace_back(std::make_unique<Arrays>(count, apart));
    contest.add(bytes_text(apart) + " apart", on_both([&own](Range range) { loop(own, range, 0); }));
  }
  contest.print("Adam over " + std::to_string(count) + " elements", "loop", quick ? 3 : 61);
  return 0;
}
