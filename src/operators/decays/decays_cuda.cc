#include "operators/decays/decays_cuda.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "operators/decays/decays_kernels.h"
#include "operators/device/binding.h"
#include "operators/device/runtime.h"

namespace oryx::cuda {

namespace {

DecayTensors describe(const DecayInput& a) {
  DecayTensors t{};
  t.element = device::element_of(a.x.scalar_type());
  t.heads = a.bias.size(0);
  t.tokens = a.x.numel() / t.heads;
  t.x = a.x.const_data_ptr(), t.x_stride = a.x.stride(-2);
  if (a.beta) t.beta = a.beta->const_data_ptr(), t.beta_stride = a.beta->stride(-2);
  if (a.rows) t.rows = a.rows->const_data_ptr<int64_t>();
  t.bias = a.bias.const_data_ptr(), t.log_a = a.log_a.const_data_ptr();
  if (a.mask) t.mask = a.mask->const_data_ptr();
  return t;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> decays_forward(const DecayInput& a) {
  const c10::DeviceGuard guard(a.x.device());
  const at::IntArrayRef tokens = a.rows ? a.rows->sizes() : a.x.sizes().slice(0, 2);
  const std::vector<int64_t> sizes = {tokens[0], tokens[1], a.bias.size(0)};
  const at::Tensor log_decay = at::empty(sizes, a.bias.options()), strength = at::empty_like(log_decay);
  DecayTensors t = describe(a);
  t.log_decay = log_decay.mutable_data_ptr(), t.strength = strength.mutable_data_ptr();
  decays_forward(t, stream(a.x));
  return {log_decay, strength};
}

DecayGradients decays_backward(const DecayInput& a, const at::Tensor& dlog_decay,
                               const at::Tensor& dstrength) {
  const c10::DeviceGuard guard(a.x.device());
  DecayTensors t = describe(a);
  if (dlog_decay.defined()) t.dlog_decay = dlog_decay.const_data_ptr();
  if (dstrength.defined()) t.dstrength = dstrength.const_data_ptr();
  const at::Tensor dx = at::empty(a.x.sizes(), a.x.options()),
                   dbeta = a.beta ? at::empty(a.x.sizes(), a.x.options()) : at::Tensor();
  const at::Tensor sums = at::empty({2, t.heads}, a.bias.options());
  const at::Tensor partials =
      at::empty({(t.tokens + decay_block - 1) / decay_block, 2, t.heads}, a.bias.options());
  t.dx = dx.mutable_data_ptr();
  if (a.beta) t.dbeta = dbeta.mutable_data_ptr();
  t.partials = partials.mutable_data_ptr(), t.sums = sums.mutable_data_ptr();
  decays_backward(t, stream(a.x));
  return {dx, sums[0], sums[1], dbeta};
}

}  // namespace oryx::cuda
