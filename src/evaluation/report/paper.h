// The figures that the paper reports ("Multi-Mixer Models", arXiv 2605.28769), to stand beside measured ones.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

namespace oryx::evaluation {

// Models in one mode each, in the paper's order.
enum class PaperModel {
  transformer,
  mamba2,
  gated_deltanet,
  tm_attention,
  tm_linear,
  tg_attention,
  tg_linear
};
constexpr int kPaperModels = 7;
const char* paper_model_name(PaperModel model);

// The average accuracy of the seven language tasks after 100 billion tokens, in per cent.
struct PaperLanguage {
  const char* size;
  double parameters;
  std::array<double, kPaperModels> average;
};
extern const std::array<PaperLanguage, 4> kPaperLanguage;

// Averages of retrieval from real texts and of the three needle tasks at 1.4 billion parameters, in per cent.
struct PaperRetrieval {
  const char* model;
  const char* mode;
  double retrieval, needle;
};
extern const std::array<PaperRetrieval, 11> kPaperRetrieval;

// The variant of these mixers as the paper names it ("TM", "TG", "Transformer", "Mamba-2", "GDN"); empty for
// others.
std::string paper_variant(const std::vector<std::string>& mixers);

// The language average of a model of these mixers under this schedule, at the size nearest to `parameters`.
struct PaperFigure {
  double value;
  const char* size;
};
std::optional<PaperFigure> paper_language(const std::vector<std::string>& mixers, const std::string& schedule,
                                          double parameters);
// The row of kPaperRetrieval for these mixers under this schedule; null if the paper has none.
const PaperRetrieval* paper_retrieval(const std::vector<std::string>& mixers, const std::string& schedule);

}  // namespace oryx::evaluation
