#include "operators/rotary/rotary.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "base/error.h"
#include "base/shapes.h"
#include "operators/activations.h"
#include "operators/device/runtime.h"
#include "operators/prepare_heads/prepare_heads_cuda.h"
#include "operators/rotary/rotary_cpu.h"

namespace oryx::operators {

namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// x [batch, time, heads, dim]; the rows of [rows, heads, dim] are one batch. `again`: added to x, on a GPU.
at::Tensor kernel(const at::Tensor& x, const at::Tensor& cosine, const at::Tensor& sine, bool backwards,
                  const at::Tensor& again = {}) {
  if (cuda::serves(x))
    return cuda::prepare_heads_forward(x, {.cosine = cosine, .sine = sine, .backwards = backwards}, {},
                                       again);
  at::Tensor y = at::empty(x.sizes(), x.options());
  cpu::rotate({.dtype = x.scalar_type(),
               .batch = x.size(0),
               .time = x.size(1),
               .heads = x.size(2),
               .dim = x.size(3),
               .table_rows = cosine.size(0),
               .x = x.const_data_ptr(),
               .batch_stride = x.stride(0),
               .time_stride = x.stride(1),
               .head_stride = x.stride(2),
               .cosine = cosine.const_data_ptr(),
               .sine = sine.const_data_ptr(),
               .backwards = backwards,
               .y = y.mutable_data_ptr()});
  return y;
}

class Rotary : public torch::autograd::Function<Rotary> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& cosine,
                               const at::Tensor& sine, bool for_two) {
    context->save_for_backward({cosine, sine});
    context->set_materialize_grads(false);
    const at::Tensor y = kernel(x, cosine, sine, /*backwards=*/false);
    return for_two ? variable_list{y, y.variable_data()} : variable_list{y};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const auto [dy, dy_again] = joined_gradients(grads[0], grads.size() > 1 ? grads[1] : at::Tensor(),
                                                 /*adds=*/cuda::serves(saved[0]));
    if (!dy.defined()) return variable_list(4);
    return {kernel(contiguous_rows(dy), saved[0], saved[1], /*backwards=*/true, dy_again), {}, {}, {}};
  }
};
}  // namespace

std::tuple<at::Tensor, at::Tensor> rotary_tables(const at::Tensor& positions, int64_t dim, double base,
                                                 at::ScalarType dtype) {
  expect_dimensions("rotary_tables", "positions", positions, 1);
  expect(positions.scalar_type() == at::kLong, "[rotary_tables] expected positions of int64, got {}",
         at::toString(positions.scalar_type()));
  expect(dim > 0 && dim % 2 == 0, "[rotary_tables] expected an even dim > 0, got {}", dim);
  const at::TensorOptions wide = positions.options().dtype(at::kDouble);
  const at::Tensor exponent = at::arange(0, dim, 2, wide) / static_cast<double>(-dim);
  const at::Tensor angle = at::outer(positions.to(at::kDouble), at::pow(base, exponent));
  return {angle.cos().to(dtype), angle.sin().to(dtype)};
}

namespace {

// y and, for two readers where gradients are wanted, y again.
variable_list rotated(const at::Tensor& x, const at::Tensor& cosine, const at::Tensor& sine, bool for_two) {
  expect(x.dim() == 3 || x.dim() == 4,
         "[rotary] expected x [rows, heads, D] or [batch, time, heads, D], got {} dimensions", x.dim());
  expect_activations("rotary", "x", x);
  const int64_t dim = x.size(-1), rows = x.dim() == 3 ? x.size(0) : x.size(0) * x.size(1);
  expect(dim % 2 == 0, "[rotary] expected an even D, got {}", dim);
  expect_shape("rotary", "cosine", cosine, {-1, dim / 2});
  expect_shape("rotary", "sine", sine, {cosine.size(0), dim / 2});
  const at::ScalarType accumulate = accumulate_type(x.scalar_type());
  expect(cosine.scalar_type() == accumulate && sine.scalar_type() == accumulate,
         "[rotary] expected tables of {} for x of {}, got {} and {}", at::toString(accumulate),
         at::toString(x.scalar_type()), at::toString(cosine.scalar_type()), at::toString(sine.scalar_type()));
  if (rows == 0) return {x.clone(at::MemoryFormat::Contiguous)};
  expect(cosine.size(0) > 0 && rows % cosine.size(0) == 0,
         "[rotary] expected a number of table rows that divides the {} rows of x, got {}", rows,
         cosine.size(0));
  if (!x.is_cpu() && !cuda::serves(x)) return {rotary_reference(x, cosine, sine)};

  const at::Tensor given = contiguous_rows(x.dim() == 3 ? x.unsqueeze(0) : x);
  const at::Tensor c = cosine.contiguous(), s = sine.contiguous();
  variable_list out = needs_gradient({given}) ? Rotary::apply(given, c, s, for_two)
                                              : variable_list{kernel(given, c, s, false)};
  for (at::Tensor& y : out) y = y.view(x.sizes());
  return out;
}

}  // namespace

at::Tensor rotary(const at::Tensor& x, const at::Tensor& cosine, const at::Tensor& sine) {
  return rotated(x, cosine, sine, /*for_two=*/false)[0];
}

std::tuple<at::Tensor, at::Tensor> rotary_for_two(const at::Tensor& x, const at::Tensor& cosine,
                                                  const at::Tensor& sine) {
  const variable_list out = rotated(x, cosine, sine, /*for_two=*/true);
  return {out.front(), out.back()};
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def("rotary_tables(Tensor positions, int dim, float base, ScalarType dtype) -> (Tensor, Tensor)",
        &rotary_tables);
  m.def("rotary(Tensor x, Tensor cosine, Tensor sine) -> Tensor", &rotary);
}

}  // namespace oryx::operators
