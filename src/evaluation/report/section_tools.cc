#include "evaluation/report/section_tools.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

namespace oryx::evaluation {

std::string plural(size_t count, const std::string& word) {
  return fmt::format("{} {}{}", count, word, count == 1 ? "" : "s");
}

void ItemRange::add(int64_t items) {
  fewest = std::min(fewest, items);
  most = std::max(most, items);
}

std::string ItemRange::text() const {
  return fewest == most ? fmt::format("{}", most) : fmt::format("{} to {}", fewest, most);
}

Points thinned(const Points& points, size_t buckets, size_t& per_bucket) {
  per_bucket = std::max<size_t>(1, (points.x.size() + buckets - 1) / buckets);
  Points result;
  for (size_t begin = 0; begin < points.x.size(); begin += per_bucket) {
    const size_t end = std::min(points.x.size(), begin + per_bucket);
    double x = 0, y = 0;
    for (size_t i = begin; i < end; ++i) {
      x += points.x[i];
      y += points.y[i];
    }
    result.x.push_back(x / static_cast<double>(end - begin));
    result.y.push_back(y / static_cast<double>(end - begin));
  }
  return result;
}

Unit unit_for(double largest) {
  if (largest >= 2e9) return {1e9, "billion"};
  if (largest >= 2e6) return {1e6, "million"};
  if (largest >= 2e3) return {1e3, "thousand"};
  return {1, ""};
}

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

std::string task_title(const std::string& task) {
  static const std::map<std::string, std::string> kTitles = {{"lambada", "LAMBADA"},
                                                             {"hellaswag", "HellaSwag"},
                                                             {"piqa", "PIQA"},
                                                             {"arc_easy", "ARC-easy"},
                                                             {"arc_challenge", "ARC-challenge"},
                                                             {"openbookqa", "OpenBookQA"},
                                                             {"winogrande", "WinoGrande"},
                                                             {"wikitext", "WikiText"},
                                                             {"squad", "SQuAD"},
                                                             {"drop", "DROP"},
                                                             {"needle_single_1", "Needle, single 1"},
                                                             {"needle_single_2", "Needle, single 2"},
                                                             {"needle_single_3", "Needle, single 3"},
                                                             {"needle_multikey_1", "Needle, multi-key 1"},
                                                             {"needle_multikey_2", "Needle, multi-key 2"},
                                                             {"needle_multikey_3", "Needle, multi-key 3"},
                                                             {"kv_uuid", "UUID keys and values"},
                                                             {"mqar", "MQAR"}};
  const auto found = kTitles.find(task);
  return found == kTitles.end() ? task : found->second;
}

bool is_loss(const std::string& metric) {
  for (const char* part : {"ppl", "perplexity", "loss", "bits"}) {
    if (metric.find(part) != std::string::npos) return true;
  }
  return false;
}

namespace {

// Of perplexities and losses: three digits or more.
int decimals_of(double value) { return value >= 100 ? 0 : value >= 10 ? 2 : 3; }

}  // namespace

std::string metric_text(const std::string& metric, double value) {
  if (!is_loss(metric)) return fmt::format("{:.1f}", 100 * value);
  return value >= 1e4 ? fmt::format("{:.3g}", value) : fmt::format("{:.{}f}", value, decimals_of(value));
}

std::string error_text(const std::string& metric, double value, double error) {
  if (!is_loss(metric)) return fmt::format("{:.1f}", 100 * error);
  return value >= 1e4 ? fmt::format("{:.2g}", error) : fmt::format("{:.{}f}", error, decimals_of(value));
}

std::string metric_title(const std::string& metric) {
  std::string title = metric;
  if (const size_t at = title.find("perplexity"); at != std::string::npos) title.replace(at, 10, "ppl");
  std::replace(title.begin(), title.end(), '_', ' ');
  return title;
}

std::string evaluation_label(const EvaluationSource& evaluation, const Sources& sources) {
  for (const EvaluationSource& other : sources.evaluations) {
    if (&other != &evaluation && other.name.label == evaluation.name.label) {
      return fmt::format("{} ({})", evaluation.name.label, evaluation.model);
    }
  }
  return evaluation.name.label;
}

std::vector<std::string> comparable_mixers(const EvaluationSource& evaluation) {
  if (evaluation.config && evaluation.config->hybrid != "none") return {};
  return evaluation.mixers;
}

}  // namespace oryx::evaluation
