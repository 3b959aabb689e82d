// How batch normalization divides its work on a device (cuda/batchnorm_plan.h), tried on the host: over shapes of every
// kind each element is visited once and only once, whole vectors belong to one channel or lie side by side, and a plan
// keeps to what a device offers. Given `table`, it prints the ways that the layers of a ResNet-50 take instead.
#include "cuda/batchnorm_plan.h"

#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

namespace {

using namespace onepass;
using namespace onepass::cuda;

std::size_t failures = 0;

void check(bool holds, const BatchnormShape& shape, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("%s: %s (%zu, %zu, %zu)\n", what, info(shape.dtype).name, shape.outer, shape.channels, shape.inner);
}

constexpr BatchnormDevice kHopper{227 << 10, 228 << 10, 8, 132};
constexpr BatchnormDevice kAmpere{163 << 10, 164 << 10, 1, 108};
constexpr BatchnormDevice kSmall{99 << 10, 100 << 10, 1, 20};
constexpr BatchnormDevice kTiny{3000, 100 << 10, 8, 2};
constexpr BatchnormDevice kNothing{0, 0, 1, 1};

std::size_t channel_of(const BatchnormTiling& t, std::size_t element) { return element / t.inner % t.channels; }

void try_plans(const BatchnormShape& shape, const BatchnormTiling& t) {
  const std::size_t itemsize = info(shape.dtype).itemsize;
  for (const BatchnormDevice& device : {kHopper, kAmpere, kSmall, kTiny, kNothing}) {
    for (const std::size_t streams : {1, 2}) {
      const BatchnormPlan plan = plan_of(t, itemsize, streams, device);
      if (plan.cluster == 0) continue;
      check(plan.cluster <= device.cluster && (plan.cluster & (plan.cluster - 1)) == 0, shape, "a cluster's size");
      check(plan.tiles * plan.cluster >= t.tiles && plan.tiles > 0, shape, "tiles that no block takes");
      check(plan.shared <= device.shared, shape, "more shared memory than there is");
      check(plan.shared >= plan.tiles * t.depth * kWarp * t.lanes * itemsize * streams, shape, "less than it needs");
      check(plan.warps >= 1 && plan.warps <= 16, shape, "a block's warps");
      check(t.slabs * plan.cluster <= kMostBlocks, shape, "a grid's blocks");
    }
  }
}

void visit_all(const BatchnormShape& shape) {
  const BatchnormTiling t = tiling_of(shape);
  check(t.outer * t.channels * t.inner == shape.count(), shape, "another number of elements");
  check(t.depth >= kLeastDepth && t.depth >= sample_of(t.lanes) && t.group <= kWarp, shape,
        "a tile's depth, or a slab's channels");
  std::vector<unsigned char> visits(shape.count(), 0);
  std::vector<unsigned char> tiles(t.total(), 0);
  for (std::size_t k = 0; k < t.total(); ++k) {
    const TileIndex at(t, k);
    check(at.slab < t.slabs && at.tile < t.tiles, shape, "no such tile");
    ++tiles[at.slab * t.tiles + at.tile];
    for (unsigned thread = 0; thread < kWarp; ++thread) {
      Walk walk(t, at.slab, at.tile, thread);
      check(walk.count <= t.depth, shape, "more vectors than a tile is deep");
      for (unsigned v = 0; v < walk.count; ++v, walk.next(t)) {
        check(walk.element % t.lanes == 0, shape, "a vector that is not aligned");
        for (unsigned lane = 0; lane < t.lanes; ++lane) {
          const std::size_t element = walk.element + lane;
          if (element >= shape.count()) {
            check(false, shape, "an element behind the end");
            return;
          }
          ++visits[element];
          const std::size_t own = t.columns ? at.slab * t.group + thread % t.width * t.lanes + lane : at.slab;
          check(channel_of(t, element) == own, shape, "an element of another channel");
        }
      }
    }
  }
  for (const unsigned char count : visits) check(count == 1, shape, "an element that is not visited once");
  for (const unsigned char count : tiles) check(count == 1, shape, "a tile that is not visited once");
  try_plans(shape, t);
}

// Where counts and products need more than 32 bits: the first and the last vectors, against plain arithmetic.
void visit_ends(const BatchnormShape& shape) {
  const BatchnormTiling t = tiling_of(shape);
  for (const std::size_t tile : {std::size_t{0}, t.tiles / 2, t.tiles - 1}) {
    for (const std::size_t slab : {std::size_t{0}, t.slabs - 1}) {
      for (unsigned thread = 0; thread < kWarp; ++thread) {
        Walk walk(t, slab, tile, thread);
        unsigned count = 0;
        for (unsigned v = 0; v < t.depth; ++v) {
          const std::size_t vector = tile * t.depth * t.step + v * t.step + (t.columns ? thread / t.width : thread);
          const std::size_t channel = t.columns ? slab * t.group + thread % t.width * t.lanes : slab;
          if (vector >= t.vectors || channel >= t.channels) continue;
          ++count;
          const std::size_t expected =
              t.columns ? vector * t.channels + channel
                        : (vector / t.run * t.channels + channel) * t.inner + vector % t.run * t.lanes;
          check(v < walk.count && walk.element == expected, shape, "an element of a large batch");
          walk.next(t);
        }
        check(walk.count == count, shape, "vectors of a large batch");
      }
    }
  }
  check(TileIndex(t, t.total() - 1).tile == t.tiles - 1, shape, "the last tile of a large batch");
  try_plans(shape, t);
}

BatchnormShape shape_of(DType dtype, std::size_t outer, std::size_t channels, std::size_t inner) {
  BatchnormShape shape;
  shape.dtype = dtype;
  shape.outer = outer;
  shape.channels = channels;
  shape.inner = inner;
  return shape;
}

constexpr DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

// Bytes between the chip and its memory, in units of x: a part of the second read is found in the cache.
void print_table() {
  struct Layer {
    std::size_t channels, side;
  };
  std::printf("C, side, N | dtype | layout | forward: blocks x cluster x KiB, reads of x | backward: the same\n");
  for (const Layer layer : {Layer{64, 112}, {64, 56}, {256, 56}, {512, 28}, {1024, 14}, {2048, 7}}) {
    for (const std::size_t batch : {32, 64, 128, 256}) {
      for (const DType dtype : {DType::float32, DType::bfloat16}) {
        for (const bool last : {false, true}) {
          const std::size_t plane = layer.side * layer.side;
          const BatchnormShape shape =
              last ? shape_of(dtype, batch * plane, layer.channels, 1) : shape_of(dtype, batch, layer.channels, plane);
          const BatchnormTiling t = tiling_of(shape);
          std::printf("%zu, %zu, %zu | %s | %s", layer.channels, layer.side, batch, info(dtype).name,
                      last ? "NHWC" : "NCHW");
          for (const std::size_t streams : {1, 2}) {
            const BatchnormPlan plan = plan_of(t, info(dtype).itemsize, streams, kHopper);
            if (plan.cluster == 0) {
              std::printf(" | -, 2");
            } else {
              std::printf(" | %zu x %u x %zu, 1", t.slabs, plan.cluster, plan.shared >> 10);
            }
          }
          std::printf(" | %.0f MB, %zu tiles\n", 1e-6 * static_cast<double>(shape.count() * info(dtype).itemsize),
                      t.tiles);
        }
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "table") == 0) {
    print_table();
    return 0;
  }
  for (const DType dtype : kDTypes) {
    for (const std::size_t outer : {1, 2, 3, 31, 64, 65}) {
      for (const std::size_t channels : {1, 2, 3, 5, 8, 17, 24, 64, 100}) {
        for (const std::size_t inner : {1, 2, 3, 4, 7, 8, 31, 32, 33, 49, 196, 784}) {
          visit_all(shape_of(dtype, outer, channels, inner));
        }
      }
    }
    visit_all(shape_of(dtype, 1, 1, 1));
    visit_all(shape_of(dtype, 3, 2, 20011));
    visit_all(shape_of(dtype, 2, 3, 16384));
    visit_all(shape_of(dtype, 70001, 3, 1));
    visit_all(shape_of(dtype, 33000, 40, 1));
    visit_all(shape_of(dtype, 3000, 1, 7));
    visit_ends(shape_of(dtype, 3, 5, (std::size_t{1} << 33) + 7));
    visit_ends(shape_of(dtype, (std::size_t{1} << 33) + 5, 3, 8));
    visit_ends(shape_of(dtype, (std::size_t{1} << 33) + 5, 48, 1));
    visit_ends(shape_of(dtype, 3, (std::size_t{1} << 33) + 16, 1));
    visit_ends(shape_of(dtype, 3, (std::size_t{1} << 33) + 1, 5));
    visit_ends(shape_of(dtype, 1, 1, (std::size_t{1} << 40) + 1));
  }
  std::printf("%zu failures\n", failures);
  return failures == 0 ? 0 : 1;
}
