#include "operators/short_conv/short_conv.h"

#include "operators/bench.h"

namespace oryx::operators {
namespace {

constexpr int64_t batch = 4, time = 1024, channels = 768;

void forward(benchmark::State& state) {
  c10::NoGradGuard no_grad;
  const at::Tensor x = at::randn({batch, time, channels}).to(bench::element(state.range(0)));
  const at::Tensor weight = at::randn({channels, 4});
  for (auto _ : state) benchmark::DoNotOptimize(short_conv(x, weight, std::nullopt, std::nullopt, "silu"));
  bench::report(state, static_cast<double>(x.numel() * state.range(0) * 2));
}

void backward(benchmark::State& state) {
  const at::Tensor x = at::randn({batch, time, channels}).to(bench::element(state.range(0))).requires_grad_();
  const at::Tensor weight = at::randn({channels, 4}).requires_grad_();
  const auto [y, tail] = short_conv(x, weight, std::nullopt, std::nullopt, "silu");
  const at::Tensor dy = at::randn_like(y);
  for (auto _ : state) benchmark::DoNotOptimize(torch::autograd::grad({y}, {x, weight}, {dy}, true));
  bench::report(state, static_cast<double>(x.numel() * state.range(0) * 3));
}

void one_token(benchmark::State& state) {
  c10::NoGradGuard no_grad;
  const at::Tensor x = at::randn({state.range(0), 1, channels}), weight = at::randn({channels, 4});
  const at::Tensor tail = at::randn({state.range(0), 3, channels});
  for (auto _ : state) benchmark::DoNotOptimize(short_conv(x, weight, std::nullopt, tail, "silu"));
  bench::report(state, static_cast<double>(x.numel() * 4 * 8));
}

BENCHMARK(forward)->Arg(4)->Arg(2);
BENCHMARK(backward)->Arg(4)->Arg(2);
BENCHMARK(one_token)->Arg(1)->Arg(32);

}  // namespace
}  // namespace oryx::operators
