#include "training/optimizer.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "operators/adamw/adamw.h"
#include "training/process_group.h"

namespace oryx::training {

double LearningRate::at(int64_t step) const {
  const auto warmup = static_cast<int64_t>(warmup_fraction * static_cast<double>(steps));
  if (step < warmup) return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
  const double progress = static_cast<double>(step - warmup) / static_cast<double>(steps - warmup);
  return floor + (peak - floor) * 0.5 * (1 + std::cos(std::numbers::pi * progress));
}

double clip_scale(double norm, double limit) {
  return limit > 0 ? std::min(1.0, limit / (norm + 1e-6)) : 1.0;
}

Optimizer::Optimizer(model::Weights& weights, const AdamwRates& rates) : rates_(rates) {
  for (auto& [name, tensor] : weights.entries()) {
    tensor.set_requires_grad(true);
    add(name, tensor, tensor.dim() > 1);
  }
}

Optimizer::Optimizer(model::Weights& weights, const AdamwRates& rates, const std::vector<Piece>& pieces,
                     const std::vector<at::Tensor>& masters)
    : rates_(rates) {
  for (auto& [name, tensor] : weights.entries()) tensor.set_requires_grad(true);
  for (size_t i = 0; i < pieces.size(); ++i) {
    const auto& [name, tensor] = weights.entries()[pieces[i].parameter];
    add(name, masters[i], tensor.dim() > 1);
  }
}

void Optimizer::add(const std::string& name, const at::Tensor& parameter, bool decays) {
  names_.push_back(name);
  parameters_.push_back(parameter);
  first_moments_.push_back(at::zeros_like(parameter.detach()));
  second_moments_.push_back(at::zeros_like(parameter.detach()));
  weight_decay_.push_back(decays ? rates_.weight_decay : 0.0);
}

std::vector<at::Tensor> Optimizer::gradients() const {
  std::vector<at::Tensor> gradients;
  gradients.reserve(parameters_.size());
  for (const at::Tensor& parameter : parameters_) gradients.push_back(parameter.grad());
  return gradients;
}

double Optimizer::gradient_norm() const { return operators::global_norm(gradients()); }

operators::AdamwOptions Optimizer::options(int64_t step, double learning_rate) const {
  operators::AdamwOptions options;
  options.learning_rate = learning_rate;
  options.beta1 = rates_.beta1;
  options.beta2 = rates_.beta2;
  options.weight_decay = weight_decay_;
  options.step = step + 1;
  return options;
}

void Optimizer::update(int64_t step, double learning_rate, double gradient_scale) {
  const at::NoGradGuard no_grad;
  operators::AdamwOptions chosen = options(step, learning_rate);
  chosen.gradient_scale = gradient_scale;
  operators::adamw_step(parameters_, gradients(), first_moments_, second_moments_, chosen);
}

at::Tensor Optimizer::clip_and_update(int64_t step, double learning_rate, double clip) {
  if (parameters_.front().is_cpu()) {
    const double norm = gradient_norm();
    update(step, learning_rate, clip_scale(norm, clip));
    return at::scalar_tensor(norm, at::kDouble);
  }
  const at::NoGradGuard no_grad;
  const at::Tensor norm = operators::global_norm_device(gradients());
  operators::AdamwOptions chosen = options(step, learning_rate);
  if (clip > 0) chosen.gradient_scale_tensor = (clip / (norm + 1e-6)).clamp_max(1);
  operators::adamw_step(parameters_, gradients(), first_moments_, second_moments_, chosen);
  return norm;
}

namespace {

// √Σg² over the gradients of all ranks.
at::Tensor global_norm(const std::vector<at::Tensor>& gradients, ProcessGroup& group) {
  at::Tensor square = at::zeros({}, at::TensorOptions(group.device()).dtype(at::kDouble));
  if (!gradients.empty()) {
    square = gradients.front().is_cpu() ? at::scalar_tensor(operators::global_norm(gradients), at::kDouble)
                                        : operators::global_norm_device(gradients);
    square = square.square();
  }
  group.all_reduce(square).wait();
  return square.sqrt();
}

}  // namespace

at::Tensor Optimizer::clip_and_update(int64_t step, double learning_rate, double clip,
                                      const std::vector<at::Tensor>& gradients, ProcessGroup& group) {
  const at::NoGradGuard no_grad;
  const at::Tensor norm = global_norm(gradients, group);
  if (parameters_.empty()) return norm;  // more ranks than this model has weights for
  operators::AdamwOptions chosen = options(step, learning_rate);
  if (parameters_.front().is_cpu()) {
    chosen.gradient_scale = clip_scale(norm.item<double>(), clip);
  } else if (clip > 0) {
    chosen.gradient_scale_tensor = (clip / (norm + 1e-6)).clamp_max(1);
  }
  operators::adamw_step(parameters_, gradients, first_moments_, second_moments_, chosen);
  return norm;
}

void Optimizer::clear_gradients() {
  for (at::Tensor& parameter : parameters_) parameter.mutable_grad().reset();
}

std::vector<std::pair<std::string, at::Tensor>> Optimizer::moments() const {
  std::vector<std::pair<std::string, at::Tensor>> moments;
  for (size_t i = 0; i < names_.size(); ++i)
    moments.emplace_back("first_moment." + names_[i], first_moments_[i]);
  for (size_t i = 0; i < names_.size(); ++i)
    moments.emplace_back("second_moment." + names_[i], second_moments_[i]);
  return moments;
}

}  // namespace oryx::training
