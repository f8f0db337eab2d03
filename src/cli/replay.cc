#include "cli/replay.h"

#include "cli/measure.h"

#ifdef ORYX_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <exception>
#endif

namespace oryx::cli {

#ifdef ORYX_CUDA
namespace {

constexpr int64_t calls_in_graph = 4;

bool capture(at::cuda::CUDAGraph& graph, const std::function<void()>& call) {
  try {
    graph.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    for (int64_t i = 0; i < calls_in_graph; ++i) call();
    graph.capture_end();
    return true;
  } catch (const std::exception&) {
    try {
      graph.capture_end();  // leaves the state of capture
    } catch (const std::exception&) {
    }
    (void)cudaGetLastError();
    return false;
  }
}

}  // namespace
#endif

void on_side_stream([[maybe_unused]] c10::Device device, const std::function<void()>& work) {
#ifdef ORYX_CUDA
  if (device.is_cuda()) {
    synchronize(device);
    const c10::cuda::CUDAStreamGuard guard(
        c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index()));
    work();
    synchronize(device);
    return;
  }
#endif
  work();
}

std::vector<double> time_replays(c10::Device device, int64_t warmup, int64_t repeats,
                                 const std::function<void()>& call) {
#ifdef ORYX_CUDA
  if (device.is_cuda()) {
    for (int64_t i = 0; i < warmup; ++i) call();
    synchronize(device);
    at::cuda::CUDAGraph graph;
    if (capture(graph, call)) {
      std::vector<double> seconds = time_calls(device, 1, repeats, [&] { graph.replay(); });
      for (double& s : seconds) s /= calls_in_graph;
      return seconds;
    }
  }
#endif
  return time_calls(device, warmup, repeats, call);
}

}  // namespace oryx::cli
