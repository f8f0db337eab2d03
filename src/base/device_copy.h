// Copies to a device that do not hold up its queue.
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx {

// The CPU tensor `host` on `device`; on a GPU the copy is queued on the current stream, from pinned memory,
// and nobody waits for it. The tensor itself where it is there already.
at::Tensor copy_to(const at::Tensor& host, at::Device device);

}  // namespace oryx
