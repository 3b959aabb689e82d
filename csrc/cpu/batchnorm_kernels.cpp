// The loops of batch normalization, for every dtype, compiled once per instruction set like kernels.cpp. The one symbol
// that leaves this unit is its table.
#include ONEPASS_SIMD_HEADER

#include <cfloat>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "batchnorm/formulas.h"
#include "batchnorm/plan.h"
#include "batchnorm/statistics.h"
#include "core/batchnorm_kernel.h"

#if defined(__FAST_MATH__)
#error "fast-math computes other bits"
#endif
static_assert(FLT_EVAL_METHOD == 0, "intermediate results must be of their operands' type (i686: -msse2 -mfpmath=sse)");

namespace onepass::batchnorm {
namespace {

// --- How a vector is loaded, stored and kept -------------------------------------------------------------------------

template <class V>
struct Whole {
  static constexpr std::size_t count = V::lanes;
  template <class D>
  HD V load(const std::byte* from) const {
    return V::template load<D>(from);
  }
  template <class D>
  HD void store(V value, std::byte* to) const {
    value.template store<D>(to);
  }
  HD V keep(V now, V /*before*/) const { return now; }
};

template <class V>
struct Streamed : Whole<V> {
  template <class D>
  HD void store(V value, std::byte* to) const {
    value.template stream<D>(to);
  }
};

template <class V>
struct Part {
  std::size_t count;
  template <class D>
  HD V load(const std::byte* from) const {
    return V::template load_part<D>(from, count);
  }
  template <class D>
  HD void store(V value, std::byte* to) const {
    value.template store_part<D>(to, count);
  }
  HD V keep(V now, V before) const { return first(count, now, before); }
};

// Calls body(index of the first element, access) for vectors from `begin` to `end`, the last one perhaps a part.
template <class V, template <class> class Access, class Body>
HD void for_vectors(std::size_t begin, std::size_t end, Body body) {
  std::size_t i = begin;
  for (; i + V::lanes <= end; i += V::lanes) body(i, Access<V>{});
  if (i < end) body(i, Part<V>{end - i});
}

// The same for a map that writes to `to`: stores that bypass the cache must be aligned.
template <class D, bool kStream, class Body>
HD void map_vectors(const std::byte* to, std::size_t count, Body body) {
  using V = Wide<typename D::Compute>;
  if constexpr (!kStream) {
    for_vectors<V, Whole>(0, count, body);
  } else {
    constexpr std::size_t size = sizeof(typename D::Storage);
    constexpr std::size_t alignment = V::lanes * size;
    const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(to) % alignment;
    const std::size_t head = at_most((alignment - misaligned) % alignment / size, count);
    if (head > 0) body(0, Part<V>{head});
    for_vectors<V, Streamed>(head, count, body);
  }
}

// --- Sums ------------------------------------------------------------------------------------------------------------

// What an element contributes to N sums.
template <class V, std::size_t N>
struct Terms {
  V of[N];
};

// N sums over runs: element i of a run goes to lane i % kLanes.
template <class S, std::size_t N>
struct Lanes {
  using V = Wide<S>;
  static constexpr std::size_t vectors = kLanes / V::lanes;
  V acc[N][vectors];

  HD Lanes() {
    for (std::size_t n = 0; n < N; ++n) {
      for (std::size_t v = 0; v < vectors; ++v) acc[n][v] = V(S(0));
    }
  }

  // `terms`: from (index within the run, access) to the contributions of a vector of elements.
  template <class TermsAt>
  HD void add_run(std::size_t count, TermsAt terms) {
    const auto add = [&](std::size_t v, std::size_t i, auto access) {
      const Terms<V, N> t = terms(i, access);
      for (std::size_t n = 0; n < N; ++n) acc[n][v] = access.keep(acc[n][v] + t.of[n], acc[n][v]);
    };
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (std::size_t v = 0; v < vectors; ++v) add(v, i + v * V::lanes, Whole<V>{});
    }
    for (std::size_t v = 0; v < vectors && i < count; ++v, i += V::lanes) {
      if (i + V::lanes <= count) {
        add(v, i, Whole<V>{});
      } else {
        add(v, i, Part<V>{count - i});
      }
    }
  }

  HD S total(std::size_t n) const {
    S lane[kLanes];
    __builtin_memcpy(lane, acc[n], sizeof lane);
    for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
      for (std::size_t k = 0; k < half; ++k) lane[k] = lane[k] + lane[k + half];
    }
    return lane[0];
  }
};

// --- Where things lie ------------------------------------------------------------------------------------------------

template <class D>
HD const std::byte* at(const void* base, std::size_t element) {
  return static_cast<const std::byte*>(base) + element * sizeof(typename D::Storage);
}

template <class D>
HD std::byte* at(void* base, std::size_t element) {
  return static_cast<std::byte*>(base) + element * sizeof(typename D::Storage);
}

template <class D>
HD typename D::Compute value_at(const void* base, std::size_t element) {
  return OneLane<typename D::Compute>::template load<D>(at<D>(base, element)).value;
}

// Asks for the cache line of an element that is needed soon. Blocks are often far apart, and the hardware, which
// follows consecutive lines, would begin anew with each.
template <class D, class V>
HD void prefetch(const void* base, std::size_t element) {
  if constexpr (V::lanes > 1) __builtin_prefetch(at<D>(base, element), 0, 2);
}

template <class S>
HD const S* values(const void* per_channel) {
  return static_cast<const S*>(per_channel);
}

HD std::size_t first_of_block(const Plan& plan, std::size_t channel, std::size_t block) {
  const std::size_t run = plan.pieces > 1 ? block / plan.pieces : block * plan.runs_per_block;
  const std::size_t within = plan.pieces > 1 ? block % plan.pieces * kBlockRun : 0;
  return (run * plan.channels + channel) * plan.inner + within;
}

// Elements of the first contiguous piece of one channel in a block of long runs.
HD std::size_t first_segment(const Plan& plan, std::size_t block) {
  return plan.pieces > 1 ? at_most(kBlockRun, plan.inner - block % plan.pieces * kBlockRun) : plan.inner;
}

// From the elements of a block of long runs to those that will be summed next. They lie alike, but at the end.
HD std::size_t next_block_of_runs(const Plan& plan, std::size_t channel, std::size_t block) {
  const std::size_t here = first_of_block(plan, channel, block);
  if (block + 1 < plan.blocks) return first_of_block(plan, channel, block + 1) - here;
  return channel + 1 < plan.channels ? first_of_block(plan, channel + 1, 0) - here : 0;
}

// Calls body(first element, elements) for the contiguous pieces of one channel in a block of long runs.
template <class Body>
HD void for_segments(const Plan& plan, std::size_t channel, std::size_t block, Body body) {
  if (plan.pieces > 1) {
    body(first_of_block(plan, channel, block), first_segment(plan, block));
    return;
  }
  const std::size_t first_run = block * plan.runs_per_block;
  const std::size_t end_run = at_most(first_run + plan.runs_per_block, plan.outer);
  for (std::size_t run = first_run; run < end_run; ++run)
    body((run * plan.channels + channel) * plan.inner, plan.inner);
}

// --- Short runs: the columns of a tile -------------------------------------------------------------------------------

template <class S>
using Plain = std::conditional_t<std::is_same_v<S, float>, Float32, Float64>;  // S as it lies in memory

// The rows of one tile, some of them, as pieces of consecutive elements. Where a tile is all of a row, rows follow upon
// each other without a gap: then the pieces begin on cache lines (of the array that `aligned` points to), and column 0
// is somewhere within each: `turn` columns come before the first piece, and at the end of the others.
struct Tile {
  std::size_t columns;  // of a whole row
  std::size_t stride;   // elements from piece to piece
  std::size_t begin;    // the first element of all
  std::size_t turn;     // elements before the first whole piece
  std::size_t pieces;   // behind those, the last one perhaps shorter
  std::size_t last;     // elements of the last piece

  template <class D>
  HD static Tile of(const Plan& plan, Range channels, Range rows, const void* aligned) {
    constexpr std::size_t size = sizeof(typename D::Storage);
    const std::size_t columns = channels.size() * plan.inner * plan.fold;
    const std::size_t stride = plan.channels * plan.inner * plan.fold;
    const std::size_t begin = channels.begin * plan.inner + rows.begin * stride;
    const std::size_t last_row =
        channels.size() * plan.inner * at_most(plan.fold, plan.outer - (rows.end - 1) * plan.fold);
    Tile tile{columns, stride, begin, 0, rows.size(), last_row};
    if (columns != stride) return tile;
    const std::size_t count = (rows.size() - 1) * columns + last_row;
    const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(at<D>(aligned, begin)) % kLine;
    if (misaligned % size == 0) tile.turn = at_most((kLine - misaligned) % kLine / size, at_most(columns, count));
    tile.pieces = divide_up(count - tile.turn, columns);
    tile.last = count - tile.turn - (tile.pieces == 0 ? 0 : (tile.pieces - 1) * columns);
    return tile;
  }
  HD std::size_t piece(std::size_t k) const { return begin + turn + k * stride; }
  HD std::size_t length(std::size_t k) const { return k + 1 == pieces ? last : columns; }
  // Where the columns before the first piece are found in a Columns: at the end.
  HD std::size_t turned() const { return columns - turn; }

 private:
  static constexpr std::size_t kLine = 64;
};

template <class S>
constexpr std::size_t kTileColumns = kTileBytes / sizeof(S);
static_assert(kTileColumns<double> >= kRowColumns);

// One value for each column of a tile, in the order of its pieces, and room for a vector behind the last.
template <class S>
struct Columns {
  using V = Wide<S>;
  alignas(64) S values[kTileColumns<S> + V::lanes];

  HD V operator[](std::size_t column) const { return V::template load<Plain<S>>(at<Plain<S>>(values, column)); }
  HD void set(std::size_t column, V value) { value.template store<Plain<S>>(at<Plain<S>>(values, column)); }
  HD void clear(std::size_t columns) {
    for (std::size_t k = 0; k < columns; ++k) values[k] = S(0);
  }
  // `given`: a value for each of the channels.
  HD void expand(const Plan& plan, std::size_t channels, std::size_t turn, const S* given) {
    const std::size_t columns = channels * plan.inner * plan.fold;
    std::size_t column = turn == 0 ? 0 : columns - turn;
    const auto put = [&](S value, std::size_t count) {
      const std::size_t before_end = at_most(count, columns - column);
      for (std::size_t k = 0; k < before_end; ++k) values[column + k] = value;
      for (std::size_t k = before_end; k < count; ++k) values[k - before_end] = value;
      column += count;
      if (column >= columns) column -= columns;
    };
    for (std::size_t f = 0; f < plan.fold; ++f) {
      if (plan.inner == 1) {
        const std::size_t before_end = at_most(channels, columns - column);
        for (std::size_t c = 0; c < before_end; ++c) values[column + c] = given[c];
        for (std::size_t c = before_end; c < channels; ++c) values[c - before_end] = given[c];
        column += channels;
        if (column >= columns) column -= columns;
        continue;
      }
      for (std::size_t c = 0; c < channels; ++c) put(given[c], plan.inner);
    }
  }
  // Column 0 to the front.
  HD void turn_back(std::size_t columns, std::size_t turn) {
    if (turn == 0) return;
    S end[64];
    const std::size_t rest = columns - turn;
    for (std::size_t k = 0; k < turn; ++k) end[k] = values[rest + k];
    __builtin_memmove(values + turn, values, rest * sizeof(S));
    for (std::size_t k = 0; k < turn; ++k) values[k] = end[k];
  }
};

// N sums over the columns of a tile, down its rows.
template <class S, std::size_t N>
struct ColumnSums {
  using V = Wide<S>;
  Columns<S> acc[N];

  // `terms`: from (element, column, access) to the contributions of a vector of elements. `kTogether`: pieces that are
  // added at a time, in their order.
  template <std::size_t kTogether, class TermsAt>
  HD void add(const Tile& tile, TermsAt terms) {
    for (std::size_t n = 0; n < N; ++n) acc[n].clear(tile.columns);
    add_pieces<1>(tile.begin, tile.stride, tile.turned(), tile.turn, terms);
    std::size_t k = 0;
    for (; k + kTogether < tile.pieces; k += kTogether) {
      add_pieces<kTogether>(tile.piece(k), tile.stride, 0, tile.columns, terms);
    }
    for (; k < tile.pieces; ++k) add_pieces<1>(tile.piece(k), tile.stride, 0, tile.length(k), terms);
  }

  // The totals of each channel. Changes the sums.
  HD void totals(const Plan& plan, std::size_t channels, const Tile& tile, std::size_t n, S* total) {
    acc[n].turn_back(tile.columns, tile.turn);
    S* const sums = acc[n].values;
    const std::size_t width = channels * plan.inner;
    for (std::size_t f = 1; f < plan.fold; ++f) {
      for (std::size_t k = 0; k < width; ++k) sums[k] = sums[k] + sums[f * width + k];
    }
    if (plan.inner == 1) {
      for (std::size_t c = 0; c < channels; ++c) total[c] = sums[c];
      return;
    }
    for (std::size_t c = 0; c < channels; ++c) {
      Lanes<S, 1> lanes;
      const std::byte* const from = at<Plain<S>>(static_cast<const void*>(sums), c * plan.inner);
      lanes.add_run(plan.inner, [&](std::size_t i, auto access) {
        return Terms<V, 1>{{access.template load<Plain<S>>(at<Plain<S>>(from, i))}};
      });
      total[c] = lanes.total(0);
    }
  }

 private:
  template <std::size_t kPieces, class TermsAt>
  HD void add_pieces(std::size_t first, std::size_t stride, std::size_t column, std::size_t count, TermsAt terms) {
    for_vectors<V, Whole>(0, count, [&](std::size_t i, auto access) {
      V sum[N];
      for (std::size_t n = 0; n < N; ++n) sum[n] = acc[n][column + i];
      for (std::size_t k = 0; k < kPieces; ++k) {
        const Terms<V, N> t = terms(first + k * stride + i, column + i, access);
        for (std::size_t n = 0; n < N; ++n) sum[n] = sum[n] + t.of[n];
      }
      for (std::size_t n = 0; n < N; ++n) acc[n].set(column + i, access.keep(sum[n], acc[n][column + i]));
    });
  }
};

// --- Values of a channel, for each element of it ---------------------------------------------------------------------

// N values for each channel, in the compute type. Null: not used.
template <class S, std::size_t N>
struct PerChannel {
  const S* of[N];
};

// The same as vectors, whichever elements of the channel are asked for.
template <class S, std::size_t N>
struct OfChannel {
  Wide<S> value[N];
  HD OfChannel(const PerChannel<S, N>& given, std::size_t channel) {
    for (std::size_t n = 0; n < N; ++n) value[n] = Wide<S>(given.of[n] == nullptr ? S(0) : given.of[n][channel]);
  }
  HD Wide<S> operator()(std::size_t n, std::size_t /*column*/) const { return value[n]; }
};

// The same for the columns of a tile.
template <class S, std::size_t N>
struct OfColumns {
  Columns<S> value[N];
  HD OfColumns(const PerChannel<S, N>& given, const Plan& plan, Range channels, std::size_t turn) {
    expand(given, plan, channels, turn);
  }
  HD void expand(const PerChannel<S, N>& given, const Plan& plan, Range channels, std::size_t turn) {
    for (std::size_t n = 0; n < N; ++n) {
      if (given.of[n] != nullptr) value[n].expand(plan, channels.size(), turn, given.of[n] + channels.begin);
    }
  }
  HD Wide<S> operator()(std::size_t n, std::size_t column) const { return value[n][column]; }
};

// Calls body(first element, elements, values, column) for the contiguous pieces of a region, where values(n, column +
// i) are the n-th values of the channels to which elements i, i + 1, ... of the piece belong. `aligned`: the array
// whose cache lines pieces begin on, where they may.
template <class D, std::size_t N, class Body>
HD void for_pieces(const Plan& plan, const Region& region, const void* aligned,
                   const PerChannel<typename D::Compute, N>& given, Body body) {
  using S = typename D::Compute;
  if (!plan.long_runs) {
    const Tile tile = Tile::of<D>(plan, region.channels, rows_in(plan, region.blocks), aligned);
    const OfColumns<S, N> values(given, plan, region.channels, tile.turn);
    body(tile.begin, tile.turn, values, tile.turned());
    for (std::size_t k = 0; k < tile.pieces; ++k) body(tile.piece(k), tile.length(k), values, std::size_t{0});
    return;
  }
  for (std::size_t c = region.channels.begin; c < region.channels.end; ++c) {
    const OfChannel<S, N> values(given, c);
    for (std::size_t block = region.blocks.begin; block < region.blocks.end; ++block) {
      for_segments(plan, c, block,
                   [&](std::size_t first, std::size_t count) { body(first, count, values, std::size_t{0}); });
    }
  }
}

// --- Moments ---------------------------------------------------------------------------------------------------------

// Sums over deviations from a center near the mean lose no digits to a mean that is far from zero. The center is the
// mean of a sample, the block's first values. It lies within sqrt(n / m) deviations of the mean of n values if it is
// that of m of them, whatever they are; so even an outlier among them does no harm.
template <class D>
HD void moments_of_runs(const Plan& plan, const Region& region, const void* x, double* mean, double* m2) {
  using S = typename D::Compute;
  using V = Wide<S>;
  for (std::size_t channel = region.channels.begin; channel < region.channels.end; ++channel, ++mean, ++m2) {
    double before = 0;
    for (std::size_t block = region.blocks.begin; block < region.blocks.end; ++block) {
      const std::size_t begin = first_of_block(plan, channel, block);
      const auto n = static_cast<double>(count_in(plan, {block, block + 1}));
      const std::size_t sample_count = at_most(kSampleRun, first_segment(plan, block));
      const S first = value_at<D>(x, begin);
      Lanes<S, 1> sample;
      sample.add_run(sample_count, [&](std::size_t i, auto access) {
        return Terms<V, 1>{{access.template load<D>(at<D>(x, begin + i)) - V(first)}};
      });
      const S center = center_of(first, sample.total(0), static_cast<double>(sample_count));
      const std::size_t next = next_block_of_runs(plan, channel, block);
      Lanes<S, 2> sums;
      for_segments(plan, channel, block, [&](std::size_t element, std::size_t count) {
        sums.add_run(count, [&](std::size_t i, auto access) {
          prefetch<D, V>(x, element + i + next);
          const Pair<V> d = deviation_terms(access.template load<D>(at<D>(x, element + i)), V(center));
          return Terms<V, 2>{{d.first, d.second}};
        });
      });
      const Moments of_block(center, sums.total(0), sums.total(1), n);
      merge(1, before, n, &of_block.mean, &of_block.m2, mean, m2);
      before += n;
    }
  }
}

template <class D>
HD void moments_of_columns(const Plan& plan, const Region& region, const void* x, double* mean, double* m2) {
  using S = typename D::Compute;
  using V = Wide<S>;
  const std::size_t channels = region.channels.size();
  double before = 0;
  double block_mean[kTileColumns<S>];
  double block_m2[kTileColumns<S>];
  S center[kTileColumns<S>];
  S sum[kTileColumns<S>];
  S squares[kTileColumns<S>];
  Columns<S> centers;
  ColumnSums<S, 1> sample;
  ColumnSums<S, 2> sums;
  for (std::size_t block = region.blocks.begin; block < region.blocks.end; ++block) {
    const Range rows = rows_in(plan, {block, block + 1});
    const Range sample_rows{rows.begin, at_most(rows.begin + kSampleRows, rows.end)};
    const Tile tile = Tile::of<D>(plan, region.channels, rows, x);
    const Tile sample_tile = Tile::of<D>(plan, region.channels, sample_rows, x);
    for (std::size_t c = 0; c < channels; ++c) center[c] = value_at<D>(x, tile.begin + c * plan.inner);
    centers.expand(plan, channels, tile.turn, center);
    sample.template add<4>(sample_tile, [&](std::size_t element, std::size_t column, auto access) {
      return Terms<V, 1>{{access.template load<D>(at<D>(x, element)) - centers[column]}};
    });
    sample.totals(plan, channels, sample_tile, 0, sum);
    const auto sample_count = static_cast<double>(count_in_rows(plan, sample_rows));
    for (std::size_t c = 0; c < channels; ++c) center[c] = center_of(center[c], sum[c], sample_count);
    centers.expand(plan, channels, tile.turn, center);
    sums.template add<4>(tile, [&](std::size_t element, std::size_t column, auto access) {
      const Pair<V> d = deviation_terms(access.template load<D>(at<D>(x, element)), centers[column]);
      return Terms<V, 2>{{d.first, d.second}};
    });
    sums.totals(plan, channels, tile, 0, sum);
    sums.totals(plan, channels, tile, 1, squares);
    const auto n = static_cast<double>(count_in_rows(plan, rows));
    for (std::size_t c = 0; c < channels; ++c) {
      const Moments of_block(center[c], sum[c], squares[c], n);
      block_mean[c] = of_block.mean;
      block_m2[c] = of_block.m2;
    }
    merge(channels, before, n, block_mean, block_m2, mean, m2);
    before += n;
  }
}

template <class D>
Isa moments(const Plan& plan, const Region& region, const void* x, double* mean, double* m2) {
  if (plan.long_runs) {
    moments_of_runs<D>(plan, region, x, mean, m2);
  } else {
    moments_of_columns<D>(plan, region, x, mean, m2);
  }
  return kIsa;
}

// --- Forward ---------------------------------------------------------------------------------------------------------

// What is known of each channel, by its position in PerChannel.
enum : std::size_t { kHigh, kScale, kOffset, kForwardValues, kLevel = kForwardValues, kSlope, kBackwardValues };

template <class D, bool kResidual, bool kRelu, bool kStream>
HD void normalize_as(const Plan& plan, const Region& region, const Forward& pass) {
  using S = typename D::Compute;
  using V = Wide<S>;
  const PerChannel<S, kForwardValues> given{{values<S>(pass.high), values<S>(pass.scale), values<S>(pass.offset)}};
  const auto map_piece = [&](std::size_t first, std::size_t count, const auto& value, std::size_t column) {
    map_vectors<D, kStream>(at<D>(pass.y, first), count, [&](std::size_t i, auto access) {
      const std::size_t k = column + i;
      const V x = access.template load<D>(at<D>(pass.x, first + i));
      V y = normalize(x, value(kHigh, k), value(kScale, k), value(kOffset, k));  // NOLINT(misc-const-correctness)
      if constexpr (kResidual) y = add_residual(y, access.template load<D>(at<D>(pass.residual, first + i)));
      if constexpr (kRelu) y = rectify(y);
      access.template store<D>(y, at<D>(pass.y, first + i));
    });
  };
  for_pieces<D>(plan, region, pass.y, given, map_piece);
  if constexpr (kStream) V::fence();
}

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// Calls body(Flag...) with run-time flags as types.
template <bool... kKnown, class Body>
HD void with_flags(Body body) {
  body(Flag<kKnown>{}...);
}

// (Static analysis of one dtype, and of all flags set, says what there is to say, in a fifth of the time.)
template <bool... kKnown, class Body, class... Rest>
HD void with_flags(Body body, bool flag, Rest... rest) {
#if !defined(__clang_analyzer__)
  if (!flag) return with_flags<kKnown..., false>(body, rest...);
#endif
  if (flag) with_flags<kKnown..., true>(body, rest...);
}

template <class D>
Isa normalize(const Plan& plan, const Region& region, const Forward& pass) {
  with_flags([&](auto residual, auto relu,
                 auto stream) { normalize_as<D, residual.value, relu.value, stream.value>(plan, region, pass); },
             pass.residual != nullptr, pass.relu, pass.bypass_cache);
  return kIsa;
}

// --- Backward --------------------------------------------------------------------------------------------------------

// Where dy counts: everywhere, where the y that was given is positive, or where the y that follows from x is.
enum class Mask : std::uint8_t { none, given, recomputed };

template <Mask kMask>
struct MaskIs {
  static constexpr Mask value = kMask;
};

template <class Body>
HD void with_mask(const Backward& pass, Body body) {
  if (!pass.relu) {
    body(MaskIs<Mask::none>{});
  } else if (pass.y != nullptr) {
    body(MaskIs<Mask::given>{});
  } else {
    body(MaskIs<Mask::recomputed>{});
  }
}

// The gradient that reaches the normalization: dy, masked.
template <Mask kMask, class D, class V, class Access, class Values>
HD V arriving(V x, const Backward& pass, std::size_t element, Access access, const Values& value, std::size_t column) {
  const V dy = access.template load<D>(at<D>(pass.dy, element));
  if constexpr (kMask == Mask::none) return dy;
  V y;
  if constexpr (kMask == Mask::given) {
    y = access.template load<D>(at<D>(pass.y, element));
  } else {
    y = normalize(x, value(kHigh, column), value(kScale, column), value(kOffset, column));
  }
  return rectified_gradient(dy, y);
}

template <class D, Mask kMask>
HD void sums_as(const Plan& plan, const Region& region, const Backward& pass, double* dy, double* dy_x) {
  using S = typename D::Compute;
  using V = Wide<S>;
  constexpr bool needs_y = kMask == Mask::recomputed;
  const PerChannel<S, kForwardValues> given{
      {values<S>(pass.high), needs_y ? values<S>(pass.scale) : nullptr, needs_y ? values<S>(pass.offset) : nullptr}};
  const auto terms = [&pass](std::size_t element, std::size_t column, auto access, const auto& value) {
    const V x = access.template load<D>(at<D>(pass.x, element));
    const V g = arriving<kMask, D>(x, pass, element, access, value, column);
    const Pair<V> sums = gradient_terms(g, x, value(kHigh, column));
    return Terms<V, 2>{{sums.first, sums.second}};
  };
  const std::size_t channels = region.channels.size();
  for (std::size_t c = 0; c < channels; ++c) dy[c] = dy_x[c] = 0;
  if (plan.long_runs) {
    for (std::size_t c = 0; c < channels; ++c) {
      const OfChannel<S, kForwardValues> value(given, region.channels.begin + c);
      for (std::size_t block = region.blocks.begin; block < region.blocks.end; ++block) {
        const std::size_t next = next_block_of_runs(plan, region.channels.begin + c, block);
        Lanes<S, 2> sums;
        for_segments(plan, region.channels.begin + c, block, [&](std::size_t first, std::size_t count) {
          sums.add_run(count, [&](std::size_t i, auto access) {
            prefetch<D, V>(pass.x, first + i + next);
            prefetch<D, V>(pass.dy, first + i + next);
            return terms(first + i, i, access, value);
          });
        });
        dy[c] = dy[c] + static_cast<double>(sums.total(0));
        dy_x[c] = dy_x[c] + static_cast<double>(sums.total(1));
      }
    }
    return;
  }
  // Rows of whole cache lines put all blocks of a region at the same place within lines. Others are turned each in its
  // own way, and want the values turned anew.
  const Range first_rows = rows_in(plan, {region.blocks.begin, region.blocks.begin + 1});
  std::size_t turn = Tile::of<D>(plan, region.channels, first_rows, pass.x).turn;
  OfColumns<S, kForwardValues> value(given, plan, region.channels, turn);
  S total[kTileColumns<S>];
  ColumnSums<S, 2> sums;
  for (std::size_t block = region.blocks.begin; block < region.blocks.end; ++block) {
    const Tile tile = Tile::of<D>(plan, region.channels, rows_in(plan, {block, block + 1}), pass.x);
    if (tile.turn != turn) {
      turn = tile.turn;
      value.expand(given, plan, region.channels, turn);
    }
    const auto terms_of_tile = [&](std::size_t element, std::size_t column, auto access) {
      return terms(element, column, access, value);
    };
    // Two arrays that follow upon themselves are best read from end to end: (25088, 512) takes 14 % less in one thread
    // than with four pieces at a time. Of pieces that lie apart four at a time take 30 % less, (128, 2048, 7, 7).
    if (tile.stride == tile.columns) {
      sums.template add<1>(tile, terms_of_tile);
    } else {
      sums.template add<4>(tile, terms_of_tile);
    }
    sums.totals(plan, channels, tile, 0, total);
    for (std::size_t c = 0; c < channels; ++c) dy[c] = dy[c] + static_cast<double>(total[c]);
    sums.totals(plan, channels, tile, 1, total);
    for (std::size_t c = 0; c < channels; ++c) dy_x[c] = dy_x[c] + static_cast<double>(total[c]);
  }
}

template <class D>
Isa sums(const Plan& plan, const Region& region, const Backward& pass, double* dy, double* dy_x) {
  with_mask(pass, [&](auto mask) { sums_as<D, mask.value>(plan, region, pass, dy, dy_x); });
  return kIsa;
}

template <class D, Mask kMask, bool kResidual, bool kFrozen, bool kStream>
HD void input_gradients_as(const Plan& plan, const Region& region, const Backward& pass) {
  using S = typename D::Compute;
  using V = Wide<S>;
  constexpr bool needs_y = kMask == Mask::recomputed;
  const PerChannel<S, kBackwardValues> given{{needs_y || !kFrozen ? values<S>(pass.high) : nullptr,
                                              values<S>(pass.scale), needs_y ? values<S>(pass.offset) : nullptr,
                                              kFrozen ? nullptr : values<S>(pass.level),
                                              kFrozen ? nullptr : values<S>(pass.slope)}};
  const auto map_piece = [&](std::size_t first, std::size_t count, const auto& value, std::size_t column) {
    map_vectors<D, kStream>(at<D>(pass.dx, first), count, [&](std::size_t i, auto access) {
      const std::size_t k = column + i;
      const V x = access.template load<D>(at<D>(pass.x, first + i));
      const V g = arriving<kMask, D>(x, pass, first + i, access, value, k);
      V dx;
      if constexpr (kFrozen) {
        dx = frozen_gradient(g, value(kScale, k));
      } else {
        dx = input_gradient(g, x, value(kHigh, k), value(kScale, k), value(kLevel, k), value(kSlope, k));
      }
      access.template store<D>(dx, at<D>(pass.dx, first + i));
      if constexpr (kResidual) access.template store<D>(g, at<D>(pass.dresidual, first + i));
    });
  };
  for_pieces<D>(plan, region, pass.dx, given, map_piece);
  if constexpr (kStream) V::fence();
}

template <class D>
Isa input_gradients(const Plan& plan, const Region& region, const Backward& pass) {
  with_mask(pass, [&](auto mask) {
    with_flags(
        [&](auto residual, auto frozen, auto stream) {
          constexpr bool needless = mask.value == Mask::none && residual.value;  // that is dy itself
          if constexpr (!needless) {
            input_gradients_as<D, mask.value, residual.value, frozen.value, stream.value>(plan, region, pass);
          }
        },
        pass.dresidual != nullptr, pass.frozen, pass.bypass_cache);
  });
  return kIsa;
}

// --- The table -------------------------------------------------------------------------------------------------------

template <class... Ds>
constexpr Table table_of(TypeList<Ds...> /*dtypes*/) noexcept {
  return {{{moments<Ds>, normalize<Ds>, sums<Ds>, input_gradients<Ds>}...}};
}

}  // namespace

#define ONEPASS_JOIN_(a, b) a##b
#define ONEPASS_JOIN(a, b) ONEPASS_JOIN_(a, b)

extern const Table ONEPASS_JOIN(kernels_, ONEPASS_ISA);
#if defined(__clang_analyzer__)
const Table ONEPASS_JOIN(kernels_, ONEPASS_ISA) = table_of(TypeList<Float32>{});
#else
const Table ONEPASS_JOIN(kernels_, ONEPASS_ISA) = table_of(ComputeTypes{});
#endif

}  // namespace onepass::batchnorm
