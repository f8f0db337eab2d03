#include <ATen/ATen.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

#include "operators/cpu/mixer_benchmark.h"
#include "operators/gated_delta_rule/gated_delta_rule.h"

namespace oryx::operators {
namespace {

std::tuple<at::Tensor, at::Tensor> run(const BenchmarkTensors& x) {
  return gated_delta_rule(x.query, x.key, x.value, x.log_decay, x.step, x.spans, x.initial_state, 0.125);
}

void forward(benchmark::State& state) { benchmark_forward(state, &run, true); }
void forward_backward(benchmark::State& state) { benchmark_forward_backward(state, &run, true); }

BENCHMARK(forward)->Apply(forward_sizes);
BENCHMARK(forward_backward)->Apply(training_sizes);

}  // namespace
}  // namespace oryx::operators
