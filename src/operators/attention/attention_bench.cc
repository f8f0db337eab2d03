// Attention: training, prefill and decode. Rates are of useful work: products over each query's own keys, and
// bytes of the keys and values read.
#include <ATen/ATen.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

#include "operators/attention/attention.h"

namespace oryx::operators {
namespace {

at::ScalarType dtype_of(const benchmark::State& state, int index) {
  return state.range(index) == 16 ? at::kBFloat16 : at::kFloat;
}

// 8 sequences of 512, 4 heads of 64; all chunks of 128, or one of the four in each sequence.
void training(benchmark::State& state) {
  const auto dtype = dtype_of(state, 1);
  const int64_t batch = 8, time = 512, heads = 4, dim = 64, chunk = 128;
  std::vector<int64_t> numbers;
  double pairs = 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t c = 0; c < time / chunk; ++c) {
      if (state.range(0) == 25 && c != b % 4) continue;
      numbers.insert(numbers.end(), {b, c * chunk, (c + 1) * chunk});
      for (int64_t t = c * chunk; t < (c + 1) * chunk; ++t) pairs += t + 1;
    }
  }
  const at::Tensor spans = at::tensor(numbers, at::kLong).view({-1, 3});
  const int64_t rows = chunk * spans.size(0);
  const auto leaf = [&](at::IntArrayRef sizes) { return at::randn(sizes, dtype).requires_grad_(true); };
  const at::Tensor q = leaf({rows, heads, dim}), k = leaf({batch, time, heads, dim}),
                   v = leaf({batch, time, heads, dim});
  const at::Tensor grad = at::randn({rows, heads, dim}, dtype);
  for (auto _ : state) {
    const at::Tensor output = attention(q, k, v, spans, 0.125);
    benchmark::DoNotOptimize(torch::autograd::grad({output}, {q, k, v}, {grad}));
  }
  state.counters["FLOP/s"] =
      benchmark::Counter(14 * pairs * heads * dim, benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(training)
    ->ArgNames({"percent", "bits"})
    ->ArgsProduct({{25, 100}, {32, 16}})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

void prefill(benchmark::State& state) {
  const auto dtype = dtype_of(state, 1);
  const int64_t time = state.range(0), heads = 6, dim = 128;
  const at::Tensor spans = at::tensor({int64_t(0), int64_t(0), time}, at::kLong).view({1, 3});
  const at::Tensor q = at::randn({time, heads, dim}, dtype), k = at::randn({1, time, heads, dim}, dtype),
                   v = at::randn({1, time, heads, dim}, dtype);
  for (auto _ : state) benchmark::DoNotOptimize(attention(q, k, v, spans, 0.088));
  state.counters["FLOP/s"] = benchmark::Counter(2.0 * time * (time + 1) * heads * dim,
                                                benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(prefill)
    ->ArgNames({"tokens", "bits"})
    ->ArgsProduct({{2048, 4096}, {32, 16}})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

// One token after 2047 others; the caches of 16 layers in turn, more than the last-level cache holds.
void decode(benchmark::State& state) {
  const auto dtype = dtype_of(state, 1);
  const int64_t used = 2048, capacity = 2304, key_heads = state.range(0), query_heads = 6, dim = 128,
                layers = 16;
  const at::Tensor spans = at::tensor({int64_t(0), used - 1, used}, at::kLong).view({1, 3});
  std::vector<at::Tensor> keys, values;
  for (int64_t i = 0; i < layers; ++i) {
    keys.push_back(at::randn({1, capacity, key_heads, dim}, dtype));
    values.push_back(at::randn({1, capacity, key_heads, dim}, dtype));
  }
  const at::Tensor q = at::randn({1, query_heads, dim}, dtype);
  size_t layer = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(attention(q, keys[layer], values[layer], spans, 0.088));
    layer = (layer + 1) % layers;
  }
  state.counters["B/s"] = benchmark::Counter(2.0 * used * key_heads * dim * keys[0].element_size(),
                                             benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(decode)
    ->ArgNames({"key_heads", "bits"})
    ->ArgsProduct({{6, 2}, {32, 16}})
    ->Unit(benchmark::kMicrosecond)
    ->UseRealTime();

}  // namespace
}  // namespace oryx::operators
