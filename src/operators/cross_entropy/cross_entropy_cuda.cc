#include "operators/cross_entropy/cross_entropy_cuda.h"

#include <c10/core/DeviceGuard.h>

#include "operators/activations.h"
#include "operators/cross_entropy/cross_entropy_kernels.h"
#include "operators/device/binding.h"
#include "operators/device/runtime.h"

namespace oryx::cuda {

void softmax_loss(const operators::SoftmaxLoss& a, const at::Tensor& logits) {
  const c10::DeviceGuard guard(logits.device());
  row_losses({.element = device::element_of(a.dtype),
              .gradient = a.gradient,
              .rows = a.rows,
              .columns = a.columns,
              .logits = a.logits,
              .targets = a.targets,
              .losses = a.losses,
              .scale = a.scale},
             stream(logits));
}

void multiply_gradient(const at::Tensor& gradient, const at::Tensor& upstream) {
  if (gradient.numel() == 0) return;
  const c10::DeviceGuard guard(gradient.device());
  const at::Tensor factor = upstream.to(operators::accumulate_type(gradient.scalar_type()));
  scale_in_place({.element = device::element_of(gradient.scalar_type()),
                  .values = gradient.mutable_data_ptr(),
                  .count = gradient.numel(),
                  .factor = factor.const_data_ptr()},
                 multiprocessors(gradient), stream(gradient));
}

}  // namespace oryx::cuda
