#include "operators/adamw/adamw.h"

#include "operators/bench.h"

namespace oryx::operators {
namespace {

constexpr int64_t elements = 16 << 20;

void step(benchmark::State& state) {
  const at::Tensor p = at::randn({elements}), g = at::randn({elements});
  const at::Tensor m = at::zeros({elements}), v = at::zeros({elements});
  AdamwOptions options;
  for (auto _ : state) {
    adamw_step({p}, {g}, {m}, {v}, options);
    ++options.step;
  }
  bench::report(state, 28. * elements);
}

void norm(benchmark::State& state) {
  const at::Tensor g = at::randn({elements});
  for (auto _ : state) benchmark::DoNotOptimize(global_norm({g}));
  bench::report(state, 4. * elements);
}

BENCHMARK(step);
BENCHMARK(norm);

}  // namespace
}  // namespace oryx::operators
