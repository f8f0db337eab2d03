// What several sections of the report need.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "evaluation/report/sources.h"

namespace oryx::evaluation {

// "1 window", "3 windows".
std::string plural(size_t count, const std::string& word);

// At most `buckets` points: means of as many runs of neighbours, x and y alike. `per_bucket` takes the number
// of points that one stands for.
Points thinned(const Points& points, size_t buckets, size_t& per_bucket);

// The unit in which numbers up to `largest` are short: its divisor and its name ("million", or "").
struct Unit {
  double divisor;
  std::string name;
};
Unit unit_for(double largest);

double median(std::vector<double> values);

// Of how many items several numbers are: "100", or "80 to 100".
struct ItemRange {
  int64_t fewest = INT64_MAX, most = 0;

  void add(int64_t items);
  std::string text() const;
};

// "LAMBADA", "ARC-easy"; a name that is not known as it is.
std::string task_title(const std::string& task);

// Whether less is better: perplexities, losses and bits.
bool is_loss(const std::string& metric);
// "41.2" of a fraction, "23.71" of a perplexity.
std::string metric_text(const std::string& metric, double value);
// A standard error, with as many digits as the value it belongs to.
std::string error_text(const std::string& metric, double value, double error);
// "word ppl" for word_perplexity: column heads are narrow.
std::string metric_title(const std::string& metric);

// Evaluations of one label are told apart by their model.
std::string evaluation_label(const EvaluationSource& evaluation, const Sources& sources);

// The mixers as the paper tells models apart: none for static hybrids, which it does not have.
std::vector<std::string> comparable_mixers(const EvaluationSource& evaluation);

}  // namespace oryx::evaluation
