// The kernels around the update: norms and what they decide, sums of gradients, averages, mirrors, limits of units,
// copies into order. Plain C++.
#pragma once

#include "core/dtype.h"
#include "cuda/tables.h"

namespace onepass::cuda {

// Of tensors whose parameters (or gradients, for measure) are stored in one dtype; `compute` of them is float or
// double.
template <class S>
using TableKernel = void (*)(WholeTable<S>);

struct TableKernels {
  TableKernel<float> as_float;  // null: the dtype is computed in double
  TableKernel<double> as_double;
  unsigned lanes;
};

struct SupportKernels {
  TableKernels accumulate;  // gradients in this dtype
  TableKernels zero;        // gradients in this dtype
  TableKernels exchange;    // parameters in this dtype, averages alike
  TableKernels show;        // parameters in this dtype
  TableKernels finish;      // parameters in this dtype: the end of a step with limited units
  void (*unit_squares)(Entry<kStreams>, UnitParams, const Verdict*);
};

const SupportKernels& support_for(DType dtype);

// Norms (measure.cu): of gradients in a dtype, or of the accumulators of its compute type.
using MeasureKernel = void (*)(MeasureTable);
MeasureKernel measure_for(DType dtype);
extern void (*const sum_parts)(SumTable);
extern void (*const judge)(JudgeParams);
extern void (*const settle)(SettleParams);
extern void (*const copy_strided)(CopyParams);  // support.cu

inline constexpr unsigned kUnitThreads = 128;

}  // namespace onepass::cuda
