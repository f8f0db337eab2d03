#include "operators/gated_norm/gated_norm_cuda.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "operators/activations.h"
#include "operators/device/binding.h"
#include "operators/device/runtime.h"
#include "operators/gated_norm/gated_norm_kernels.h"

namespace oryx::cuda {

namespace {

NormTensors describe(const operators::NormInput& a) {
  using operators::NormMode;
  NormTensors t{};
  t.element = device::element_of(a.dtype);
  t.mode = a.mode == NormMode::norm        ? Norm::norm
           : a.mode == NormMode::gate_norm ? Norm::gate_norm
           : a.mode == NormMode::norm_gate ? Norm::norm_gate
                                           : Norm::product;
  t.rows = a.rows, t.channels = a.channels, t.group = a.group;
  t.eps = a.eps;
  t.x = a.x, t.x_stride = a.x_stride;
  t.gate = a.gate, t.gate_stride = a.gate_stride;
  t.weight = a.weight;
  return t;
}

}  // namespace

void gated_norm_forward(const operators::NormForward& a, const at::Tensor& x) {
  if (a.rows == 0) return;
  const c10::DeviceGuard guard(x.device());
  NormTensors t = describe(a);
  if (a.update != nullptr) t.mode = Norm::add;
  t.update = a.update, t.update_stride = a.update_stride;
  t.sum = a.sum, t.y = a.y;
  t.aligned = device::is_aligned(t.element, {t.x, t.gate, t.update, t.weight, t.sum, t.y},
                                 {t.x_stride, t.gate_stride, t.update_stride, t.channels, t.group});
  if (t.mode == Norm::product) {
    product_forward(t, stream(x));
  } else {
    norm_forward(t, multiprocessors(x), stream(x));
  }
}

void gated_norm_backward(const operators::NormBackward& a, const at::Tensor& x, void* y) {
  const c10::DeviceGuard guard(x.device());
  NormTensors t = describe(a);
  if (a.dsum != nullptr) t.mode = Norm::add;
  t.dy = a.dy, t.dsum = a.dsum, t.dx = a.dx, t.dgate = a.dgate, t.dweight = a.dweight;
  t.y = y;
  t.aligned = device::is_aligned(t.element, {t.x, t.gate, t.weight, t.dy, t.dsum, t.dx, t.dgate, t.y},
                                 {t.x_stride, t.gate_stride, t.channels, t.group});
  if (t.mode == Norm::product) {
    if (t.rows > 0) product_backward(t, stream(x));
    return;
  }
  const int processors = multiprocessors(x);
  // Lives in the stream's order, like every tensor of the caching allocator.
  const at::Tensor partials = at::empty({norm_backward_blocks(t, processors), t.group},
                                        x.options().dtype(operators::accumulate_type(x.scalar_type())));
  t.partials = partials.mutable_data_ptr();
  norm_backward(t, processors, stream(x));
}

}  // namespace oryx::cuda
