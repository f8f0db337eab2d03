#include "operators/adamw/adamw.h"

#include <ATen/ATen.h>
#include <ATen/core/List.h>
#include <fmt/ranges.h>
#include <torch/library.h>

#include <cmath>

#include "base/error.h"
#include "operators/activations.h"
#include "operators/adamw/adamw_cpu.h"
#include "operators/adamw/adamw_cuda.h"
#include "operators/device/runtime.h"

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
  const at::Tensor& scale = options.gradient_scale_tensor;
  expect(!scale.defined() || (scale.dim() == 0 && count > 0 && scale.device() == parameters[0].device() &&
                              (scale.scalar_type() == at::kFloat || scale.scalar_type() == at::kDouble)),
         "[adamw_step] expected gradient_scale_tensor as a float32 or float64 scalar on the device of the "
         "parameters");
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

std::vector<AdamwChunk> make_chunks(at::TensorList parameters, at::TensorList gradients,
                                    at::TensorList first_moments, at::TensorList second_moments,
                                    const AdamwOptions& options) {
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
  return chunks;
}
}  // namespace

void adamw_step(at::TensorList parameters, at::TensorList gradients, at::TensorList first_moments,
                at::TensorList second_moments, const AdamwOptions& options) {
  check(parameters, gradients, first_moments, second_moments, options);
  if (parameters.empty()) return;
  const bool on_device = cuda::serves(parameters[0]);
  if (!parameters[0].is_cpu() && !on_device) {
    adamw_step_reference(parameters, gradients, first_moments, second_moments, options);
    return;
  }

  const double step = static_cast<double>(options.step);
  const bool host_scale = !on_device && options.gradient_scale_tensor.defined();
  const AdamwFactors factors{
      .beta1 = options.beta1,
      .beta2 = options.beta2,
      .eps = options.eps,
      .gradient_scale =
          options.gradient_scale * (host_scale ? options.gradient_scale_tensor.item<double>() : 1),
      .step_size = options.learning_rate / (1 - std::pow(options.beta1, step)),
      .correction = 1 / std::sqrt(1 - std::pow(options.beta2, step))};
  if (on_device) {
    cuda::adamw_update(parameters, gradients, first_moments, second_moments, options, factors);
  } else {
    const std::vector<AdamwChunk> chunks =
        make_chunks(parameters, gradients, first_moments, second_moments, options);
    cpu::adamw_update(chunks.data(), static_cast<int64_t>(chunks.size()), factors);
  }
  // Written through raw pointers: tell autograd, so that a stale graph is an error and not a wrong gradient.
  for (at::TensorList list : {parameters, first_moments, second_moments})
    for (const at::Tensor& tensor : list)
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

namespace {
// Throws Error where the kernels cannot read a gradient; the first one that is defined, or undefined.
at::Tensor check_norm(std::string_view who, at::TensorList gradients) {
  at::Tensor first;
  for (const at::Tensor& g : gradients) {
    if (!g.defined()) continue;
    if (!first.defined()) first = g;
    expect_activations(who, "gradients", g);
    expect(g.is_contiguous(), "[{}] expected contiguous gradients, got strides [{}]", who,
           fmt::join(g.strides(), ", "));
    expect(g.device() == first.device(), "[{}] expected gradients on one device, got {} and {}", who,
           first.device().str(), g.device().str());
  }
  return first;
}
}  // namespace

at::Tensor global_norm_device(at::TensorList gradients) {
  const at::Tensor first = check_norm("global_norm", gradients);
  if (first.defined() && cuda::serves(first)) return cuda::global_norm(gradients, first);
  const auto options = first.defined() ? first.options() : at::TensorOptions();
  return at::full({}, global_norm(gradients), options.dtype(at::kDouble).requires_grad(false));
}

double global_norm(at::TensorList gradients) {
  const at::Tensor present = check_norm("global_norm", gradients);
  if (present.defined() && cuda::serves(present)) return cuda::global_norm(gradients, present).item<double>();
  if (present.defined() && !present.is_cpu()) return global_norm_reference(gradients);
  std::vector<NormChunk> chunks;
  for (const at::Tensor& g : gradients) {
    if (!g.defined()) continue;
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
                         int64_t step, double gradient_scale,
                         const std::optional<at::Tensor>& gradient_scale_tensor) {
  adamw_step(parameters, or_undefined(gradients), first_moments, second_moments,
             {learning_rate, beta1, beta2, eps, weight_decay.vec(), step, gradient_scale,
              gradient_scale_tensor.value_or(at::Tensor())});
}

double global_norm_operator(const c10::List<std::optional<at::Tensor>>& gradients) {
  return global_norm(or_undefined(gradients));
}

at::Tensor global_norm_device_operator(const c10::List<std::optional<at::Tensor>>& gradients) {
  return global_norm_device(or_undefined(gradients));
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "adamw_step(Tensor(a!)[] parameters, Tensor?[] gradients, Tensor(b!)[] first_moments, "
      "Tensor(c!)[] second_moments, float learning_rate, float beta1=0.9, float beta2=0.95, float eps=1e-8, "
      "float[] weight_decay=[], int step=1, float gradient_scale=1.0, "
      "Tensor? gradient_scale_tensor=None) -> ()",
      &adamw_step_operator);
  m.def("global_norm(Tensor?[] gradients) -> float", &global_norm_operator);
  m.def("global_norm_device(Tensor?[] gradients) -> Tensor", &global_norm_device_operator);
}

}  // namespace oryx::operators
