// Would batch normalization over channels that lie side by side gain by going through the batch in groups of channels?
// All of a channel is read before its first value can be normalized, so a batch that no cache holds is read twice. A
// group that is narrow enough is found in a cache the second time. But then each row is read in short pieces.
//
//   channel_groups [--quick]     two threads, float32; medians in ms, and the ratio to `two passes`
//
// * `two passes`: bare sums of all rows and their squares, then a bare map, backwards, that stores past the caches.
//   These are the bytes of the library's forward pass (`onepass`) with next to no arithmetic.
// * `plain stores`: the same, through the caches, which read each line before it is overwritten.
// * `groups of N`: sums and map of N channels at a time, each thread for its own groups; `fetched` asks for rows ahead.
// * `map alone`: what would be left if nothing had to be read twice.
//
// All run in turns. A program for processors with AVX2; docs/performance.md says what it showed.
#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "contest.h"
#include "cpu/batchnorm.h"

#if !defined(__AVX2__)
#error "compile it for AVX2"
#endif

namespace {

using onepass::DType;
using onepass::bench::kThreads;
using onepass::bench::Memory;
using onepass::bench::on_threads;
using onepass::bench::part_of;
using onepass::bench::Range;

constexpr std::size_t kRowsAtOnce = 4;
constexpr std::size_t kBlock = 64;  // rows that a map walks forwards
constexpr std::size_t kAhead = 32;  // rows
constexpr std::size_t kVector = 8;

struct Shape {
  std::size_t rows, channels;
};

// x and y are (rows, channels). Rows behind the last one of x may be fetched.
struct Arrays {
  Shape shape;
  Memory x, y;

  explicit Arrays(Shape given)
      : shape(given), x((given.rows + kAhead) * given.channels * sizeof(float), 1), y(x.size(), 2) {
    onepass::bench::fill_with_numbers(DType::float32, x.data(), given.rows * given.channels, 1);
  }
  const float* from(std::size_t row, std::size_t channel) const {
    return reinterpret_cast<const float*>(x.data()) + row * shape.channels + channel;
  }
  float* to(std::size_t row, std::size_t channel) const {
    return reinterpret_cast<float*>(y.data()) + row * shape.channels + channel;
  }
};

// sums[c] += x and sums[width + c] += x * x, for the channels of a group.
template <bool kFetch>
void add_rows(const Arrays& arrays, Range rows, Range channels, float* sums) {
  const std::size_t width = channels.end - channels.begin;
  for (std::size_t row = rows.begin; row < rows.end; row += kRowsAtOnce) {
    for (std::size_t c = 0; c < width; c += kVector) {
      __m256 sum = _mm256_loadu_ps(sums + c);
      __m256 squares = _mm256_loadu_ps(sums + width + c);
      for (std::size_t k = 0; k < kRowsAtOnce; ++k) {
        const float* const x = arrays.from(row + k, channels.begin + c);
        if constexpr (kFetch)
          _mm_prefetch(reinterpret_cast<const char*>(x + kAhead * arrays.shape.channels), _MM_HINT_T0);
        const __m256 value = _mm256_loadu_ps(x);
        sum = _mm256_add_ps(sum, value);
        squares = _mm256_add_ps(squares, _mm256_mul_ps(value, value));
      }
      _mm256_storeu_ps(sums + c, sum);
      _mm256_storeu_ps(sums + width + c, squares);
    }
  }
}

// y = x * sums[c] + sums[width + c], from the last block of rows to the first.
template <bool kStream>
void map(const Arrays& arrays, Range rows, Range channels, const float* sums) {
  const std::size_t width = channels.end - channels.begin;
  for (std::size_t end = rows.end; end > rows.begin; end -= kBlock) {
    for (std::size_t row = end - kBlock; row < end; ++row) {
      for (std::size_t c = 0; c < width; c += kVector) {
        const __m256 product =
            _mm256_mul_ps(_mm256_loadu_ps(arrays.from(row, channels.begin + c)), _mm256_loadu_ps(sums + c));
        const __m256 value = _mm256_add_ps(product, _mm256_loadu_ps(sums + width + c));
        if constexpr (kStream) {
          _mm256_stream_ps(arrays.to(row, channels.begin + c), value);
        } else {
          _mm256_storeu_ps(arrays.to(row, channels.begin + c), value);
        }
      }
    }
  }
  _mm_sfence();
}

class Batch {
 public:
  explicit Batch(Shape shape) : arrays_(shape), sums_(kThreads, std::vector<float>(2 * shape.channels)) {
    const Range all{0, shape.channels};
    add("onepass", [this] { forward(); });
    add("two passes", [this, all] {
      sum_all();
      each_half([this, all](Range rows, float* sums) { map<true>(arrays_, rows, all, sums); });
    });
    add("plain stores", [this, all] {
      sum_all();
      each_half([this, all](Range rows, float* sums) { map<false>(arrays_, rows, all, sums); });
    });
    for (const std::size_t width : {16, 32, 64, 128, 256}) {
      if (width * kThreads > shape.channels) continue;
      const std::string name = "groups of " + std::to_string(width);
      add(name, [this, width] { in_groups<false>(width); });
      add(name + ", fetched", [this, width] { in_groups<true>(width); });
    }
    add("map alone",
        [this, all] { each_half([this, all](Range rows, float* sums) { map<true>(arrays_, rows, all, sums); }); });
  }

  void print(std::size_t rounds) {
    std::string title = "(";  // piecewise: GCC 12 takes the sum for an overlapping copy (GCC bug 105651)
    title += std::to_string(arrays_.shape.rows) + ", " + std::to_string(arrays_.shape.channels) + ")";
    contest_.print(title, "two passes", rounds);
  }

 private:
  void add(std::string name, std::function<void()> run) {
    contest_.add(std::move(name), [this, run = std::move(run)] {
      for (std::vector<float>& sums : sums_) std::ranges::fill(sums, 0.0F);
      run();
    });
  }

  void each_half(const std::function<void(Range, float*)>& body) {
    on_threads([&](std::size_t thread) { body(part_of(arrays_.shape.rows, kBlock, thread), sums_[thread].data()); });
  }

  void sum_all() {
    each_half([this](Range rows, float* sums) { add_rows<false>(arrays_, rows, {0, arrays_.shape.channels}, sums); });
  }

  template <bool kFetch>
  void in_groups(std::size_t width) {
    on_threads([&](std::size_t thread) {
      const Range own = part_of(arrays_.shape.channels, width, thread);
      for (std::size_t c = own.begin; c < own.end; c += width) {
        const Range channels{c, std::min(c + width, own.end)};
        add_rows<kFetch>(arrays_, {0, arrays_.shape.rows}, channels, sums_[thread].data());
        map<true>(arrays_, {0, arrays_.shape.rows}, channels, sums_[thread].data());
      }
    });
  }

  void forward() {
    const std::size_t channels = arrays_.shape.channels;
    statistics_.resize(2 * channels);
    onepass::batchnorm::ForwardCall call;
    call.outer = arrays_.shape.rows;
    call.channels = channels;
    call.inner = 1;
    call.x = arrays_.x.data();
    call.y = arrays_.y.data();
    call.eps = 1e-5;
    call.training = true;
    call.mean = statistics_.data();
    call.invstd = statistics_.data() + channels;
    onepass::batchnorm::forward(call, kThreads);
  }

  Arrays arrays_;
  std::vector<std::vector<float>> sums_;
  std::vector<double> statistics_;
  onepass::bench::Contest contest_;
};

}  // namespace

int main(int argc, char** argv) {
  const bool quick = onepass::bench::read_arguments(argc, argv);
  // The batches of bench/peers/batchnorm.py, and one without an area.
  std::vector<Shape> shapes = {{100352, 64}, {50176, 256}, {401408, 64}, {25088, 512}, {6272, 2048}, {4096, 1024}};
  if (quick) shapes = {{256, 64}, {128, 512}};
  for (const Shape& shape : shapes) Batch(shape).print(quick ? 3 : 31);
  return 0;
}
