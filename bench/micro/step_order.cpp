// Would a step gain if the same bytes were moved in another order?
//
// Adam reads four arrays and writes three of them, a cache line of each in turn. Memory likes long runs of one array,
// and dislikes to change between reading and writing.
//
//   step_order [--quick]     two threads, float32; medians in ms, and the ratio to `loop`
//
// * `onepass`: the library's step.
// * `loop`: the same arithmetic, in the loop that one would write.
// * `N ahead`: the loop, which asks for each array N bytes ahead.
// * `bursts of N`: while N bytes of each array are worked on, the next N are asked for, one array after the other.
// * `bursts of N, past caches`: the same, and results wait in a buffer until they are stored past the caches, one array
//   after the other.
// * `N apart`: the loop over arrays each of which begins N bytes further behind the boundary of a huge page than the
// one
//   before; those of the others all begin at one.
//
// Before that everybody must arrive at the bits of the library. All run in turns. A program for processors with AVX2;
// docs/performance.md says what it showed.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
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

enum Array : std::size_t { kParams, kGrads, kFirst, kSecond, kArrays };
constexpr std::array kWritten = {kParams, kFirst, kSecond};

class Arrays {
 public:
  Arrays(std::size_t count, std::size_t apart) : count_(count) {
    for (std::size_t k = 0; k < kArrays; ++k) {
      memory_[k] = Memory(count * sizeof(float) + k * apart, 0);
      starts_[k] = reinterpret_cast<float*>(memory_[k].data() + k * apart);
    }
    restart();
  }
  void restart() const {
    for (std::size_t k = 0; k < kArrays; ++k) {
      const auto seed = static_cast<std::uint32_t>(k) + 1;
      onepass::bench::fill_with_numbers(DType::float32, reinterpret_cast<std::byte*>(starts_[k]), count_, seed);
    }
  }
  bool same_bits(const Arrays& other) const {
    for (std::size_t k = 0; k < kArrays; ++k) {
      if (std::memcmp(starts_[k], other.starts_[k], count_ * sizeof(float)) != 0) return false;
    }
    return true;
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

// Adam with all coefficients one half.
Results step(const Arrays& arrays, std::size_t k) {
  const __m256 half = _mm256_set1_ps(0.5F);
  const __m256 grads = _mm256_loadu_ps(arrays.at(kGrads, k));
  const __m256 squares = _mm256_mul_ps(grads, grads);
  const __m256 first =
      _mm256_add_ps(_mm256_mul_ps(half, _mm256_loadu_ps(arrays.at(kFirst, k))), _mm256_mul_ps(half, grads));
  const __m256 second =
      _mm256_add_ps(_mm256_mul_ps(half, _mm256_loadu_ps(arrays.at(kSecond, k))), _mm256_mul_ps(half, squares));
  const __m256 over = _mm256_add_ps(_mm256_mul_ps(half, first), _mm256_mul_ps(half, grads));
  const __m256 root = _mm256_sqrt_ps(_mm256_add_ps(_mm256_mul_ps(second, half), half));
  const __m256 change = _mm256_div_ps(over, _mm256_add_ps(root, half));
  return {_mm256_sub_ps(_mm256_loadu_ps(arrays.at(kParams, k)), change), first, second};
}

// The address may lie behind the array: nothing is read.
void fetch(const float* from, std::size_t bytes) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(from) + bytes), _MM_HINT_T0);
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
  const bool quick = onepass::bench::read_arguments(argc, argv);
  const std::size_t count = (quick ? std::size_t{1} << 16 : std::size_t{1} << 24) + kVector;
  const Arrays arrays(count, 0);
  const Library library(arrays);
  const Arrays right(count, 0);
  const Library reference(right);
  reference.step();
  reference.step();
  std::vector<std::unique_ptr<Arrays>> set_apart;

  onepass::bench::Contest contest;
  bool all_right = true;
  const auto add = [&](const std::string& name, const Arrays& own, const std::function<void()>& run) {
    own.restart();
    run();
    run();
    if (!own.same_bits(right)) {
      std::fprintf(stderr, "%s: other bits than the library's\n", name.c_str());
      all_right = false;
    }
    contest.add(name, run);
  };
  const auto add_loop = [&](const std::string& name, const Arrays& own, const auto& body) {
    add(name, own, [&own, body] {
      onepass::bench::on_threads(
          [&](std::size_t thread) { body(own, onepass::bench::part_of(own.count(), kMost / sizeof(float), thread)); });
    });
  };
  add("onepass", arrays, [&] { library.step(); });
  add_loop("loop", arrays, [](const Arrays& own, Range range) { loop(own, range, 0); });
  for (const std::size_t ahead : {512, 1024, 4096}) {
    add_loop(bytes_text(ahead) + " ahead", arrays,
             [ahead](const Arrays& own, Range range) { loop(own, range, ahead); });
  }
  for (const std::size_t bytes : {1024, 4096, 16384, 65536}) {
    add_loop("bursts of " + bytes_text(bytes), arrays,
             [bytes](const Arrays& own, Range range) { bursts(own, range, bytes, false); });
  }
  for (const std::size_t bytes : {1024, 4096}) {
    add_loop("bursts of " + bytes_text(bytes) + ", past caches", arrays,
             [bytes](const Arrays& own, Range range) { bursts(own, range, bytes, true); });
  }
  for (const std::size_t apart : {64, 1024, 4160, 66560}) {
    const Arrays& own = *set_apart.emplace_back(std::make_unique<Arrays>(count, apart));
    add_loop(bytes_text(apart) + " apart", own, [](const Arrays& each, Range range) { loop(each, range, 0); });
  }
  contest.print("Adam over " + std::to_string(count) + " elements", "loop", quick ? 3 : 61);
  return all_right ? 0 : 1;
}
