#include "operators/l2_norm/l2_norm.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "base/error.h"
#include "operators/activations.h"
#include "operators/device/runtime.h"
#include "operators/l2_norm/l2_norm_cpu.h"
#include "operators/prepare_heads/prepare_heads_cuda.h"

namespace oryx::operators {

namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

L2NormVectors describe(const at::Tensor& x) {
  return {.dtype = x.scalar_type(),
          .rows = x.size(0),
          .heads = x.size(1),
          .dim = x.size(2),
          .vectors = x.const_data_ptr(),
          .row_stride = x.stride(0),
          .head_stride = x.stride(1)};
}

at::Tensor forward_kernel(const at::Tensor& x, double eps, const at::Tensor& scale) {
  if (cuda::serves(x))
    return cuda::prepare_heads_forward(x.unsqueeze(0), {.l2 = true, .eps = eps}, scale).squeeze(0);
  at::Tensor y = at::empty(x.sizes(), x.options());
  cpu::l2_norm_forward(
      {describe(x), eps, y.mutable_data_ptr(), scale.defined() ? scale.mutable_data_ptr() : nullptr});
  return y;
}

class L2Norm : public torch::autograd::Function<L2Norm> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, double eps) {
    at::Tensor scale = at::empty({x.size(0), x.size(1)}, x.options().dtype(accumulate_type(x.scalar_type())));
    const at::Tensor y = forward_kernel(x, eps, scale);
    context->save_for_backward({y, scale});
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &y = saved[0], dy = grads[0].contiguous();
    if (cuda::serves(y)) {
      return {
          cuda::prepare_heads_backward(y.unsqueeze(0), {.l2 = true}, saved[1], dy.unsqueeze(0)).squeeze(0),
          {}};
    }
    at::Tensor dx = at::empty(y.sizes(), y.options());
    cpu::l2_norm_backward(
        {describe(y), saved[1].const_data_ptr(), dy.const_data_ptr(), dx.mutable_data_ptr()});
    return {dx, {}};
  }
};
}  // namespace

at::Tensor l2_norm(const at::Tensor& x, double eps) {
  expect(x.dim() >= 1 && x.size(-1) > 0,
         "[l2_norm] expected x [..., D] with D > 0, got {} dimensions and {} elements", x.dim(), x.numel());
  expect_activations("l2_norm", "x", x);
  if (!x.is_cpu() && !cuda::serves(x)) return l2_norm_reference(x, eps);

  // [rows, heads, D]: a slice of the heads of a fused projection is read where it lies.
  const int64_t heads = x.dim() >= 2 ? x.size(-2) : 1, dim = x.size(-1);
  const at::Tensor vectors =
      contiguous_rows(heads > 0 ? x.reshape({-1, heads, dim}) : x.reshape({0, 1, dim}));
  const at::Tensor y =
      needs_gradient({vectors}) ? L2Norm::apply(vectors, eps) : forward_kernel(vectors, eps, {});
  return y.view(x.sizes());
}

TORCH_LIBRARY_FRAGMENT(oryx, m) { m.def("l2_norm(Tensor x, float eps=1e-6) -> Tensor", &l2_norm); }

}  // namespace oryx::operators
