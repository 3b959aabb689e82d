// No call of the library asks for memory once it has been made with tensors of these sizes: threads are there, and what
// a step needs is kept from one to the next. Linked with allocations_counter.cpp. Prints a line for each call that
// does.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/kernel.h"
#include "core/layout.h"
#include "core/tensor.h"
#include "cpu/batchnorm.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/update.h"

extern "C" unsigned long onepass_allocations();
extern "C" void onepass_show_allocations(long next);

namespace {

using namespace onepass;

constexpr int kCalls = 50;

bool failed = false;

// `expected`: allocations of each call after the first ones.
void check(const std::string& what, unsigned long expected, const std::function<void()>& call) {
  for (int k = 0; k < 3; ++k) call();
  const unsigned long before = onepass_allocations();
  for (int k = 0; k < kCalls; ++k) call();
  const unsigned long made = onepass_allocations() - before;
  if (made == expected * kCalls) return;
  std::printf("%s: %lu allocations in %d calls, not %lu\n", what.c_str(), made, kCalls, expected * kCalls);
  std::fflush(stdout);
  failed = true;
  onepass_show_allocations(2);
  call();
  onepass_show_allocations(0);
}

// Tensors with all that a step may be asked for, and what they point to.
class Data {
 public:
  Data(const char* rule, DType param, DType grad, DType state, std::size_t tensors, std::size_t rows)
      : kernel_(find_kernel(active_kernels(), rule)), coefficients_(kernel_->coefficients.count, 0.5) {
    for (std::size_t k = 0; k < tensors; ++k) {
      Tensor& tensor = tensors_.emplace_back();
      tensor.kernel = kernel_;
      tensor.storage = find_storage(param, grad, state);
      tensor.count = rows * kColumns;
      tensor.coefficients = coefficients_.data();
      tensor.around = &around_;
      set(tensor, kParam, param);
      set(tensor, kGrad, grad);
      for (std::size_t slot = 0; slot < kernel_->slots.count; ++slot) set(tensor, kFirstSlot + slot, state);
    }
    const auto item = static_cast<std::ptrdiff_t>(info(grad).itemsize);
    walk_.axes[kGrad] = {{kColumns, item}, {rows, item * static_cast<std::ptrdiff_t>(kColumns)}};
    walk_.gather[kGrad] = true;
    units_.depth = kColumns;
    units_.units = rows;
    units_.limit = 0.5;
  }

  void add(std::size_t stream, DType dtype) {
    for (Tensor& tensor : tensors_) set(tensor, stream, dtype);
  }
  void walk() {
    for (Tensor& tensor : tensors_) tensor.walk = &walk_;
  }
  void limit_units() {
    for (Tensor& tensor : tensors_) tensor.units = &units_;
  }
  void round_by_chance() {
    for (Tensor& tensor : tensors_) tensor.stochastic = true;
  }
  Around& around() { return around_; }
  std::vector<Tensor>& tensors() { return tensors_; }

 private:
  static constexpr std::size_t kColumns = 48;

  void set(Tensor& tensor, std::size_t stream, DType dtype) {
    std::vector<double>& memory = memories_.emplace_back(tensor.count * info(dtype).itemsize / sizeof(double) + 1);
    std::memset(memory.data(), 0x3C, memory.size() * sizeof(double));
    tensor.set(stream, memory.data(), dtype);
  }

  const Kernel* kernel_;
  std::vector<double> coefficients_;
  Around around_;
  Walk walk_;
  Units units_;
  std::vector<Tensor> tensors_;
  std::deque<std::vector<double>> memories_;
};

void check_steps(std::size_t threads) {
  const std::string title = "threads " + std::to_string(threads) + ", ";
  constexpr auto f32 = DType::float32;
  constexpr auto bf16 = DType::bfloat16;
  for (const std::size_t tensors : {std::size_t{1}, std::size_t{20}}) {
    const std::string size = std::to_string(tensors) + " tensors, ";
    std::deque<Data> all;
    const auto step = [&](const char* what, Data& data) {
      check(title + size + what, 0, [&] { update(data.tensors(), threads); });
      std::vector<Squares> sums(tensors);
      check(title + size + "norms, " + what, 0, [&] { measure(data.tensors(), threads, sums); });
    };
    step("plain", all.emplace_back("adam", f32, f32, f32, tensors, 40));
    Data& walked = all.emplace_back("adam", f32, f32, f32, tensors, 40);
    walked.walk();
    step("a gradient in another order", walked);
    Data& limited = all.emplace_back("adam", f32, f32, f32, tensors, 40);
    limited.limit_units();
    step("units", limited);
    Data& noisy = all.emplace_back("adam", f32, f32, f32, tensors, 40);
    noisy.around().noise = 0.5;
    step("noise", noisy);
    Data& rounded = all.emplace_back("adam", bf16, bf16, bf16, tensors, 40);
    rounded.round_by_chance();
    step("rounding by chance", rounded);

    Data& whole = all.emplace_back("adam", bf16, bf16, f32, tensors, 40);
    for (const auto& [stream, dtype] :
         {std::pair{kEma, f32}, {kMirror, DType::float16}, {kRemainder, DType::uint16}, {kAccumulator, f32}}) {
      whole.add(stream, dtype);
    }
    whole.walk();
    whole.limit_units();
    whole.round_by_chance();
    whole.around().noise = 0.5;
    whole.around().clip_value = 0.5;
    whole.around().ema_decay = 0.75;
    whole.around().zero_grads = true;
    step("everything", whole);
    check(title + size + "a sum of gradients", 0, [&] { accumulate(whole.tensors(), threads); });
    check(title + size + "gradients of zero", 0, [&] { zero_gradients(whole.tensors(), threads); });
    check(title + size + "exchange", 0, [&] { exchange(whole.tensors(), threads); });
    check(title + size + "mirrors", 0, [&] { show(whole.tensors(), threads); });
  }
}

struct Shape {
  const char* name;
  std::size_t outer, channels, inner;
};

void check_batchnorm(std::size_t threads) {
  for (const Shape& shape : {Shape{"NCHW", 6, 20, 300}, Shape{"NHWC", 4096, 24, 1}, Shape{"NC", 600, 1000, 1}}) {
    const std::string title = "threads " + std::to_string(threads) + ", batch norm " + shape.name + ", ";
    const std::size_t count = shape.outer * shape.channels * shape.inner;
    const std::vector<float> x(count, 0.5F);
    std::vector<float> y(count);
    std::vector<double> mean(shape.channels);
    std::vector<double> invstd(shape.channels);
    batchnorm::ForwardCall forward;
    batchnorm::BackwardCall backward;
    for (batchnorm::Batch* const batch :
         {static_cast<batchnorm::Batch*>(&forward), static_cast<batchnorm::Batch*>(&backward)}) {
      batch->outer = shape.outer;
      batch->channels = shape.channels;
      batch->inner = shape.inner;
      batch->x = x.data();
    }
    forward.y = y.data();
    forward.eps = 1e-5;
    forward.training = true;
    forward.mean = mean.data();
    forward.invstd = invstd.data();
    backward.dy = x.data();
    backward.mean = mean.data();
    backward.invstd = invstd.data();
    backward.dx = y.data();
    // Constants of channels, and sums of chunks and channels: a few bytes for each channel, in two blocks of memory.
    check(title + "forward", 2, [&] { batchnorm::forward(forward, threads); });
    check(title + "backward", 2, [&] { batchnorm::backward(backward, threads); });
  }
}

}  // namespace

int main() {
  set_serial_bytes(0);
  for (const Isa isa : available_isas()) {
    set_isa(isa);
    for (const std::size_t threads : {std::size_t{1}, std::size_t{2}}) {
      check_steps(threads);
      check_batchnorm(threads);
    }
  }
  if (onepass_allocations() == 0) {
    std::puts("nothing was counted");
    failed = true;
  }
  return failed ? 1 : 0;
}
