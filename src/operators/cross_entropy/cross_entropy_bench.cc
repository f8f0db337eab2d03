#include "operators/cross_entropy/cross_entropy.h"

#include "operators/bench.h"

namespace oryx::operators {
namespace {

// The head of a small model: forward and gradients, or the loss alone.
void loss(benchmark::State& state, bool gradient) {
  const int64_t rows = 1024, dim = 384, vocabulary = 50304;
  const at::Tensor hidden =
      at::randn({rows, dim}).to(bench::element(state.range(0))).set_requires_grad(gradient);
  const at::Tensor weight = at::randn({vocabulary, dim}).div_(20).set_requires_grad(gradient);
  const at::Tensor targets = at::randint(vocabulary, {rows}, at::kLong);
  for (auto _ : state)
    benchmark::DoNotOptimize(cross_entropy(hidden, weight, targets, 1. / rows, state.range(1)));
  state.counters["GFLOP/s"] =
      benchmark::Counter(2e-9 * static_cast<double>(rows * dim * vocabulary) * (gradient ? 3 : 1),
                         benchmark::Counter::kIsIterationInvariantRate);
}

BENCHMARK_CAPTURE(loss, evaluation, false)->Args({4, 0})->Args({2, 0})->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(loss, training, true)
    ->Args({4, 0})
    ->Args({4, 64})
    ->Args({4, 160})
    ->Args({4, 640})
    ->Args({2, 0})
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace oryx::operators
