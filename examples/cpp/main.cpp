// onepass without Python: minimizes the sum of (x - 3)^2 with Adam, on every instruction set of this machine.
#include <cmath>
#include <cstdio>
#include <map>
#include <string_view>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/update.h"

// Adam's coefficients for step t, in float64 and in the order that the kernel names.
std::vector<double> coefficients(const onepass::Kernel& kernel, double lr, int t) {
  constexpr double beta1 = 0.9;
  constexpr double beta2 = 0.999;
  const std::map<std::string_view, double> by_name = {
      {"beta1", beta1},
      {"one_minus_beta1", 1.0 - beta1},
      {"beta2", beta2},
      {"one_minus_beta2", 1.0 - beta2},
      {"step_m", lr / (1.0 - std::pow(beta1, t))},
      {"step_g", 0.0},
      {"inv_bias2", 1.0 / (1.0 - std::pow(beta2, t))},
      {"eps_root", 0.0},
      {"eps", 1e-8},
  };
  std::vector<double> values;
  for (std::size_t k = 0; k < kernel.coefficients.count; ++k) {
    values.push_back(by_name.at(kernel.coefficients.data[k]));
  }
  return values;
}

std::vector<float> train(std::size_t size, int steps) {
  std::vector<float> param(size);
  for (std::size_t k = 0; k < size; ++k) param[k] = static_cast<float>(k) / static_cast<float>(size);
  std::vector<float> grad(size);
  std::vector<float> exp_avg(size);
  std::vector<float> exp_avg_sq(size);

  const onepass::Kernel* const kernel = onepass::find_kernel(onepass::active_kernels(), "adam");
  constexpr auto float32 = onepass::DType::float32;
  const onepass::Around around;  // no scale, no L1, no L2, no decay
  for (int t = 1; t <= steps; ++t) {
    for (std::size_t k = 0; k < size; ++k) grad[k] = 2.0F * (param[k] - 3.0F);
    const std::vector<double> coefs = coefficients(*kernel, 0.01, t);

    onepass::Tensor tensor;
    tensor.kernel = kernel;
    tensor.storage = onepass::find_storage(float32, float32, float32);
    tensor.count = size;
    tensor.set(onepass::kParam, param.data(), float32);
    tensor.set(onepass::kGrad, grad.data(), float32);
    tensor.set(onepass::kFirstSlot, exp_avg.data(), float32);  // slots as in kernel->slots
    tensor.set(onepass::kFirstSlot + 1, exp_avg_sq.data(), float32);
    tensor.coefficients = coefs.data();
    tensor.around = &around;
    onepass::update({&tensor, 1}, onepass::thread_count());
  }
  return param;
}

int main() {
  std::vector<float> first;
  for (const onepass::Isa isa : onepass::available_isas()) {
    onepass::set_isa(isa);
    const std::vector<float> param = train(1'000'003, 100);
    if (first.empty()) first = param;
    const bool same = param == first;
    std::printf("%-7s x[0] = %.9g, %s\n", onepass::isa_name(isa), static_cast<double>(param[0]),
                same ? "the same bits" : "OTHER BITS");
    if (!same) return 1;
  }
  return 0;
}
