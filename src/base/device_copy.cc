#include "base/device_copy.h"

#include <ATen/ATen.h>

namespace oryx {

at::Tensor copy_to(const at::Tensor& host, at::Device device) {
  if (!device.is_cuda() || !host.is_cpu()) return host.to(device);
  return host.pin_memory().to(device, /*non_blocking=*/true);
}

}  // namespace oryx
