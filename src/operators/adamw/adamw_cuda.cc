#include "operators/adamw/adamw_cuda.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "operators/adamw/adamw_kernels.h"
#include "operators/device/binding.h"
#include "operators/device/runtime.h"

namespace oryx::cuda {

void adamw_update(at::TensorList parameters, at::TensorList gradients, at::TensorList first_moments,
                  at::TensorList second_moments, const operators::AdamwOptions& options,
                  const operators::AdamwFactors& factors) {
  const c10::DeviceGuard guard(parameters[0].device());
  const at::Tensor& scale = options.gradient_scale_tensor;
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    AdamwBatch batch{};
    batch.element = device::element_of(dtype);
    batch.beta1 = factors.beta1, batch.beta2 = factors.beta2, batch.eps = factors.eps;
    batch.gradient_scale = factors.gradient_scale;
    batch.step_size = factors.step_size, batch.correction = factors.correction;
    if (scale.defined()) {
      batch.device_scale = scale.const_data_ptr();
      batch.device_scale_type = device::element_of(scale.scalar_type());
    }
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (parameters[i].scalar_type() != dtype || parameters[i].numel() == 0) continue;
      batch.tensor[batch.tensors++] = {
          .parameter = parameters[i].mutable_data_ptr(),
          .gradient = gradients[i].defined() ? gradients[i].const_data_ptr() : nullptr,
          .first_moment = first_moments[i].mutable_data_ptr(),
          .second_moment = second_moments[i].mutable_data_ptr(),
          .count = parameters[i].numel(),
          .decay = 1 - options.learning_rate * (options.weight_decay.empty() ? 0 : options.weight_decay[i])};
      if (batch.tensors == adamw_batch) {
        adamw_update(batch, stream(parameters[0]));
        batch.tensors = 0;
      }
    }
    if (batch.tensors > 0) adamw_update(batch, stream(parameters[0]));
  }
}

at::Tensor global_norm(at::TensorList gradients, const at::Tensor& like) {
  const c10::DeviceGuard guard(like.device());
  int64_t blocks = 0;
  for (const at::Tensor& g : gradients)
    if (g.defined()) blocks += norm_blocks_of(g.numel());
  const auto options = like.options().dtype(at::kDouble).requires_grad(false);
  const at::Tensor partials = at::empty({blocks}, options), norm = at::empty({}, options);
  int64_t done = 0;
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
    SquaresBatch batch{};
    batch.element = device::element_of(dtype);
    const auto flush = [&] {
      if (batch.tensors == 0) return;
      batch.partials = partials.mutable_data_ptr<double>() + done;
      sum_squares(batch, stream(like));
      done += batch.first_block[batch.tensors];
      batch.tensors = 0;
    };
    for (const at::Tensor& g : gradients) {
      if (!g.defined() || g.scalar_type() != dtype || g.numel() == 0) continue;
      batch.tensor[batch.tensors++] = {g.const_data_ptr(), g.numel()};
      if (batch.tensors == norm_batch) flush();
    }
    flush();
  }
  root_of_sum({partials.const_data_ptr<double>(), blocks, norm.mutable_data_ptr<double>()}, stream(like));
  return norm;
}

}  // namespace oryx::cuda
