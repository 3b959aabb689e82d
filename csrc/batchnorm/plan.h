// How the elements of a batch are divided for the sums over a channel. It follows from the shape alone, and with it the
// order of every sum and its bits: threads, caches and instruction sets have no say.
//
// A C-contiguous array whose channel axis lies anywhere is (outer, channels, inner). A channel owns `outer` runs of
// `inner` elements.
//
//   Long runs are summed along the run: element i goes to virtual lane i % kLanes.
//   Short runs are summed across: each column of the matrix (rows, channels * inner) for itself, down the rows, then
//   the columns of a channel. Where a row is short, `fold` of them are taken as one long one.
//
// Either way a *block* is summed in the compute type and blocks are merged in float64, in order: the blocks of a
// *chunk* first, then the chunks.
#pragma once

#include <cstddef>

#include "core/target.h"

namespace onepass::batchnorm {

inline constexpr std::size_t kLanes = 32;         // two vectors of AVX-512, four of AVX2: enough to hide an addition
inline constexpr std::size_t kLongRun = 256;      // elements
inline constexpr std::size_t kBlockRun = 4096;    // elements of a block of long runs: 16 KiB of floats
inline constexpr std::size_t kBlockRows = 64;     // rows of a block of short runs
inline constexpr std::size_t kSampleRun = 512;    // elements of a block of long runs that are looked at before its sums
inline constexpr std::size_t kSampleRows = 8;     // the same for short runs
inline constexpr std::size_t kRowColumns = 1024;  // short rows are folded up to this
inline constexpr std::size_t kColumnGranule = 16;  // and to a multiple of this: 64 bytes of floats
inline constexpr std::size_t kBlocksOfChunk = 4;   // at least: chunks are merged one by one
inline constexpr std::size_t kMaxChunks = 128;

// The most columns that are worked on together, as a tile. A row that is wider is cut. Tiles decide speed and never
// bits. (6272, 2048) as one tile and not as two: 11 % less for the forward pass in two threads, 29 % in one.
inline constexpr std::size_t kTileBytes = 8192;

struct Plan {
  std::size_t outer, channels, inner;
  bool long_runs;
  std::size_t runs_per_block;  // long runs; 1 where a run is cut into pieces
  std::size_t pieces;          // long runs: blocks of one run
  std::size_t fold;            // short runs: rows that are taken as one
  std::size_t rows;            // short runs, folded; the last one may be shorter
  std::size_t tile;            // channels that are worked on together
  std::size_t blocks, chunks;  // of each channel
};

struct Range {
  std::size_t begin, end;
  HD constexpr std::size_t size() const { return end - begin; }
};

// The functions are in an unnamed namespace, like what stands in rules/: kernel units must export their tables alone.
namespace {

HD constexpr std::size_t at_most(std::size_t a, std::size_t b) { return a < b ? a : b; }
HD constexpr std::size_t at_least(std::size_t a, std::size_t b) { return a < b ? b : a; }
HD constexpr std::size_t divide_up(std::size_t a, std::size_t b) { return a / b + (a % b != 0 ? 1 : 0); }

// All at least 1. `itemsize`: bytes of a value in the compute type.
constexpr Plan make_plan(std::size_t outer, std::size_t channels, std::size_t inner, std::size_t itemsize) {
  if (channels == 1) {  // one run
    inner *= outer;
    outer = 1;
  }
  Plan plan{outer, channels, inner, inner >= kLongRun, 0, 0, 0, 0, 1, 0, 0};
  if (plan.long_runs) {
    plan.runs_per_block = at_least(kBlockRun / inner, 1);
    plan.pieces = divide_up(inner, kBlockRun);
    plan.blocks = plan.pieces > 1 ? outer * plan.pieces : divide_up(outer, plan.runs_per_block);
  } else {
    const std::size_t width = channels * inner;
    plan.fold = at_least(kRowColumns / width, 1);
    // Rows of whole cache lines, where some number of rows makes one.
    for (std::size_t fold = plan.fold; fold > 0; --fold) {
      if (fold * width % kColumnGranule == 0) {
        plan.fold = fold;
        break;
      }
    }
    plan.rows = divide_up(outer, plan.fold);
    plan.tile = width * itemsize <= kTileBytes ? channels : at_least(kRowColumns / inner, 1);
    plan.blocks = divide_up(plan.rows, kBlockRows);
  }
  plan.chunks = at_most(divide_up(plan.blocks, kBlocksOfChunk), kMaxChunks);
  return plan;
}

// The k-th of `parts` nearly equal parts of [0, count).
HD constexpr Range part_of(std::size_t count, std::size_t k, std::size_t parts) {
  const std::size_t each = count / parts;
  const std::size_t rest = count % parts;
  const std::size_t begin = k * each + at_most(k, rest);
  return {begin, begin + each + (k < rest ? 1 : 0)};
}

HD constexpr Range blocks_of_chunk(const Plan& plan, std::size_t chunk) {
  return part_of(plan.blocks, chunk, plan.chunks);
}

// Rows of short runs in a range of blocks, and the elements of each channel in a range of rows.
HD constexpr Range rows_in(const Plan& plan, Range blocks) {
  return {blocks.begin * kBlockRows, at_most(blocks.end * kBlockRows, plan.rows)};
}
HD constexpr std::size_t count_in_rows(const Plan& plan, Range rows) {
  return (at_most(rows.end * plan.fold, plan.outer) - at_most(rows.begin * plan.fold, plan.outer)) * plan.inner;
}

// Elements of each channel before a block, and in a range of blocks.
HD constexpr std::size_t count_before(const Plan& plan, std::size_t block) {
  if (!plan.long_runs) return at_most(block * kBlockRows * plan.fold, plan.outer) * plan.inner;
  if (plan.pieces <= 1) return at_most(block * plan.runs_per_block, plan.outer) * plan.inner;
  return block / plan.pieces * plan.inner + at_most(block % plan.pieces * kBlockRun, plan.inner);
}
HD constexpr std::size_t count_in(const Plan& plan, Range blocks) {
  return count_before(plan, blocks.end) - count_before(plan, blocks.begin);
}

}  // namespace
}  // namespace onepass::batchnorm
