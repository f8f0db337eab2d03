#include "operators/short_conv/short_conv_cuda.h"

#include <c10/core/DeviceGuard.h>

#include "operators/device/binding.h"
#include "operators/device/runtime.h"
#include "operators/short_conv/short_conv_kernels.h"

namespace oryx::cuda {

static_assert(conv_block == operators::short_conv_block, "both share the shape of the partial sums");

namespace {

ConvTensors describe(const operators::ShortConvInput& a) {
  ConvTensors t{};
  t.element = device::element_of(a.dtype);
  t.silu = a.silu;
  t.batch = a.batch, t.time = a.time, t.channels = a.channels, t.width = a.width;
  t.x = a.x, t.x_batch_stride = a.x_batch_stride, t.x_time_stride = a.x_time_stride;
  t.x_rows = a.x_rows;
  t.weight = a.weight, t.bias = a.bias, t.tail = a.tail;
  return t;
}

// Four elements at a time, and the weight's rows of four.
bool is_aligned(const ConvTensors& t) {
  const int64_t bytes = 4 * device::bytes_of(t.element);
  for (const void* pointer :
       {t.x, t.tail, static_cast<const void*>(t.y), static_cast<const void*>(t.new_tail), t.dy, t.dy_again,
        t.dnew_tail, static_cast<const void*>(t.dx), static_cast<const void*>(t.dtail)})
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) return false;
  if (reinterpret_cast<uintptr_t>(t.weight) % 16 != 0) return false;
  return t.channels % 4 == 0 && t.x_batch_stride % 4 == 0 && t.x_time_stride % 4 == 0;
}

}  // namespace

void short_conv_forward(const operators::ShortConvForward& a, const at::Tensor& x) {
  const c10::DeviceGuard guard(x.device());
  ConvTensors t = describe(a);
  t.y = a.y, t.new_tail = a.new_tail;
  t.aligned = is_aligned(t);
  conv_forward(t, stream(x));
}

void short_conv_backward(const operators::ShortConvBackward& a, const at::Tensor& x) {
  const c10::DeviceGuard guard(x.device());
  ConvTensors t = describe(a);
  t.dy = a.dy, t.dy_again = a.dy_again, t.dnew_tail = a.dnew_tail, t.dx = a.dx, t.dtail = a.dtail,
  t.partials = a.partials, t.sums = a.sums;
  t.aligned = is_aligned(t);
  conv_backward(t, stream(x));
}

}  // namespace oryx::cuda
