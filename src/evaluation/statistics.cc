#include "evaluation/statistics.h"

#include <cmath>
#include <map>
#include <numeric>
#include <utility>

#include "model/cost.h"

namespace oryx::evaluation {

namespace {

double sum(const std::vector<double>& values) { return std::accumulate(values.begin(), values.end(), 0.0); }

// Of the mean, from deviations that add up to zero.
std::optional<double> error_of_mean(const std::vector<double>& deviations) {
  const auto n = static_cast<double>(deviations.size());
  if (n < 2) return std::nullopt;
  double squares = 0;
  for (const double deviation : deviations) squares += deviation * deviation;
  return std::sqrt(squares / (n - 1) / n);
}

// Nats per unit of weight.
Metric ratio_metric(std::string name, const std::vector<double>& log_likelihoods,
                    const std::vector<double>& weights) {
  const double total = sum(weights);
  Metric metric{std::move(name), -sum(log_likelihoods) / total};
  const double mean_weight = total / static_cast<double>(weights.size());
  std::vector<double> deviations;
  for (size_t i = 0; i < weights.size(); ++i) {
    deviations.push_back((-log_likelihoods[i] - metric.value * weights[i]) / mean_weight);
  }
  metric.standard_error = error_of_mean(deviations);
  return metric;
}

Metric exponentiated(Metric metric) {
  metric.value = std::exp(metric.value);
  if (metric.standard_error) *metric.standard_error *= metric.value;
  return metric;
}

}  // namespace

Metric mean_metric(std::string name, const std::vector<double>& values) {
  const double mean = sum(values) / static_cast<double>(values.size());
  std::vector<double> deviations;
  for (const double value : values) deviations.push_back(value - mean);
  return {std::move(name), mean, error_of_mean(deviations)};
}

Metric perplexity_metric(std::string name, const std::vector<double>& log_likelihoods) {
  Metric metric = mean_metric(std::move(name), log_likelihoods);
  metric.value = -metric.value;
  return exponentiated(std::move(metric));
}

Metric weighted_perplexity_metric(std::string name, const std::vector<double>& log_likelihoods,
                                  const std::vector<double>& weights) {
  return exponentiated(ratio_metric(std::move(name), log_likelihoods, weights));
}

Metric bits_metric(std::string name, const std::vector<double>& log_likelihoods,
                   const std::vector<double>& weights) {
  Metric metric = ratio_metric(std::move(name), log_likelihoods, weights);
  metric.value /= std::log(2.0);
  if (metric.standard_error) *metric.standard_error /= std::log(2.0);
  return metric;
}

struct CostMeter::Known {
  std::map<std::vector<std::pair<int64_t, schedule::Mode>>, double> flops;  // by the spans' ends and modes
};

CostMeter::CostMeter(const model::ModelConfig& config, at::ScalarType dtype)
    : config_(config), dtype_(dtype), known_(std::make_unique<Known>()) {}
CostMeter::~CostMeter() = default;

void CostMeter::add(const schedule::ModeSpans& modes) {
  std::vector<std::pair<int64_t, schedule::Mode>> key;
  for (const schedule::ModeSpan& span : modes) key.emplace_back(span.end, span.mode);
  const auto [entry, is_new] = known_->flops.try_emplace(std::move(key));
  if (is_new) entry->second = model::count_flops(config_, modes).total();
  ++cost_.sequences;
  cost_.tokens += schedule::total_tokens(modes);
  cost_.attention_tokens += schedule::attention_tokens(modes);
  cost_.flops += entry->second;
}

TaskCost CostMeter::total() const {
  TaskCost cost = cost_;
  const model::StateBytes bytes = model::count_state_bytes(config_, dtype_);
  if (cost.sequences > 0) {
    cost.state_bytes = bytes.per_sequence + bytes.per_token * cost.tokens / cost.sequences;
  }
  return cost;
}

}  // namespace oryx::evaluation
