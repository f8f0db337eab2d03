#include "operators/gated_norm/gated_norm.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "base/error.h"
#include "base/shapes.h"
#include "operators/activations.h"
#include "operators/device/runtime.h"
#include "operators/gated_norm/gated_norm_cpu.h"
#include "operators/gated_norm/gated_norm_cuda.h"

namespace oryx::operators {

namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Rows whose share of the weight's gradient is summed by one task.
constexpr int64_t rows_per_block = 64;

const void* pointer(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

NormInput describe(NormMode mode, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight,
                   double eps) {
  return {.dtype = x.scalar_type(),
          .mode = mode,
          .rows = x.size(0),
          .channels = x.size(1),
          .group = weight.defined() ? weight.size(0) : x.size(1),
          .eps = eps,
          .x = x.const_data_ptr(),
          .x_stride = x.stride(0),
          .gate = pointer(gate),
          .gate_stride = gate.defined() ? gate.stride(0) : 0,
          .weight = pointer(weight)};
}

// One factor per group, needed by backward on the CPU; a GPU makes it again.
at::Tensor empty_rstd(const at::Tensor& x, const at::Tensor& weight) {
  if (!weight.defined() || cuda::serves(x)) return {};
  return at::empty({x.size(0), x.size(1) / weight.size(0)}, weight.options());
}

void run(const NormForward& arguments, const at::Tensor& x) {
  cuda::serves(x) ? cuda::gated_norm_forward(arguments, x) : cpu::gated_norm_forward(arguments);
}

at::Tensor forward_kernel(NormMode mode, const at::Tensor& x, const at::Tensor& gate,
                          const at::Tensor& weight, double eps, const at::Tensor& rstd) {
  at::Tensor y = at::empty(x.sizes(), x.options());
  run({describe(mode, x, gate, weight, eps), nullptr, 0, nullptr, y.mutable_data_ptr(),
       rstd.defined() ? rstd.mutable_data_ptr() : nullptr},
      x);
  return y;
}

// Without y, unless the kernels of a GPU are asked for it.
GatedNormGradients backward_kernel(NormMode mode, const at::Tensor& x, const at::Tensor& gate,
                                   const at::Tensor& weight, double eps, const at::Tensor& rstd,
                                   const at::Tensor& dy, const at::Tensor& dsum, bool with_y = false) {
  GatedNormGradients out{at::empty(x.sizes(), x.options()), {}, {}, {}};
  at::Tensor partials;
  if (gate.defined()) out.dgate = at::empty_like(out.dx);
  if (with_y) out.y = at::empty_like(out.dx);
  if (weight.defined()) out.dweight = at::empty_like(weight);
  if (weight.defined() && !cuda::serves(x)) {
    partials =
        at::empty({(x.size(0) + rows_per_block - 1) / rows_per_block, weight.size(0)}, weight.options());
  }
  const auto writable = [](const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  const NormBackward arguments{describe(mode, x, gate, weight, eps),
                               pointer(rstd),
                               pointer(dy),
                               pointer(dsum),
                               writable(out.dx),
                               writable(out.dgate),
                               writable(out.dweight),
                               writable(partials),
                               rows_per_block};
  cuda::serves(x) ? cuda::gated_norm_backward(arguments, x, writable(out.y))
                  : cpu::gated_norm_backward(arguments);
  return out;
}

class GatedNorm : public torch::autograd::Function<GatedNorm> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x,
                            const std::optional<at::Tensor>& gates, const std::optional<at::Tensor>& weights,
                            double eps, int64_t mode) {
    const at::Tensor gate = gates.value_or(at::Tensor()), weight = weights.value_or(at::Tensor());
    const at::Tensor rstd = empty_rstd(x, weight);
    context->save_for_backward({x, gate, weight, rstd});
    context->saved_data["eps"] = eps;
    context->saved_data["mode"] = mode;
    return forward_kernel(static_cast<NormMode>(mode), x, gate, weight, eps, rstd);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const auto mode = static_cast<NormMode>(context->saved_data["mode"].toInt());
    const GatedNormGradients out =
        backward_kernel(mode, saved[0], saved[1], saved[2], context->saved_data["eps"].toDouble(), saved[3],
                        grads[0].contiguous(), {});
    return {out.dx, out.dgate, out.dweight, {}, {}};
  }
};

class AddNorm : public torch::autograd::Function<AddNorm> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& residual, const at::Tensor& update,
                               const at::Tensor& weight, double eps) {
    const at::Tensor rstd = empty_rstd(residual, weight);
    const variable_list out = forward_sum(residual, update, weight, eps, rstd);
    context->save_for_backward({out[0], weight, rstd});
    context->saved_data["eps"] = eps;
    return out;
  }

  static variable_list forward_sum(const at::Tensor& residual, const at::Tensor& update,
                                   const at::Tensor& weight, double eps, const at::Tensor& rstd) {
    at::Tensor sum = at::empty(residual.sizes(), residual.options()), normed = at::empty_like(sum);
    run({describe(NormMode::norm, residual, {}, weight, eps), update.const_data_ptr(), update.stride(0),
         sum.mutable_data_ptr(), normed.mutable_data_ptr(),
         rstd.defined() ? rstd.mutable_data_ptr() : nullptr},
        residual);
    return {sum, normed};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const GatedNormGradients out =
        backward_kernel(NormMode::norm, saved[0], {}, saved[1], context->saved_data["eps"].toDouble(),
                        saved[2], grads[1].contiguous(), grads[0].contiguous());
    return {out.dx, out.dx, out.dweight, {}};
  }
};

// x as rows of contiguous channels, without a copy where the strides allow it.
at::Tensor as_rows(const at::Tensor& x) { return contiguous_rows(x.reshape({-1, x.size(-1)})); }

void check_x(std::string_view who, const at::Tensor& x) {
  expect(x.dim() >= 1 && x.size(-1) > 0, "[{}] expected x [..., channels], got [{}]", who,
         fmt::join(x.sizes(), ", "));
  expect_activations(who, "x", x);
}

void check_like(std::string_view who, std::string_view name, const at::Tensor& tensor, const at::Tensor& x) {
  expect(tensor.sizes() == x.sizes(), "[{}] expected {} [{}], got [{}]", who, name,
         fmt::join(x.sizes(), ", "), fmt::join(tensor.sizes(), ", "));
  expect(tensor.scalar_type() == x.scalar_type(), "[{}] expected {} of {}, got {}", who, name,
         at::toString(x.scalar_type()), at::toString(tensor.scalar_type()));
}

std::optional<at::Tensor> present(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

at::Tensor in_accumulate_type(const at::Tensor& weight, const at::Tensor& x) {
  return weight.to(accumulate_type(x.scalar_type())).contiguous();
}

void check(const at::Tensor& x, const std::optional<at::Tensor>& gate,
           const std::optional<at::Tensor>& weight, std::string_view order) {
  check_x("gated_norm", x);
  expect(order == "after_gate" || order == "before_gate",
         "[gated_norm] expected order \"after_gate\" or \"before_gate\", got \"{}\"", order);
  expect(gate || weight, "[gated_norm] expected a gate, a weight or both, got neither");
  if (gate) check_like("gated_norm", "gate", *gate, x);
  if (weight) {
    expect_dimensions("gated_norm", "weight", *weight, 1);
    expect(weight->size(0) > 0 && x.size(-1) % weight->size(0) == 0,
           "[gated_norm] expected a weight whose length divides the {} channels, got {}", x.size(-1),
           weight->size(0));
  }
}

// What the kernels take; absent inputs are undefined.
struct Prepared {
  NormMode mode;
  at::Tensor x, gate, weight;

  Prepared(const at::Tensor& values, const std::optional<at::Tensor>& gates,
           const std::optional<at::Tensor>& factors, std::string_view order)
      : mode(!factors                ? NormMode::product
             : !gates                ? NormMode::norm
             : order == "after_gate" ? NormMode::gate_norm
                                     : NormMode::norm_gate),
        x(as_rows(values)),
        gate(gates ? as_rows(*gates) : at::Tensor()),
        weight(factors ? in_accumulate_type(*factors, values) : at::Tensor()) {}
};

GatedNormGradients composed_gradients(const at::Tensor& x, const std::optional<at::Tensor>& gate,
                                      const std::optional<at::Tensor>& weight, double eps,
                                      std::string_view order, const at::Tensor& dy) {
  const at::AutoGradMode enable(true);
  variable_list leaves;
  const auto leaf = [&](const at::Tensor& t) {
    leaves.push_back(t.detach().set_requires_grad(true));
    return leaves.back();
  };
  const at::Tensor input = leaf(x);
  const auto gates = gate ? present(leaf(*gate)) : std::nullopt,
             factors = weight ? present(leaf(*weight)) : std::nullopt;
  const at::Tensor y = gated_norm_reference(input, gates, factors, eps, order);
  const variable_list found = torch::autograd::grad({y}, leaves, {dy});
  return {found[0], gate ? found[1] : at::Tensor(), weight ? found.back() : at::Tensor(), y.detach()};
}
}  // namespace

at::Tensor gated_norm(const at::Tensor& x, const std::optional<at::Tensor>& gate,
                      const std::optional<at::Tensor>& weight, double eps, std::string_view order) {
  check(x, gate, weight, order);
  if (!x.is_cpu() && !cuda::serves(x)) return gated_norm_reference(x, gate, weight, eps, order);

  const Prepared p(x, gate, weight, order);
  const at::Tensor y =
      needs_gradient({p.x, p.gate, p.weight})
          ? GatedNorm::apply(p.x, present(p.gate), present(p.weight), eps, static_cast<int64_t>(p.mode))
          : forward_kernel(p.mode, p.x, p.gate, p.weight, eps, {});
  return y.view(x.sizes());
}

GatedNormGradients gated_norm_gradients(const at::Tensor& x, const std::optional<at::Tensor>& gate,
                                        const std::optional<at::Tensor>& weight, double eps,
                                        std::string_view order, const at::Tensor& dy) {
  check(x, gate, weight, order);
  check_like("gated_norm", "dy", dy, x);
  if (!x.is_cpu() && !cuda::serves(x)) return composed_gradients(x, gate, weight, eps, order, dy);

  const at::NoGradGuard none;
  const Prepared p(x, gate, weight, order);
  const at::Tensor rstd = empty_rstd(p.x, p.weight);
  at::Tensor y;
  if (!cuda::serves(x)) y = forward_kernel(p.mode, p.x, p.gate, p.weight, eps, rstd);
  GatedNormGradients out =
      backward_kernel(p.mode, p.x, p.gate, p.weight, eps, rstd, dy.contiguous(), {}, cuda::serves(x));
  if (y.defined()) out.y = y;
  for (at::Tensor* t : {&out.dx, &out.dgate, &out.y}) {
    if (t->defined()) *t = t->view(x.sizes());
  }
  if (weight) out.dweight = out.dweight.to(weight->scalar_type());
  return out;
}

std::tuple<at::Tensor, at::Tensor> add_norm(const at::Tensor& residual, const at::Tensor& update,
                                            const at::Tensor& weight, double eps) {
  check_x("add_norm", residual);
  check_like("add_norm", "update", update, residual);
  expect_shape("add_norm", "weight", weight, {residual.size(-1)});
  if (!residual.is_cpu() && !cuda::serves(residual)) return add_norm_reference(residual, update, weight, eps);

  const at::Tensor rows = as_rows(residual), updates = as_rows(update),
                   factors = in_accumulate_type(weight, residual);
  const variable_list out = needs_gradient({rows, updates, factors})
                                ? AddNorm::apply(rows, updates, factors, eps)
                                : AddNorm::forward_sum(rows, updates, factors, eps, {});
  return {out[0].view(residual.sizes()), out[1].view(residual.sizes())};
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "gated_norm(Tensor x, Tensor? gate, Tensor? weight, float eps=1e-5, str order=\"before_gate\") -> "
      "Tensor",
      &gated_norm);
  m.def("add_norm(Tensor residual, Tensor update, Tensor weight, float eps=1e-5) -> (Tensor, Tensor)",
        &add_norm);
}

}  // namespace oryx::operators
