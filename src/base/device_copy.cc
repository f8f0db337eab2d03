#include "base/device_copy.h"

#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>

namespace oryx {

at::Tensor copy_to(const at::Tensor& host, at::Device device) {
  if (!device.is_cuda() || !host.is_cpu()) return host.to(device);
  return host.pin_memory().to(device, /*non_blocking=*/true);
}

Arrival::Arrival(const at::Tensor& tensor) {
  if (!tensor.is_cuda()) {
    host_ = tensor.contiguous();
    return;
  }
  host_ = at::empty(tensor.sizes(), tensor.options().device(at::kCPU).pinned_memory(true));
  host_.copy_(tensor, /*non_blocking=*/true);
  copied_.emplace(tensor.device().type(), c10::EventFlag::BACKEND_DEFAULT);
  copied_->record(at::accelerator::getCurrentStream(tensor.device().index()));
}

const at::Tensor& Arrival::wait() {
  if (copied_) copied_->synchronize();
  copied_.reset();
  return host_;
}

}  // namespace oryx
