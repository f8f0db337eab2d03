// Copies to and from a device that do not hold up its queue.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <optional>

namespace oryx {

// The CPU tensor `host` on `device`; on a GPU the copy is queued on the current stream, from pinned memory,
// and nobody waits for it. The tensor itself where it is there already.
at::Tensor copy_to(const at::Tensor& host, at::Device device);

// A tensor on its way to the CPU: queued on the current stream when made, waited for when asked for.
class Arrival {
 public:
  explicit Arrival(const at::Tensor& tensor);
  // On the CPU, contiguous.
  const at::Tensor& wait();

 private:
  at::Tensor host_;
  std::optional<c10::Event> copied_;  // absent where there is nothing to wait for
};

}  // namespace oryx
