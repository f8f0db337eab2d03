// Matrix products of the model, beside a plain streaming read of the same bytes for the memory-bound ones.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

#include "operators/linear/linear.h"

namespace oryx::operators {
namespace {

at::ScalarType dtype_of(int64_t bits) { return bits == 16 ? at::kBFloat16 : at::kFloat; }

// Enough equal weights in turn that none is still in the last-level cache.
std::vector<at::Tensor> weights_of(int64_t outputs, int64_t inputs, at::ScalarType dtype) {
  const int64_t bytes = outputs * inputs * static_cast<int64_t>(c10::elementSize(dtype));
  std::vector<at::Tensor> weights;
  for (int64_t i = 0; i == 0 || i * bytes < (int64_t{160} << 20); ++i)
    weights.push_back(at::randn({outputs, inputs}, dtype));
  return weights;
}

void few_rows(benchmark::State& state) {
  const int64_t outputs = state.range(0), inputs = state.range(1), rows = state.range(3);
  const auto weights = weights_of(outputs, inputs, dtype_of(state.range(2)));
  const at::Tensor x = at::randn({rows, inputs}, weights[0].options());
  size_t i = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(operators::linear(x, weights[i]));
    i = (i + 1) % weights.size();
  }
  state.counters["B/s"] = benchmark::Counter(static_cast<double>(weights[0].nbytes()),
                                             benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(few_rows)
    ->ArgNames({"out", "in", "bits", "rows"})
    ->ArgsProduct({{50304}, {768}, {32, 16}, {1, 4, 16}})
    ->ArgsProduct({{768}, {768}, {32, 16}, {1, 4}})
    ->ArgsProduct({{2048}, {2048}, {32, 16}, {1}})
    ->Unit(benchmark::kMicrosecond)
    ->UseRealTime();

// The projections of a block: one token through five weights of 768 x 768 in one call.
void block_projections(benchmark::State& state) {
  const auto weights = weights_of(768, 768, dtype_of(state.range(0)));
  const at::Tensor x = at::randn({1, 768}, weights[0].options());
  size_t i = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(projections(x, {weights.begin() + i, weights.begin() + i + 5},
                                         std::vector<std::optional<at::Tensor>>(5)));
    i = i + 10 > weights.size() ? 0 : i + 5;
  }
  state.counters["B/s"] =
      benchmark::Counter(5.0 * weights[0].nbytes(), benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(block_projections)->ArgName("bits")->Arg(32)->Arg(16)->Unit(benchmark::kMicrosecond)->UseRealTime();

void streaming_read(benchmark::State& state) {
  const int64_t count = int64_t{40} << 20;
  const at::Tensor data = at::ones({count}, at::kInt);
  const int32_t* p = data.data_ptr<int32_t>();
  for (auto _ : state) {
    at::parallel_for(0, count, count / at::get_num_threads(), [&](int64_t begin, int64_t end) {
      int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = begin; i < end; ++i) sum += p[i];
      benchmark::DoNotOptimize(sum);
    });
  }
  state.counters["B/s"] = benchmark::Counter(4.0 * count, benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(streaming_read)->Unit(benchmark::kMicrosecond)->UseRealTime();

// A block's projections in training: 1024 tokens, four weights on all rows and one query on a quarter.
void training(benchmark::State& state) {
  const int64_t rows = 1024, width = 768;
  const auto dtype = dtype_of(state.range(0));
  const at::Tensor x = at::randn({rows, width}, dtype).requires_grad_(true);
  std::vector<at::Tensor> weights, leaves = {x}, upstream;
  std::vector<std::optional<at::Tensor>> selected(5);
  selected[4] = at::arange(256, 512, at::kLong);
  for (size_t i = 0; i < 5; ++i) {
    weights.push_back(at::randn({width, width}).requires_grad_(true));
    leaves.push_back(weights.back());
    upstream.push_back(at::randn({i == 4 ? 256 : rows, width}, dtype));
  }
  for (auto _ : state) {
    benchmark::DoNotOptimize(torch::autograd::grad(projections(x, weights, selected), leaves, upstream));
  }
  state.counters["FLOP/s"] = benchmark::Counter(6.0 * width * width * (4 * rows + 256),
                                                benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(training)->ArgName("bits")->Arg(32)->Arg(16)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
}  // namespace oryx::operators
