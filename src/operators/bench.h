// What the benchmarks of the operators share.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <vector>

namespace oryx::operators::bench {

// Reports bytes moved per second for a loop that reads and writes `bytes` an iteration.
inline void report(benchmark::State& state, double bytes) {
  state.SetBytesProcessed(static_cast<int64_t>(bytes * static_cast<double>(state.iterations())));
  state.SetLabel(std::to_string(at::get_num_threads()) + " threads");
}

inline at::ScalarType element(int64_t bytes) { return bytes == 2 ? at::kBFloat16 : at::kFloat; }

}  // namespace oryx::operators::bench
