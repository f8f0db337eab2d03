#include "operators/l2_norm/l2_norm.h"

#include "operators/bench.h"

namespace oryx::operators {
namespace {

void forward(benchmark::State& state) {
  c10::NoGradGuard no_grad;
  const at::Tensor x = at::randn({4, 1024, 12, 64}).to(bench::element(state.range(0)));
  for (auto _ : state) benchmark::DoNotOptimize(l2_norm(x));
  bench::report(state, static_cast<double>(x.numel() * state.range(0) * 2));
}

void backward(benchmark::State& state) {
  const at::Tensor x = at::randn({4, 1024, 12, 64}).to(bench::element(state.range(0))).requires_grad_();
  const at::Tensor y = l2_norm(x), dy = at::randn_like(y);
  for (auto _ : state) benchmark::DoNotOptimize(torch::autograd::grad({y}, {x}, {dy}, true));
  bench::report(state, static_cast<double>(x.numel() * state.range(0) * 3));
}

BENCHMARK(forward)->Arg(4)->Arg(2);
BENCHMARK(backward)->Arg(4)->Arg(2);

}  // namespace
}  // namespace oryx::operators
