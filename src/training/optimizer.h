// The update of the weights: AdamW over every parameter, the learning rate of each step, clipping.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "model/weights.h"
#include "operators/adamw/adamw.h"
#include "training/buckets.h"

namespace oryx::training {

// Linear warm-up, then a cosine down to a floor. For steps s = 0 … S−1 and w = ⌊warmup_fraction · S⌋:
//   s < w:  peak · (s + 1) / w
//   else:   floor + (peak − floor) · ½(1 + cos(π(s − w)/(S − w)))
struct LearningRate {
  double peak = 3e-3;
  double floor = 1e-5;
  double warmup_fraction = 0.1;
  int64_t steps = 1;

  double at(int64_t step) const;
};

// min(1, limit / (norm + 1e-6)); 1 when limit is 0, which means no clipping.
double clip_scale(double norm, double limit);

struct AdamwRates {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double weight_decay = 0.1;  // of tensors with two dimensions and more
};

class ProcessGroup;

// Owns the moments of the weights it is given (whose tensors it shares and updates in place).
class Optimizer {
 public:
  // Makes the weights leaves that collect gradients, and all moments zero.
  Optimizer(model::Weights& weights, const AdamwRates& rates);

  // Updates the given pieces of the weights only, and holds the moments of these alone: other ranks do the
  // rest. `masters`, one flat tensor a piece, are what it updates; the weights are for their user to keep up.
  Optimizer(model::Weights& weights, const AdamwRates& rates, const std::vector<Piece>& pieces,
            const std::vector<at::Tensor>& masters);

  // √Σg² over all parameters. A parameter that no token used counts as zero.
  double gradient_norm() const;

  // update() with the gradients scaled to a norm of at most `clip` (0: as they are). Returns the norm they
  // had, 0-dimensional on the device of the weights; on a GPU nothing waits for it.
  at::Tensor clip_and_update(int64_t step, double learning_rate, double clip);

  // The same for pieces, with the gradient of each; the norm is that over the pieces of all ranks.
  at::Tensor clip_and_update(int64_t step, double learning_rate, double clip,
                             const std::vector<at::Tensor>& gradients, ProcessGroup& group);

  // Update number `step` (0 for the first), with every gradient multiplied by `gradient_scale`. A parameter
  // without a gradient has gradient zero: its moments and its decay still apply.
  void update(int64_t step, double learning_rate, double gradient_scale);

  // Lets go of the gradients, so that the next backward pass writes fresh ones without adding to zeros.
  void clear_gradients();

  // `first_moment.NAME` and `second_moment.NAME` for every parameter: the tensors themselves, not copies.
  std::vector<std::pair<std::string, at::Tensor>> moments() const;

  // In the order of the parameters, or of the pieces: what is updated, and the moments.
  const std::vector<at::Tensor>& parameters() const { return parameters_; }
  const std::vector<at::Tensor>& first_moments() const { return first_moments_; }
  const std::vector<at::Tensor>& second_moments() const { return second_moments_; }

 private:
  void add(const std::string& name, const at::Tensor& parameter, bool decays);
  std::vector<at::Tensor> gradients() const;
  operators::AdamwOptions options(int64_t step, double learning_rate) const;

  AdamwRates rates_;
  std::vector<std::string> names_;
  std::vector<at::Tensor> parameters_, first_moments_, second_moments_;
  std::vector<double> weight_decay_;
};

}  // namespace oryx::training
