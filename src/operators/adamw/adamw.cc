#include "operators/adamw/adamw.h"

#include <ATen/ATen.h>
#include <ATen/core/List.h>
#include <fmt/ranges.h>
#include <torch/library.h>

#include <cmath>

#include "base/error.h"
#include "operators/activations.h"
#include "operators/adamw/adamw_cpu.h"

namespace oryx::operators {

namespace {
// Elements of one unit of work: a fraction of the second cache level, and small enough to share out evenly.
constexpr int64_t chunk_elements = 16384;

void check(at::TensorList parameters, at::TensorList gradients, at::TensorList first_moments,
           at::TensorList second_moments, const AdamwOptions& options) {
  const size_t count = parameters.size();
  expect(gradients.size() == count && first_moments.size() == count && second_moments.size() == count,
         "[adamw_step] expected {} gradients and moments, got {}, {} and {}", count, gradients.size(),
         first_moments.size(), second_moments.size());
  expect(options.weight_decay.empty() || options.weight_decay.size() == count,
         "[adamw_step] expected a weight decay for each of {} tensors or none, got {}", count,
         options.weight_decay.size());
  expect(options.step >= 1, "[adamw_step] expected step >= 1, got {}", options.step);
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& p = parameters[i];
    expect(
        p.defined() && (p.scalar_type() == at::kFloat || p.scalar_type() == at::kDouble) && p.is_contiguous(),
        "[adamw_step] expected parameter {} contiguous and of float32 or float64", i);
    const auto like = [&](std::string_view name, const at::Tensor& t) {
      expect(t.defined() && t.sizes() == p.sizes() && t.scalar_type() == p.scalar_type() &&
                 t.device() == p.device() && t.is_contiguous(),
             "[adamw_step] expected {} {} contiguous [{}] of {} on {}, as its parameter", name, i,
             fmt::join(p.sizes(), ", "), at::toString(p.scalar_type()), p.device().str());
    };
    if (gradients[i].defined()) like("gradient", gradients[i]);
    like("first moment", first_moments[i]);
    like("second moment", second_moments[i]);
  }
}

// The bytes at element `offset`, or null for an undefined tensor.
void* element(const at::Tensor& tensor, int64_t offset) {
  if (!tensor.defined()) return nullptr;
  return static_cast<char*>(tensor.data_ptr()) + offset * static_cast<int64_t>(tensor.element_size());
}
}  // namespace

void adamw_step(at::TensorList parameters, at::TensorList gradients, at::TensorList first_moments,
                at::TensorList second_moments, const AdamwOptions& options) {
  check(parameters, gradients, first_moments, second_moments, options);
  if (parameters.empty()) return;
  if (!parameters[0].is_cpu()) {
    adamw_step_reference(parameters, gradients, first_moments, second_moments, options);
    return;
  }

  std::vector<AdamwChunk> chunks;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const double weight_decay = options.weight_decay.empty() ? 0 : options.weight_decay[i];
    for (int64_t first = 0; first < parameters[i].numel(); first += chunk_elements) {
      chunks.push_back({.dtype = parameters[i].scalar_type(),
                        .count = std::min(chunk_elements, parameters[i].numel() - first),
                        .parameter = element(parameters[i], first),
                        .gradient = element(gradients[i], first),
                        .first_moment = element(first_moments[i], first),
                        .second_moment = element(second_moments[i], first),
                        .decay = 1 - options.learning_rate * weight_decay});
    }
  }
  const double step = static_cast<double>(options.step);
  cpu::adamw_update(chunks.data(), static_cast<int64_t>(chunks.size()),
                    {.beta1 = options.beta1,
                     .beta2 = options.beta2,
                     .eps = options.eps,
                     .gradient_scale = options.gradient_scale,
                     .step_size = options.learning_rate / (1 - std::pow(options.beta1, step)),
                     .correction = 1 / std::sqrt(1 - std::pow(options.beta2, step))});
  // Written through raw pointers: tell autograd, so that a stale graph is an error and not a wrong gradient.
  for (at::TensorList list : {parameters, first_moments, second_moments})
    for (const at::Tensor& tensor : list)
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

double global_norm(at::TensorList gradients) {
  std::vector<NormChunk> chunks;
  for (const at::Tensor& g : gradients) {
    if (!g.defined()) continue;
    expect_activations("global_norm", "gradients", g);
    if (!g.is_cpu()) return global_norm_reference(gradients);
    expect(g.is_contiguous(), "[global_norm] expected contiguous gradients, got strides [{}]",
           fmt::join(g.strides(), ", "));
    for (int64_t first = 0; first < g.numel(); first += chunk_elements)
      chunks.push_back({g.scalar_type(), std::min(chunk_elements, g.numel() - first), element(g, first), 0});
  }
  cpu::sum_squares(chunks.data(), static_cast<int64_t>(chunks.size()));
  double total = 0;
  for (const NormChunk& chunk : chunks) total += chunk.sum;
  return std::sqrt(total);
}

namespace {
std::vector<at::Tensor> or_undefined(const c10::List<std::optional<at::Tensor>>& tensors) {
  std::vector<at::Tensor> result;
  for (size_t i = 0; i < tensors.size(); ++i) result.push_back(tensors.get(i).value_or(at::Tensor()));
  return result;
}

void adamw_step_operator(at::TensorList parameters, const c10::List<std::optional<at::Tensor>>& gradients,
                         at::TensorList first_moments, at::TensorList second_moments, double learning_rate,
                         double beta1, double beta2, double eps, at::ArrayRef<double> weight_decay,
                         int64_t step, double gradient_scale) {
  adamw_step(parameters, or_undefined(gradients), first_moments, second_moments,
             {learning_rate, beta1, beta2, eps, weight_decay.vec(), step, gradient_scale});
}

double global_norm_operator(const c10::List<std::optional<at::Tensor>>& gradients) {
  return global_norm(or_undefined(gradients));
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "adamw_step(Tensor(a!)[] parameters, Tensor?[] gradients, Tensor(b!)[] first_moments, "
      "Tensor(c!)[] second_moments, float learning_rate, float beta1=0.9, float beta2=0.95, float eps=1e-8, "
      "float[] weight_decay=[], int step=1, float gradient_scale=1.0) -> ()",
      &adamw_step_operator);
  m.def("global_norm(Tensor?[] gradients) -> float", &global_norm_operator);
}

}  // namespace oryx::operators
