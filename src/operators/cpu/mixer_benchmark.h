// What the benchmarks of the linear mixers share. Arguments: batch, time, heads, head dimension, percent of
// linear tokens (in runs of 128), bfloat16 or not.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

#include <optional>
#include <tuple>
#include <vector>

namespace oryx::operators {

struct BenchmarkTensors {
  at::Tensor query, key, value, log_decay, step, skip, spans;
  std::optional<at::Tensor> initial_state;
};

inline BenchmarkTensors benchmark_tensors(const benchmark::State& state, bool normalised_keys) {
  const int64_t batch = state.range(0), time = state.range(1), heads = state.range(2), dim = state.range(3);
  const auto type = state.range(5) != 0 ? at::kBFloat16 : at::kFloat;
  std::vector<int64_t> spans;
  int64_t rows = 0, chunk = 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t begin = 0; begin < time; begin += 128, ++chunk) {
      if (chunk * state.range(4) / 100 == (chunk + 1) * state.range(4) / 100) continue;
      const int64_t end = std::min(time, begin + 128);
      for (const int64_t x : {b, begin, end}) spans.push_back(x);
      rows += end - begin;
    }
  }
  BenchmarkTensors x;
  x.query = at::randn({rows, heads, dim}, type);
  x.key = at::randn({batch, time, heads, dim}, type);
  if (normalised_keys) x.key = x.key / x.key.norm(2, -1, true);
  x.value = at::randn({batch, time, heads, dim}, type);
  x.log_decay = -at::rand({batch, time, heads}) * 0.1;
  x.step = at::rand({batch, time, heads});
  x.skip = at::ones({heads});
  x.spans = at::tensor(spans, at::kLong).view({-1, 3});
  if (time == 1) x.initial_state = at::randn({batch, heads, dim, dim});
  return x;
}

template <typename Run>
void benchmark_forward(benchmark::State& state, Run run, bool normalised_keys) {
  const BenchmarkTensors x = benchmark_tensors(state, normalised_keys);
  const at::NoGradGuard no_grad;
  for (auto _ : state) benchmark::DoNotOptimize(run(x));
}

template <typename Run>
void benchmark_forward_backward(benchmark::State& state, Run run, bool normalised_keys) {
  BenchmarkTensors x = benchmark_tensors(state, normalised_keys);
  std::vector<at::Tensor> leaves;
  for (at::Tensor* t : {&x.query, &x.key, &x.value, &x.log_decay, &x.step}) {
    t->set_requires_grad(true);
    leaves.push_back(*t);
  }
  at::Tensor weights;
  for (auto _ : state) {
    const auto [output, last] = run(x);
    if (!weights.defined()) weights = at::randn_like(output.detach());
    benchmark::DoNotOptimize(torch::autograd::grad({output}, leaves, {weights}));
  }
}

inline void training_sizes(benchmark::internal::Benchmark* b) {
  b->Unit(benchmark::kMillisecond)->UseRealTime()->ArgNames({"B", "T", "H", "D", "linear", "bf16"});
  b->Args({8, 512, 4, 64, 75, 0})->Args({1, 1024, 6, 128, 75, 0})->Args({1, 1024, 6, 128, 75, 1});
}

inline void forward_sizes(benchmark::internal::Benchmark* b) {
  training_sizes(b);
  b->Args({1, 2048, 6, 128, 100, 0})->Args({1, 2048, 6, 128, 0, 0})->Args({1, 1, 6, 128, 100, 0});
}

}  // namespace oryx::operators
