#include "operators/prepare_heads/prepare_heads_cuda.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "base/error.h"
#include "operators/device/binding.h"
#include "operators/device/runtime.h"
#include "operators/prepare_heads/prepare_heads_kernels.h"

namespace oryx::cuda {

namespace {

// `like` gives the sizes; x is undefined where a backward pass does not need it.
HeadTensors describe(const at::Tensor& like, const at::Tensor& x, const HeadCall& call,
                     const at::Tensor& scale) {
  expect(like.size(0) * like.size(1) * like.size(2) < (int64_t{1} << 31),
         "[prepare_heads] expected fewer than 2^31 vectors, got {}", like.numel() / like.size(3));
  HeadTensors t{};
  t.element = device::element_of(like.scalar_type());
  t.silu = call.silu, t.l2 = call.l2, t.rotate = call.cosine.defined();
  t.backwards = call.backwards;
  t.batch = like.size(0), t.time = like.size(1), t.heads = like.size(2), t.dim = like.size(3);
  t.eps = call.eps;
  if (x.defined()) {
    t.x = x.const_data_ptr();
    t.batch_stride = x.stride(0), t.time_stride = x.stride(1), t.head_stride = x.stride(2);
  }
  if (t.rotate) {
    t.cosine = call.cosine.const_data_ptr(), t.sine = call.sine.const_data_ptr();
    t.table_rows = call.cosine.size(0);
  }
  if (scale.defined()) t.scale = scale.mutable_data_ptr();
  return t;
}

bool is_aligned(const HeadTensors& t) {
  return device::is_aligned(t.element, {t.x, t.again, t.y, t.dy, t.dx, t.cosine, t.sine},
                            {t.batch_stride, t.time_stride, t.head_stride, t.dim});
}

}  // namespace

at::Tensor prepare_heads_forward(const at::Tensor& x, const HeadCall& call, const at::Tensor& scale,
                                 const at::Tensor& again) {
  const c10::DeviceGuard guard(x.device());
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  HeadTensors t = describe(x, x, call, scale);
  if (again.defined()) t.again = again.const_data_ptr();
  t.y = y.mutable_data_ptr();
  t.aligned = is_aligned(t);
  prepare_heads_forward(t, stream(x));
  return y;
}

at::Tensor prepare_heads_backward(const at::Tensor& x, const HeadCall& call, const at::Tensor& scale,
                                  const at::Tensor& dy) {
  const c10::DeviceGuard guard(dy.device());
  at::Tensor dx = at::empty(dy.sizes(), dy.options());
  if (dx.numel() == 0) return dx;
  HeadTensors t = describe(dy, x, call, scale);
  t.dy = dy.const_data_ptr(), t.dx = dx.mutable_data_ptr();
  t.aligned = is_aligned(t);
  prepare_heads_backward(t, stream(dy));
  return dx;
}

}  // namespace oryx::cuda
