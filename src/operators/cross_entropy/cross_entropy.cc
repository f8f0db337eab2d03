#include "operators/cross_entropy/cross_entropy.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "base/error.h"
#include "base/shapes.h"
#include "operators/activations.h"
#include "operators/cross_entropy/cross_entropy_cpu.h"
#include "operators/cross_entropy/cross_entropy_cuda.h"
#include "operators/device/runtime.h"

namespace oryx::operators {

namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Bytes of logits held at once: enough rows to keep the matrix products busy.
constexpr int64_t block_bytes = int64_t{64} << 20;
// A GPU wants larger products, and every block costs one more pass over the weight's gradient.
constexpr int64_t device_block_bytes = int64_t{512} << 20;

struct Result {
  at::Tensor loss, token_losses, dhidden, dweight;
};

// Writes the losses of a block and, with `gradient`, turns its logits into their gradients.
void block_loss(at::Tensor logits, const at::Tensor& targets, at::Tensor losses, double scale,
                bool gradient) {
  if (logits.is_cpu() || cuda::serves(logits)) {
    const SoftmaxLoss arguments{.dtype = logits.scalar_type(),
                                .rows = logits.size(0),
                                .columns = logits.size(1),
                                .logits = logits.mutable_data_ptr(),
                                .targets = targets.const_data_ptr<int64_t>(),
                                .losses = losses.mutable_data_ptr(),
                                .scale = scale,
                                .gradient = gradient};
    cuda::serves(logits) ? cuda::softmax_loss(arguments, logits) : cpu::softmax_loss(arguments);
    return;
  }
  const at::Tensor wide = logits.to(losses.scalar_type()), columns = targets.clamp_min(0).unsqueeze(1);
  const at::Tensor counted = (targets >= 0).unsqueeze(1),
                   log_sum = at::logsumexp(wide, {1}, /*keepdim=*/true);
  losses.copy_(((log_sum - wide.gather(1, columns)) * counted).squeeze(1));
  if (!gradient) return;
  at::Tensor slope = (wide - log_sum).exp_();
  slope.scatter_add_(1, columns, at::full_like(columns, -1, slope.options()));
  logits.copy_(slope.mul_(counted * scale));
}

int64_t choose_rows_per_block(int64_t rows, int64_t row_bytes, bool is_cpu) {
  if (is_cpu) return std::max<int64_t>(64, block_bytes / row_bytes);
  // Blocks of equal size, in whole tiles of the matrix products.
  const int64_t most = std::max<int64_t>(128, device_block_bytes / row_bytes),
                blocks = (rows + most - 1) / most;
  return blocks <= 1 ? rows : ((rows + blocks - 1) / blocks + 127) / 128 * 128;
}

// sum (=, for the first block, or +=) logits.t() · inputs, in the accumulate type.
void add_weight_gradient(at::Tensor sum, const at::Tensor& logits, const at::Tensor& inputs,
                         at::Tensor product, bool is_first) {
  if (sum.scalar_type() == inputs.scalar_type()) {
    at::addmm_out(sum, sum, logits.t(), inputs, /*beta=*/is_first ? 0 : 1);
  } else if (sum.is_cuda()) {  // float32 leaves the product as it was accumulated
    at::addmm_out(sum, sum, logits.t(), inputs, sum.scalar_type(), /*beta=*/is_first ? 0 : 1);
  } else {  // products of bfloat16 are summed in float32
    at::mm_out(product, logits.t(), inputs);
    is_first ? sum.copy_(product) : sum.add_(product);
  }
}

// The losses and, where wanted, their gradients, block by block.
Result run(const at::Tensor& hidden, const at::Tensor& master, const at::Tensor& targets, double scale,
           int64_t rows_per_block, bool want_dhidden, bool want_dweight) {
  const int64_t rows = hidden.size(0), vocabulary = master.size(0);
  const at::ScalarType dtype = hidden.scalar_type(), accumulate = accumulate_type(dtype);
  const at::Tensor weight = master.to(dtype).contiguous();
  if (rows_per_block == 0)
    rows_per_block = choose_rows_per_block(rows, vocabulary * static_cast<int64_t>(c10::elementSize(dtype)),
                                           hidden.is_cpu());
  rows_per_block = std::min(rows_per_block, rows);

  Result out;
  out.token_losses = at::empty({rows}, hidden.options().dtype(accumulate));
  if (want_dhidden) out.dhidden = at::empty(hidden.sizes(), hidden.options());
  if (want_dweight) out.dweight = at::empty(master.sizes(), weight.options().dtype(accumulate));
  if (want_dweight && rows == 0) out.dweight.zero_();
  at::Tensor buffer = at::empty({rows_per_block, vocabulary}, hidden.options()), product;
  if (want_dweight && dtype != accumulate && !hidden.is_cuda())
    product = at::empty(master.sizes(), hidden.options());

  for (int64_t first = 0; first < rows; first += rows_per_block) {
    const int64_t count = std::min(rows_per_block, rows - first);
    const at::Tensor inputs = hidden.narrow(0, first, count);
    at::Tensor logits = buffer.narrow(0, 0, count);
    at::mm_out(logits, inputs, weight.t());
    block_loss(logits, targets.narrow(0, first, count), out.token_losses.narrow(0, first, count), scale,
               want_dhidden || want_dweight);
    if (want_dhidden) {
      at::Tensor dinputs = out.dhidden.narrow(0, first, count);
      at::mm_out(dinputs, logits, weight);
    }
    if (want_dweight) add_weight_gradient(out.dweight, logits, inputs, product, first == 0);
  }
  if (want_dweight) out.dweight = out.dweight.to(gradient_type(master));
  out.loss = (out.token_losses.sum(at::kDouble) * scale).to(accumulate);
  return out;
}

class CrossEntropy : public torch::autograd::Function<CrossEntropy> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& hidden, const at::Tensor& weight,
                               const at::Tensor& targets, double scale, int64_t rows_per_block) {
    const Result out =
        run(hidden, weight, targets, scale, rows_per_block, hidden.requires_grad(), weight.requires_grad());
    context->saved_data["dhidden"] = out.dhidden;
    context->saved_data["dweight"] = out.dweight;
    context->mark_non_differentiable({out.token_losses});
    return {out.loss, out.token_losses};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    expect(!context->saved_data.empty(),
           "[cross_entropy] expected one backward pass, got a second one without retain_graph");
    const at::Tensor& upstream = grads[0];
    const bool keep = torch::autograd::get_current_graph_task_keep_graph();
    const bool unit =
        upstream.is_cpu() && upstream.item<double>() == 1;  // a GPU's value would have to be waited for
    variable_list result;
    for (const char* name : {"dhidden", "dweight"}) {
      at::Tensor gradient = context->saved_data[name].toTensor();
      if (gradient.defined() && keep) {
        gradient = gradient * upstream.to(gradient.scalar_type());
      } else if (gradient.defined() && cuda::serves(gradient)) {
        cuda::multiply_gradient(gradient, upstream);
      } else if (gradient.defined() && !unit) {
        gradient.mul_(upstream.to(gradient.scalar_type()));
      }
      result.push_back(gradient);
    }
    // The last reader owns the tensors, so that autograd keeps the weight's gradient without another copy.
    if (!keep) context->saved_data.clear();
    result.resize(5);
    return result;
  }
};
}  // namespace

std::tuple<at::Tensor, at::Tensor> cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                                 const at::Tensor& targets, double scale,
                                                 int64_t rows_per_block) {
  expect_dimensions("cross_entropy", "hidden", hidden, 2);
  expect_activations("cross_entropy", "hidden", hidden);
  expect_shape("cross_entropy", "weight", weight, {-1, hidden.size(1)});
  expect_shape("cross_entropy", "targets", targets, {hidden.size(0)});
  const at::ScalarType dtype = hidden.scalar_type();
  expect(weight.scalar_type() == dtype || (dtype == at::kBFloat16 && weight.scalar_type() == at::kFloat),
         "[cross_entropy] expected weight of {}, got {}", at::toString(dtype),
         at::toString(weight.scalar_type()));
  expect(targets.scalar_type() == at::kLong, "[cross_entropy] expected targets of int64, got {}",
         at::toString(targets.scalar_type()));
  expect(weight.size(0) > 0, "[cross_entropy] expected weight [V, d] with V > 0, got V = 0");
  expect(rows_per_block >= 0, "[cross_entropy] expected rows_per_block >= 0, got {}", rows_per_block);
  // The kernels of a GPU make such a loss NaN instead of waiting for the targets here.
  const bool checks = !cuda::serves(hidden) && targets.numel() > 0;
  const int64_t largest = checks ? targets.max().item<int64_t>() : -1;
  expect(largest < weight.size(0), "[cross_entropy] expected targets below the vocabulary of {}, got {}",
         weight.size(0), largest);

  const at::Tensor rows = hidden.contiguous(), ids = targets.contiguous();
  if (needs_gradient({rows, weight})) {
    const variable_list out = CrossEntropy::apply(rows, weight, ids, scale, rows_per_block);
    return {out[0], out[1]};
  }
  c10::NoGradGuard no_grad;
  const Result out = run(rows, weight, ids, scale, rows_per_block, false, false);
  return {out.loss, out.token_losses};
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "cross_entropy(Tensor hidden, Tensor weight, Tensor targets, float scale=1.0, int rows_per_block=0) -> "
      "(Tensor, Tensor)",
      &cross_entropy);
}

}  // namespace oryx::operators
