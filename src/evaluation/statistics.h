// Means, their standard errors, and what follows from log-likelihoods.
#pragma once

#include <string>
#include <vector>

#include "evaluation/task.h"

namespace oryx::evaluation {

// Standard error: sample standard deviation / √n.
Metric mean_metric(std::string name, const std::vector<double>& values);

// exp(−mean) of log-likelihoods; the standard error by the delta method: value · that of the mean.
Metric perplexity_metric(std::string name, const std::vector<double>& log_likelihoods);

// exp(−Σ log-likelihoods / Σ weights), weights being words or bytes. The standard error by the delta method,
// the ratio's own linearised over items.
Metric weighted_perplexity_metric(std::string name, const std::vector<double>& log_likelihoods,
                                  const std::vector<double>& weights);

// −Σ log-likelihoods / Σ weights / ln 2, alike.
Metric bits_metric(std::string name, const std::vector<double>& log_likelihoods,
                   const std::vector<double>& weights);

// Counts what sequences cost; equal schedules are counted once.
class CostMeter {
 public:
  CostMeter(const model::ModelConfig& config, at::ScalarType dtype);
  ~CostMeter();

  void add(const schedule::ModeSpans& modes);
  TaskCost total() const;

 private:
  const model::ModelConfig& config_;
  at::ScalarType dtype_;
  TaskCost cost_;
  struct Known;
  std::unique_ptr<Known> known_;
};

}  // namespace oryx::evaluation
