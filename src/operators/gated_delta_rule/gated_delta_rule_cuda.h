// gated_delta_rule for tensors on a GPU: the kernels where they serve, else gated_delta_rule_chunked.
#pragma once

#include "operators/cpu/mixer_inputs.h"

namespace oryx::operators {

// As gated_delta_rule, whose checks it makes. Without gradients, `keeps_state` as in
// gated_delta_rule_inference().
std::tuple<at::Tensor, at::Tensor> gated_delta_rule_cuda(const MixerTensors& tensors, double scale,
                                                         bool keeps_state = true);

// Tests only: the kernels take sequences in so many segments, as far as they have chunks; 0: as is best.
void force_gated_delta_segments(int segments);

}  // namespace oryx::operators
