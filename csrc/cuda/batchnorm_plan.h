// How a batch is divided among the threads of a device. Plain C++, tested on the host.
//
// The unit is a warp's *tile*: `depth` vectors for each of its 32 threads, of `lanes` elements each. A thread sums its
// elements in the compute type, a warp its threads in float64, and tiles are added in float64 (batchnorm_sums.cuh). All
// of this follows from shape and dtype alone, and with it the order of every sum. Which block takes which tile, and
// whether the elements stay on the chip between the sums and the map, has no say in the bits.
//
//   Runs (inner > 1): a *slab* is a channel. Its elements, run behind run, are the vectors 0, 1, ...; the threads of a
//   warp take 32 that follow upon each other, then the next 32.
//   Columns (inner = 1): a slab is some neighbouring channels, 64 bytes of a row. `width` threads share a row, and a
//   thread keeps to its columns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "batchnorm/plan.h"
#include "core/dtype.h"
#include "core/target.h"
#include "cuda/batchnorm.h"

namespace onepass::cuda {

inline constexpr unsigned kWarp = 32;            // threads
inline constexpr unsigned kLeastDepth = 8;       // vectors of a thread
inline constexpr std::size_t kTileBytes = 8192;  // of runs, at most: 16 vectors of 16 bytes for each thread
inline constexpr std::size_t kFewTiles = 8;      // a shorter channel has smaller tiles: a block has 8 warps
inline constexpr unsigned kMostDepth = 128;      // of columns: 12 bytes of sums for each KiB of bfloat16
inline constexpr std::size_t kManyTiles = 64;    // of columns, likewise: a cluster has 64 warps
inline constexpr std::size_t kAllTiles = 2048;   // of all slabs: 16 warps for each of 128 processors
inline constexpr std::size_t kRowBytes = 64;     // of a slab of columns: two sectors of a cache line

struct BatchnormTiling {
  std::size_t outer, channels, inner;
  bool columns;
  unsigned lanes;            // elements of a vector
  unsigned width;            // threads of a warp that lie side by side; runs: 32
  unsigned group;            // channels of a slab
  unsigned depth;            // vectors of a thread in a tile, at least kLeastDepth
  std::size_t vectors;       // of a slab, in one column
  std::size_t slabs, tiles;  // tiles: of each slab
  // From a thread's vector to its next one. A run of `run` vectors ends behind the last of them.
  std::size_t step, step_elements, step_within, run, wrap;

  HD constexpr std::size_t total() const { return slabs * tiles; }
};

// At least one element. A shape with one channel is one run.
constexpr BatchnormTiling tiling_of(const BatchnormShape& shape) {
  const std::size_t itemsize = info(shape.dtype).itemsize;
  BatchnormTiling t{};
  t.outer = shape.outer;
  t.channels = shape.channels;
  t.inner = shape.inner;
  if (t.channels == 1) {
    t.inner *= t.outer;
    t.outer = 1;
  }
  t.columns = t.inner == 1 && t.channels > 1;
  const std::size_t side = t.columns ? t.channels : t.inner;
  t.lanes = static_cast<unsigned>(16 / itemsize);
  if (itemsize == 2 && side % t.lanes != 0) t.lanes = 4;  // (14, 14): 196 = 4 * 49
  if (side % t.lanes != 0) t.lanes = 1;
  if (t.columns) {
    t.width = static_cast<unsigned>(kRowBytes / (t.lanes * itemsize));
    while (t.width > 1 && t.width / 2 * t.lanes >= t.channels) t.width /= 2;
    t.group = t.width * t.lanes;
    t.slabs = batchnorm::divide_up(t.channels, t.group);
    t.vectors = t.outer;
    t.step = kWarp / t.width;
    t.step_elements = t.step * t.channels;
    t.step_within = 0;
    t.run = 1;
    t.wrap = 0;
    t.depth = kMostDepth;
  } else {
    t.width = kWarp;
    t.group = 1;
    t.slabs = t.channels;
    t.run = t.inner / t.lanes;
    t.vectors = t.outer * t.run;
    t.step = kWarp;
    t.step_within = kWarp % t.run;
    t.wrap = (t.channels - 1) * t.inner;
    t.step_elements = kWarp / t.run * t.channels * t.inner + t.step_within * t.lanes;
    t.depth = static_cast<unsigned>(kTileBytes / (kWarp * t.lanes * itemsize));
  }
  const std::size_t want = t.columns ? kManyTiles : kFewTiles;
  const auto tiles = [&t] { return batchnorm::divide_up(t.vectors, t.depth * t.step); };
  while (t.depth > kLeastDepth && (tiles() < want || tiles() < batchnorm::divide_up(kAllTiles, t.slabs))) t.depth /= 2;
  t.tiles = tiles();
  return t;
}

namespace {

// Vectors of a thread, its first ones, that give the center of its sums.
HD constexpr unsigned sample_of(unsigned lanes) { return lanes == 8 ? 4 : 8; }

// Of 64 bits, whose division takes five times as long where it is not needed.
HD std::size_t quotient_of(std::size_t a, std::size_t b) {
  if (((a | b) >> 32U) == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  return a / b;
}

// Which tile of which slab the k-th of all is. The warps of a block lie side by side in memory.
struct TileIndex {
  std::size_t slab, tile;
  HD TileIndex(const BatchnormTiling& t, std::size_t k) {
    const std::size_t fast = t.columns ? t.slabs : t.tiles;
    const std::size_t slow = quotient_of(k, fast);
    slab = t.columns ? k - slow * fast : slow;
    tile = t.columns ? slow : k - slow * fast;
  }
};

// The vectors of one thread in one tile: `count` of them, of which `element` is the first element of the current one.
struct Walk {
  unsigned count = 0;
  std::size_t element = 0;

  HD Walk(const BatchnormTiling& t, std::size_t slab, std::size_t tile, unsigned thread) {
    const unsigned column = thread % t.width;
    const std::size_t first = tile * t.depth * t.step + (t.columns ? thread / t.width : thread);
    if (first >= t.vectors) return;
    if (t.columns) {
      const std::size_t channel = slab * t.group + column * t.lanes;
      if (channel >= t.channels) return;
      element = first * t.channels + channel;
    } else {
      const std::size_t run = quotient_of(first, t.run);
      within_ = first - run * t.run;
      element = (run * t.channels + slab) * t.inner + within_ * t.lanes;
    }
    const std::size_t left = t.vectors - first;
    count =
        left > (t.depth - 1) * t.step
            ? t.depth
            : static_cast<unsigned>((static_cast<std::uint32_t>(left) - 1) / static_cast<std::uint32_t>(t.step)) + 1;
  }

  HD void next(const BatchnormTiling& t) {
    element += t.step_elements;
    within_ += t.step_within;
    if (within_ >= t.run) {
      within_ -= t.run;
      element += t.wrap;
    }
  }

 private:
  std::size_t within_ = 0;  // vectors of the run before this one
};

}  // namespace

// --- Which way a training pass takes ---------------------------------------------------------------------------------

struct BatchnormDevice {
  std::size_t shared;  // bytes that a block may use
  std::size_t shared_of_processor;
  unsigned cluster;  // blocks; 1: none
  std::size_t processors;
};

inline constexpr std::size_t kSmallBatch = std::size_t{4} << 20;  // bytes: launches take longer than the map
inline constexpr std::size_t kMostBlocks = 0x7FFFFFFF;            // of a grid
inline constexpr std::size_t kReserved = 1024;                    // bytes of shared memory, of each block

// Resident: what has been summed stays in shared memory until it is mapped; a slab belongs to a block or a cluster.
struct BatchnormPlan {
  unsigned cluster = 0;   // blocks of a slab; 0: not resident
  std::size_t tiles = 0;  // of a block
  unsigned warps = 0;     // of a block
  std::size_t shared = 0;
};

// Bytes of shared memory of a block with that many tiles, for `streams` arrays. Beside the elements: the sums of each
// tile, and up to 5 constants of each channel.
constexpr std::size_t resident_bytes(const BatchnormTiling& t, std::size_t itemsize, std::size_t streams,
                                     std::size_t tiles) {
  const std::size_t slots = streams * t.depth * kWarp * t.lanes * itemsize;
  return tiles * (slots + t.group * 2 * sizeof(double)) + t.group * 5 * sizeof(double);
}

// `streams`: arrays whose elements are needed twice.
constexpr BatchnormPlan plan_of(const BatchnormTiling& t, std::size_t itemsize, std::size_t streams,
                                const BatchnormDevice& device) {
  BatchnormPlan plan;
  // Two blocks of a processor, where that can be: while one waits for its sums the other one moves memory.
  const std::size_t half = device.shared_of_processor / 2 > kReserved ? device.shared_of_processor / 2 - kReserved : 0;
  for (const std::size_t room : {half < device.shared ? half : device.shared, device.shared}) {
    for (unsigned cluster = 1; cluster <= device.cluster && plan.cluster == 0; cluster *= 2) {
      if (resident_bytes(t, itemsize, streams, batchnorm::divide_up(t.tiles, cluster)) <= room) plan.cluster = cluster;
    }
  }
  if (plan.cluster == 0) return plan;
  // More blocks where there are few channels, as long as each warp has something to do.
  while (plan.cluster * 2 <= device.cluster && t.slabs * plan.cluster < 2 * device.processors &&
         batchnorm::divide_up(t.tiles, plan.cluster * 2) >= kFewTiles) {
    plan.cluster *= 2;
  }
  // A part of the processors reaches less than all of the memory's rate: then reading twice with all is faster.
  const std::size_t bytes = t.outer * t.channels * t.inner * itemsize * streams;
  const bool filled = 5 * t.slabs * plan.cluster >= 3 * device.processors;
  if ((!filled && bytes > kSmallBatch) || t.slabs > kMostBlocks / plan.cluster) return {};
  plan.tiles = batchnorm::divide_up(t.tiles, plan.cluster);
  plan.shared = resident_bytes(t, itemsize, streams, plan.tiles);
  plan.warps = static_cast<unsigned>(plan.tiles < kFewTiles ? plan.tiles : kFewTiles);
  if (plan.shared > half && plan.tiles >= 2 * kFewTiles) plan.warps = 2 * kFewTiles;  // alone on its processor
  return plan;
}

}  // namespace onepass::cuda
