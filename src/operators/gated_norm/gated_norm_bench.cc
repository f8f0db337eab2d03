#include "operators/gated_norm/gated_norm.h"

#include "operators/bench.h"

namespace oryx::operators {
namespace {

constexpr int64_t rows = 4096, channels = 768;

struct Inputs {
  at::Tensor x, gate, weight, dy;
  explicit Inputs(at::ScalarType dtype)
      : x(at::randn({rows, channels}).to(dtype)),
        gate(at::randn({rows, channels}).to(dtype)),
        weight(at::ones({channels})),
        dy(at::randn({rows, channels}).to(dtype)) {}
};

template <typename Call>
void forward(benchmark::State& state, int tensors, Call call) {
  const Inputs inputs(bench::element(state.range(0)));
  c10::NoGradGuard no_grad;
  for (auto _ : state) benchmark::DoNotOptimize(call(inputs));
  bench::report(state, static_cast<double>(rows * channels * state.range(0) * tensors));
}

template <typename Call>
void backward(benchmark::State& state, int tensors, Call call) {
  Inputs inputs(bench::element(state.range(0)));
  for (at::Tensor* t : {&inputs.x, &inputs.gate, &inputs.weight}) t->set_requires_grad(true);
  const at::Tensor y = call(inputs);
  for (auto _ : state)
    benchmark::DoNotOptimize(
        torch::autograd::grad({y}, {inputs.x, inputs.gate, inputs.weight}, {inputs.dy}, true, false, true));
  bench::report(state, static_cast<double>(rows * channels * state.range(0) * tensors));
}

at::Tensor after_gate(const Inputs& i) { return gated_norm(i.x, i.gate, i.weight, 1e-5, "after_gate"); }
at::Tensor before_gate(const Inputs& i) { return gated_norm(i.x, i.gate, i.weight, 1e-5, "before_gate"); }
at::Tensor plain(const Inputs& i) { return gated_norm(i.x, std::nullopt, i.weight, 1e-5, "before_gate"); }
at::Tensor product(const Inputs& i) { return gated_norm(i.x, i.gate, std::nullopt, 1e-5, "before_gate"); }

#define ORYX_NORM_BENCHMARK(name, forward_tensors, backward_tensors)       \
  BENCHMARK_CAPTURE(forward, name, forward_tensors, name)->Arg(4)->Arg(2); \
  BENCHMARK_CAPTURE(backward, name, backward_tensors, name)->Arg(4)->Arg(2);
ORYX_NORM_BENCHMARK(after_gate, 3, 5)
ORYX_NORM_BENCHMARK(before_gate, 3, 5)
ORYX_NORM_BENCHMARK(plain, 2, 3)
ORYX_NORM_BENCHMARK(product, 3, 5)

}  // namespace
}  // namespace oryx::operators
