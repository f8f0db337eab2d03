#include "operators/decays/decays.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "base/error.h"
#include "base/shapes.h"
#include "operators/activations.h"
#include "operators/decays/decays_cuda.h"
#include "operators/device/runtime.h"
#include "operators/merge_rows/merge_rows.h"

namespace oryx::operators {

namespace {
using Optional = std::optional<at::Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// x [batch, time, heads] or [rows, heads], whose rows lie at one distance.
at::Tensor evenly_spaced(const at::Tensor& x) {
  const at::Tensor y = contiguous_rows(x);
  return y.dim() == 2 || y.size(0) <= 1 || y.stride(0) == y.size(1) * y.stride(1) ? y : y.contiguous();
}

class Decays : public torch::autograd::Function<Decays> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& bias,
                               const at::Tensor& log_a, const Optional& beta, const Optional& rows,
                               const Optional& mask) {
    context->save_for_backward({x, bias, log_a, beta.value_or(at::Tensor()), rows.value_or(at::Tensor()),
                                mask.value_or(at::Tensor())});
    context->set_materialize_grads(false);
    const auto [log_decay, strength] = cuda::decays_forward({x, bias, log_a, beta, rows, mask});
    return {log_decay, strength};
  }

  static variable_list backward(AutogradContext* context, variable_list upstream) {
    const variable_list saved = context->get_saved_variables();
    const auto optional = [&](size_t i) { return saved[i].defined() ? Optional(saved[i]) : std::nullopt; };
    for (at::Tensor& gradient : upstream) {
      if (gradient.defined()) gradient = gradient.contiguous();
    }
    const cuda::DecayGradients gradients = cuda::decays_backward(
        {saved[0], saved[1], saved[2], optional(3), optional(4), optional(5)}, upstream[0], upstream[1]);
    return {gradients.x, gradients.bias, gradients.log_a, gradients.beta, {}, {}};
  }
};

void check(const at::Tensor& x, const at::Tensor& bias, const at::Tensor& log_a, const Optional& beta,
           const Optional& rows, const Optional& mask) {
  expect_dimensions("decays", "x", x, rows ? 2 : 3);
  expect_activations("decays", "x", x);
  const int64_t heads = x.size(-1);
  expect(heads >= 1, "[decays] expected x of at least one head, got [{}]", fmt::join(x.sizes(), ", "));
  if (rows) expect_token_rows("decays", x, *rows);
  expect_shape("decays", "bias", bias, {heads});
  expect_shape("decays", "log_a", log_a, {heads});
  if (beta) {
    expect(beta->sizes() == x.sizes() && beta->scalar_type() == x.scalar_type(),
           "[decays] expected beta [{}] of {}, as x, got [{}] of {}", fmt::join(x.sizes(), ", "),
           at::toString(x.scalar_type()), fmt::join(beta->sizes(), ", "), at::toString(beta->scalar_type()));
  }
  if (mask) {
    const at::Tensor& tokens = rows ? *rows : x;
    expect_shape("decays", "mask", *mask, {tokens.size(0), tokens.size(1), 1});
    expect(mask->scalar_type() == accumulate_type(x.scalar_type()), "[decays] expected mask of {}, got {}",
           at::toString(accumulate_type(x.scalar_type())), at::toString(mask->scalar_type()));
  }
}
}  // namespace

std::tuple<at::Tensor, at::Tensor> decays(const at::Tensor& x, const at::Tensor& bias,
                                          const at::Tensor& log_a, const Optional& beta, const Optional& rows,
                                          const Optional& mask) {
  check(x, bias, log_a, beta, rows, mask);
  if (!cuda::serves(x)) {
    const auto in_order = [&](const at::Tensor& t) { return rows ? take_rows(t, *rows) : t; };
    return decays_reference(in_order(x), bias, log_a, beta ? Optional(in_order(*beta)) : std::nullopt,
                            std::nullopt, mask);
  }
  const at::ScalarType accumulate = accumulate_type(x.scalar_type());
  const auto contiguous = [](const Optional& t) { return t ? Optional(t->contiguous()) : std::nullopt; };
  const cuda::DecayInput input{evenly_spaced(x),
                               bias.to(accumulate).contiguous(),
                               log_a.to(accumulate).contiguous(),
                               beta ? Optional(evenly_spaced(*beta)) : std::nullopt,
                               contiguous(rows),
                               contiguous(mask)};
  if (!needs_gradient({input.x, input.bias, input.log_a, input.beta.value_or(at::Tensor())})) {
    return cuda::decays_forward(input);
  }
  const variable_list out =
      Decays::apply(input.x, input.bias, input.log_a, input.beta, input.rows, input.mask);
  return {out[0], out[1]};
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "decays(Tensor x, Tensor bias, Tensor log_a, Tensor? beta=None, Tensor? rows=None, Tensor? mask=None) "
      "-> "
      "(Tensor, Tensor)",
      &decays);
}

}  // namespace oryx::operators
