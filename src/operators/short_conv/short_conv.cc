#include "operators/short_conv/short_conv.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "base/error.h"
#include "base/shapes.h"
#include "operators/activations.h"
#include "operators/device/runtime.h"
#include "operators/merge_rows/merge_rows.h"
#include "operators/short_conv/short_conv_cpu.h"
#include "operators/short_conv/short_conv_cuda.h"

namespace oryx::operators {

namespace {
using Optional = std::optional<at::Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// [batch, time, channels].
std::vector<int64_t> token_sizes(const at::Tensor& x, const Optional& rows) {
  if (rows) return {rows->size(0), rows->size(1), x.size(1)};
  return x.sizes().vec();
}

ShortConvInput describe(const at::Tensor& x, const at::Tensor& weight, const Optional& bias,
                        const Optional& tail, const Optional& rows, bool silu) {
  const std::vector<int64_t> sizes = token_sizes(x, rows);
  return {.dtype = x.scalar_type(),
          .silu = silu,
          .batch = sizes[0],
          .time = sizes[1],
          .channels = sizes[2],
          .width = weight.size(1),
          .x = x.const_data_ptr(),
          .x_batch_stride = rows ? 0 : x.stride(0),
          .x_time_stride = rows ? x.stride(0) : x.stride(1),
          .x_rows = rows ? rows->const_data_ptr<int64_t>() : nullptr,
          .weight = weight.const_data_ptr(),
          .bias = bias ? bias->const_data_ptr() : nullptr,
          .tail = tail ? tail->const_data_ptr() : nullptr};
}

variable_list forward_kernel(const at::Tensor& x, const at::Tensor& weight, const Optional& bias,
                             const Optional& tail, const Optional& rows, bool silu) {
  const std::vector<int64_t> sizes = token_sizes(x, rows);
  at::Tensor y = at::empty(sizes, x.options());
  at::Tensor new_tail = at::empty({sizes[0], weight.size(1) - 1, sizes[2]}, x.options());
  const ShortConvForward arguments{describe(x, weight, bias, tail, rows, silu), y.mutable_data_ptr(),
                                   new_tail.mutable_data_ptr()};
  cuda::serves(x) ? cuda::short_conv_forward(arguments, x) : cpu::short_conv_forward(arguments);
  return {y, new_tail};
}

class ShortConv : public torch::autograd::Function<ShortConv> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                               const Optional& bias, const Optional& tail, const Optional& rows, bool silu,
                               bool for_two) {
    context->save_for_backward(
        {x, weight, bias.value_or(at::Tensor()), tail.value_or(at::Tensor()), rows.value_or(at::Tensor())});
    context->saved_data["silu"] = silu;
    context->set_materialize_grads(false);
    variable_list out = forward_kernel(x, weight, bias, tail, rows, silu);
    if (for_two) out.push_back(out[0].variable_data());
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1];
    const Optional bias = saved[2].defined() ? Optional(saved[2]) : std::nullopt;
    const Optional tail = saved[3].defined() ? Optional(saved[3]) : std::nullopt;
    const Optional rows = saved[4].defined() ? Optional(saved[4]) : std::nullopt;
    const std::vector<int64_t> sizes = token_sizes(x, rows);
    const int64_t batch = sizes[0], time = sizes[1], channels = sizes[2], width = weight.size(1);
    const int64_t blocks = batch * ((time + short_conv_block - 1) / short_conv_block);

    const auto [given, dy_again] = joined_gradients(grads[0], grads.size() > 2 ? grads[2] : at::Tensor(),
                                                    /*adds=*/cuda::serves(x));
    const at::Tensor dy = given.defined() ? given.contiguous() : at::zeros(sizes, x.options());
    const at::Tensor dnew_tail = grads[1].defined() ? grads[1].contiguous() : at::Tensor();
    at::Tensor dx = at::empty(x.sizes(), x.options()),
               sums = at::empty({width + 1, channels}, weight.options());
    at::Tensor dtail = tail ? at::empty_like(*tail) : at::Tensor();
    if (time == 0) {  // the new tail is the tail
      if (tail && dnew_tail.defined()) dtail.copy_(dnew_tail);
      if (tail && !dnew_tail.defined()) dtail.zero_();
      sums.zero_();
    } else {
      at::Tensor partials = at::empty({blocks, width + 1, channels}, weight.options());
      const ShortConvBackward arguments{
          describe(x, weight, bias, tail, rows, context->saved_data["silu"].toBool()),
          dy.const_data_ptr(),
          dy_again.defined() ? dy_again.const_data_ptr() : nullptr,
          dnew_tail.defined() ? dnew_tail.const_data_ptr() : nullptr,
          dx.mutable_data_ptr(),
          tail ? dtail.mutable_data_ptr() : nullptr,
          partials.mutable_data_ptr(),
          sums.mutable_data_ptr()};
      cuda::serves(x) ? cuda::short_conv_backward(arguments, x) : cpu::short_conv_backward(arguments);
    }
    // The kernels of the CPU leave [width + 1, channels], the GPU's the weight as it lies in memory, then the
    // bias.
    const bool by_channel = cuda::serves(x);
    const at::Tensor flat = sums.view({-1});
    const at::Tensor dweight = by_channel ? flat.narrow(0, 0, channels * width).view({channels, width})
                                          : sums.narrow(0, 0, width).t().contiguous();
    return {dx, dweight, bias ? flat.narrow(0, channels * width, channels) : at::Tensor(), dtail, {}, {}, {}};
  }
};

// y, the new tail and, for two readers where gradients are wanted, y again.
variable_list convolved(const at::Tensor& x, const at::Tensor& weight, const Optional& bias,
                        const Optional& tail, std::string_view activation, const Optional& rows,
                        bool for_two) {
  expect_dimensions("short_conv", "x", x, rows ? 2 : 3);
  expect_activations("short_conv", "x", x);
  if (rows) expect_token_rows("short_conv", x, *rows);
  const std::vector<int64_t> sizes = token_sizes(x, rows);
  expect_shape("short_conv", "weight", weight, {sizes[2], -1});
  expect(weight.size(1) >= 1, "[short_conv] expected weight [channels, W] with W >= 1, got W = 0");
  if (bias) expect_shape("short_conv", "bias", *bias, {sizes[2]});
  if (tail) {
    expect_shape("short_conv", "tail", *tail, {sizes[0], weight.size(1) - 1, sizes[2]});
    expect(tail->scalar_type() == x.scalar_type(), "[short_conv] expected tail of {}, got {}",
           at::toString(x.scalar_type()), at::toString(tail->scalar_type()));
  }
  expect(activation == "none" || activation == "silu",
         "[short_conv] expected activation \"none\" or \"silu\", got \"{}\"", activation);
  if (!x.is_cpu() && !cuda::serves(x)) {
    const auto [y, new_tail] = short_conv_reference(x, weight, bias, tail, activation, rows);
    return {y, new_tail};
  }
  if (rows && !cuda::serves(x)) {
    return convolved(take_rows(x, *rows), weight, bias, tail, activation, std::nullopt, for_two);
  }

  const at::ScalarType accumulate = accumulate_type(x.scalar_type());
  const at::Tensor inputs = contiguous_rows(x), taps = weight.to(accumulate).contiguous();
  const Optional shift = bias ? Optional(bias->to(accumulate).contiguous()) : std::nullopt;
  const Optional before = tail ? Optional(tail->contiguous()) : std::nullopt;
  const Optional places = rows ? Optional(rows->contiguous()) : std::nullopt;
  const bool silu = activation == "silu";
  const bool differentiable =
      needs_gradient({inputs, taps, shift.value_or(at::Tensor()), before.value_or(at::Tensor())});
  return differentiable ? ShortConv::apply(inputs, taps, shift, before, places, silu, for_two)
                        : forward_kernel(inputs, taps, shift, before, places, silu);
}
}  // namespace

std::tuple<at::Tensor, at::Tensor> short_conv(const at::Tensor& x, const at::Tensor& weight,
                                              const Optional& bias, const Optional& tail,
                                              std::string_view activation, const Optional& rows) {
  const variable_list out = convolved(x, weight, bias, tail, activation, rows, /*for_two=*/false);
  return {out[0], out[1]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> short_conv_for_two(const at::Tensor& x,
                                                                  const at::Tensor& weight,
                                                                  const Optional& bias, const Optional& tail,
                                                                  std::string_view activation,
                                                                  const Optional& rows) {
  const variable_list out = convolved(x, weight, bias, tail, activation, rows, /*for_two=*/true);
  return {out[0], out.size() > 2 ? out[2] : out[0], out[1]};
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "short_conv(Tensor x, Tensor weight, Tensor? bias=None, Tensor? tail=None, str activation=\"none\", "
      "Tensor? rows=None) -> (Tensor, Tensor)",
      &short_conv);
}

}  // namespace oryx::operators
