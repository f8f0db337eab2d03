// ssd on the CUDA kernels of ssd_kernels.h.
#pragma once

#include "operators/ssd/ssd_inputs.h"

namespace oryx::operators {

// Whether the chunk kernels serve this call, which cuda::serves() already: bfloat16, head dimensions of 64 or
// 128 and no token in two spans.
bool ssd_chunks_serve(const SsdInputs& in);
// Whether the step kernel does, without gradients: few tokens, also float32.
bool ssd_steps_serve(const SsdInputs& in);
// Output and, if `keeps_state`, final state. Steps where they serve and no gradient is wanted, else chunks.
std::vector<at::Tensor> ssd_forward_cuda(const SsdInputs& in, bool differentiate, bool keeps_state);
// d_output has contiguous rows, d_state is contiguous; either may be undefined.
SsdGradients ssd_backward_cuda(const SsdInputs& in, const at::Tensor& d_output, const at::Tensor& d_state);

}  // namespace oryx::operators
