#include "operators/prepare_heads/prepare_heads.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "base/error.h"
#include "base/shapes.h"
#include "operators/activations.h"
#include "operators/device/runtime.h"
#include "operators/l2_norm/l2_norm.h"
#include "operators/prepare_heads/prepare_heads_cuda.h"
#include "operators/rotary/rotary.h"

namespace oryx::operators {

namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class PrepareHeads : public torch::autograd::Function<PrepareHeads> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, bool silu, bool l2,
                            const std::optional<at::Tensor>& cosine, const std::optional<at::Tensor>& sine,
                            double eps) {
    const cuda::HeadCall call{.silu = silu,
                              .l2 = l2,
                              .cosine = cosine.value_or(at::Tensor()),
                              .sine = sine.value_or(at::Tensor()),
                              .eps = eps};
    at::Tensor scale;
    if (l2) scale = at::empty(x.sizes().slice(0, 3), x.options().dtype(accumulate_type(x.scalar_type())));
    const at::Tensor y = cuda::prepare_heads_forward(x, call, scale);
    const bool only_l2 = l2 && !silu && !cosine;
    context->save_for_backward({only_l2 ? y : silu || l2 ? x : at::Tensor(), scale, call.cosine, call.sine});
    context->saved_data["silu"] = silu;
    context->saved_data["l2"] = l2;
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const cuda::HeadCall call{.silu = context->saved_data["silu"].toBool(),
                              .l2 = context->saved_data["l2"].toBool(),
                              .cosine = saved[2],
                              .sine = saved[3]};
    return {
        cuda::prepare_heads_backward(saved[0], call, saved[1], grads[0].contiguous()), {}, {}, {}, {}, {}};
  }
};

void check(const at::Tensor& x, const HeadSteps& steps) {
  expect(x.dim() == 3 || x.dim() == 4,
         "[prepare_heads] expected x [rows, heads, D] or [batch, time, heads, D], got {} dimensions",
         x.dim());
  expect_activations("prepare_heads", "x", x);
  expect(steps.cosine.has_value() == steps.sine.has_value(),
         "[prepare_heads] expected cosine and sine or neither, got one of them");
  if (!steps.cosine) return;
  const int64_t dim = x.size(-1), rows = x.dim() == 3 ? x.size(0) : x.size(0) * x.size(1);
  expect(dim % 2 == 0, "[prepare_heads] expected an even D to rotate, got {}", dim);
  expect_shape("prepare_heads", "cosine", *steps.cosine, {-1, dim / 2});
  expect_shape("prepare_heads", "sine", *steps.sine, {steps.cosine->size(0), dim / 2});
  const at::ScalarType accumulate = accumulate_type(x.scalar_type());
  expect(steps.cosine->scalar_type() == accumulate && steps.sine->scalar_type() == accumulate,
         "[prepare_heads] expected tables of {} for x of {}", at::toString(accumulate),
         at::toString(x.scalar_type()));
  expect(rows == 0 || (steps.cosine->size(0) > 0 && rows % steps.cosine->size(0) == 0),
         "[prepare_heads] expected a number of table rows that divides the {} rows of x, got {}", rows,
         steps.cosine->size(0));
}

at::Tensor composed(const at::Tensor& x, const HeadSteps& steps, bool reference) {
  at::Tensor y = x;
  if (steps.silu) y = at::silu(y);
  if (steps.l2_norm) y = reference ? l2_norm_reference(y, steps.eps) : l2_norm(y, steps.eps);
  if (steps.cosine)
    y = reference ? rotary_reference(y, *steps.cosine, *steps.sine) : rotary(y, *steps.cosine, *steps.sine);
  return y;
}

at::Tensor prepare_heads_operator(const at::Tensor& x, bool silu, bool l2_norm,
                                  const std::optional<at::Tensor>& cosine,
                                  const std::optional<at::Tensor>& sine, double eps) {
  return prepare_heads(x, {silu, l2_norm, cosine, sine, eps});
}
}  // namespace

at::Tensor prepare_heads(const at::Tensor& x, const HeadSteps& steps) {
  check(x, steps);
  if (!cuda::serves(x)) return composed(x, steps, /*reference=*/false);
  if (!steps.silu && !steps.l2_norm && !steps.cosine) return x;
  const at::Tensor given = contiguous_rows(x.dim() == 3 ? x.unsqueeze(0) : x);
  const auto table = [](const std::optional<at::Tensor>& t) {
    return t ? std::optional<at::Tensor>(t->contiguous()) : std::nullopt;
  };
  const std::optional<at::Tensor> cosine = table(steps.cosine), sine = table(steps.sine);
  if (needs_gradient({given}))
    return PrepareHeads::apply(given, steps.silu, steps.l2_norm, cosine, sine, steps.eps).view(x.sizes());
  const cuda::HeadCall call{.silu = steps.silu,
                            .l2 = steps.l2_norm,
                            .cosine = cosine.value_or(at::Tensor()),
                            .sine = sine.value_or(at::Tensor()),
                            .eps = steps.eps};
  return cuda::prepare_heads_forward(given, call, {}).view(x.sizes());
}

at::Tensor prepare_heads_reference(const at::Tensor& x, const HeadSteps& steps) {
  return composed(x, steps, /*reference=*/true);
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "prepare_heads(Tensor x, bool silu=False, bool l2_norm=False, Tensor? cosine=None, Tensor? sine=None, "
      "float eps=1e-6) -> Tensor",
      &prepare_heads_operator);
}

}  // namespace oryx::operators
