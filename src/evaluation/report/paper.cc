#include "evaluation/report/paper.h"

#include <algorithm>
#include <cmath>
#include <string_view>

namespace oryx::evaluation {

namespace {

// What a schedule is in the paper's words: the mode of the context, and of the answer where that differs.
std::string paper_mode(const std::string& schedule) {
  if (schedule == "attention" || schedule == "linear") return schedule;
  // linear,attention@97.5%, linear,attention@query and linear->attention.
  for (const char* separator : {"->", ","}) {
    const size_t at = schedule.find(separator);
    if (at == std::string::npos) continue;
    const std::string first = schedule.substr(0, at);
    const std::string rest = schedule.substr(at + std::string_view(separator).size());
    const std::string second = rest.substr(0, rest.find('@'));
    if (rest.find(',') != std::string::npos) return "";
    // The paper splits at the question, or after 97.5% of the tokens.
    const size_t start = rest.find('@');
    const std::string where = start == std::string::npos ? "query" : rest.substr(start + 1);
    if (where != "query" && where != "97.5%") return "";
    const bool modes =
        (first == "attention" || first == "linear") && (second == "attention" || second == "linear");
    return modes ? first + "->" + second : "";
  }
  return "";
}

}  // namespace

const std::array<PaperLanguage, 4> kPaperLanguage = {{
    {"130M", 131e6, {42.3, 42.9, 43.7, 43.5, 43.3, 42.9, 42.2}},
    {"380M", 380.7e6, {49.2, 50.4, 50.1, 50.6, 50.9, 49.2, 50.0}},
    {"810M", 814e6, {53.1, 53.8, 54.2, 54.7, 54.7, 53.2, 54.0}},
    {"1.4B", 1419e6, {55.6, 55.7, 56.6, 56.3, 56.6, 56.5, 57.3}},
}};

const std::array<PaperRetrieval, 11> kPaperRetrieval = {{
    {"Transformer", "attention", 42.6, 94.8},
    {"Mamba-2", "linear", 30.3, 46.5},
    {"GDN", "linear", 32.8, 57.2},
    {"TM", "attention", 44.0, 93.6},
    {"TM", "linear", 31.0, 36.3},
    {"TM", "linear->attention", 43.9, 85.1},
    {"TM", "attention->linear", 30.5, 36.7},
    {"TG", "attention", 41.1, 99.1},
    {"TG", "linear", 32.5, 80.8},
    {"TG", "linear->attention", 41.4, 97.5},
    {"TG", "attention->linear", 32.3, 87.1},
}};

const char* paper_model_name(PaperModel model) {
  constexpr std::array<const char*, kPaperModels> kNames = {
      "Transformer", "Mamba-2", "GDN", "TM attention", "TM linear", "TG attention", "TG linear"};
  return kNames[static_cast<size_t>(model)];
}

std::string paper_variant(const std::vector<std::string>& mixers) {
  const auto is = [&](std::vector<std::string> wanted) { return mixers == wanted; };
  if (is({"attention", "ssd"}) || is({"ssd", "attention"})) return "TM";
  if (is({"attention", "gated_delta"}) || is({"gated_delta", "attention"})) return "TG";
  if (is({"attention"})) return "Transformer";
  if (is({"ssd"})) return "Mamba-2";
  if (is({"gated_delta"})) return "GDN";
  return "";
}

std::optional<PaperFigure> paper_language(const std::vector<std::string>& mixers, const std::string& schedule,
                                          double parameters) {
  const std::string variant = paper_variant(mixers), mode = paper_mode(schedule);
  if (parameters <= 0) return std::nullopt;
  const PaperLanguage& row =
      *std::min_element(kPaperLanguage.begin(), kPaperLanguage.end(), [&](const auto& a, const auto& b) {
        return std::abs(std::log(a.parameters / parameters)) < std::abs(std::log(b.parameters / parameters));
      });
  for (int i = 0; i < kPaperModels; ++i) {
    const std::string name = paper_model_name(static_cast<PaperModel>(i));
    if (name == variant || name == variant + " " + mode) return PaperFigure{row.average[i], row.size};
  }
  return std::nullopt;
}

const PaperRetrieval* paper_retrieval(const std::vector<std::string>& mixers, const std::string& schedule) {
  const std::string variant = paper_variant(mixers), mode = paper_mode(schedule);
  for (const PaperRetrieval& row : kPaperRetrieval) {
    if (row.model == variant && row.mode == mode) return &row;
  }
  return nullptr;
}

}  // namespace oryx::evaluation
