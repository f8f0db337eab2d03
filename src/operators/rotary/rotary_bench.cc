#include "operators/rotary/rotary.h"

#include "operators/bench.h"

namespace oryx::operators {
namespace {

void forward(benchmark::State& state) {
  c10::NoGradGuard no_grad;
  const at::Tensor x = at::randn({4, 1024, 12, 64}).to(bench::element(state.range(0)));
  const auto [cosine, sine] = rotary_tables(at::arange(1024, at::kLong), 64, 10000, at::kFloat);
  for (auto _ : state) benchmark::DoNotOptimize(rotary(x, cosine, sine));
  bench::report(state, static_cast<double>(x.numel() * state.range(0) * 2));
}
BENCHMARK(forward)->Arg(4)->Arg(2);

}  // namespace
}  // namespace oryx::operators
