// Timing of what a GPU does, without what the host does to start it.
#pragma once

#include <c10/core/Device.h>

#include <functional>
#include <vector>

namespace oryx::cli {

// Calls `work` with another stream than the default one as the current stream of a GPU: what is to be
// captured must not have begun on the default stream.
void on_side_stream(c10::Device device, const std::function<void()>& work);

// As time_calls(), but on a GPU, inside on_side_stream(), `call` is captured in a graph, whose replays are
// timed: short kernels then follow each other without waiting for the host. Where `call` cannot be captured
// (it waits for the device, say) as time_calls(). Nothing of `call` may depend on memory of the host that is
// gone when it returns.
std::vector<double> time_replays(c10::Device device, int64_t warmup, int64_t repeats,
                                 const std::function<void()>& call);

}  // namespace oryx::cli
