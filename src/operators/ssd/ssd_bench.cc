#include <ATen/ATen.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

#include "operators/cpu/mixer_benchmark.h"
#include "operators/ssd/ssd.h"

namespace oryx::operators {
namespace {

std::tuple<at::Tensor, at::Tensor> run(const BenchmarkTensors& x) {
  return ssd(x.query, x.key, x.value, x.log_decay, x.step, x.skip, x.spans, x.initial_state);
}

void forward(benchmark::State& state) { benchmark_forward(state, &run, false); }
void forward_backward(benchmark::State& state) { benchmark_forward_backward(state, &run, false); }

BENCHMARK(forward)->Apply(forward_sizes);
BENCHMARK(forward_backward)->Apply(training_sizes);

}  // namespace
}  // namespace oryx::operators
