#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <functional>
#include <set>

#include "base/config_fields.h"
#include "evaluation/report/report.h"
#include "evaluation/report/section_tools.h"
#include "formats/json.h"
#include "model/cost.h"

namespace oryx::evaluation {

namespace {

using schedule::Mode;

// A column: models of one architecture share it.
struct Column {
  std::vector<std::string> labels;
  model::ModelConfig config;
  std::string key;
};

void add(std::vector<Column>& columns, const std::string& label, const model::ModelConfig& config) {
  const std::string key = formats::to_json(field_table(config));
  for (Column& column : columns) {
    if (column.key != key) continue;
    if (std::find(column.labels.begin(), column.labels.end(), label) == column.labels.end())
      column.labels.push_back(label);
    return;
  }
  columns.push_back({{label}, config, key});
}

Row row_of(const char* name, const std::vector<Column>& columns,
           const std::function<std::string(const Column&)>& text) {
  Row row = {{name}};
  for (const Column& column : columns) row.push_back(number_cell(text(column)));
  return row;
}

std::string flops_per_token(const model::ModelConfig& config, Mode mode, int64_t length) {
  if (!config.has_mode(mode)) return "–";
  const model::Flops flops = model::count_flops(config, {{0, length, mode}});
  return fmt::format("{:.2f}", flops.total() / static_cast<double>(length) * 1e-6);
}

std::vector<Row> size_rows(const std::vector<Column>& columns) {
  constexpr int64_t kLength = 2048;
  std::vector<Row> rows;
  rows.push_back(row_of("Mixers", columns, [](const Column& c) {
    const std::string mixers = escape_markup(fmt::format("{}", fmt::join(c.config.mixers, " + ")));
    return c.config.hybrid == "none" ? mixers
                                     : fmt::format("{} ({})", mixers, escape_markup(c.config.hybrid));
  }));
  rows.push_back(row_of("Layers × width", columns, [](const Column& c) {
    return fmt::format("{} × {}", c.config.layers, c.config.width);
  }));
  rows.push_back(row_of("Query heads × dimension", columns, [](const Column& c) {
    return fmt::format("{} × {}", c.config.heads, c.config.head_dim);
  }));
  rows.push_back(row_of("Value heads × dimension", columns, [](const Column& c) {
    return fmt::format("{} × {}", c.config.value_heads, c.config.value_dim);
  }));
  rows.push_back(
      row_of("MLP width", columns, [](const Column& c) { return fmt::format("{}", c.config.mlp_width); }));
  rows.push_back(
      row_of("Vocabulary", columns, [](const Column& c) { return fmt::format("{}", c.config.vocabulary); }));
  rows.push_back(row_of("Parameters stored", columns, [](const Column& c) {
    return count_text(static_cast<double>(model::count_parameters(c.config).total));
  }));
  for (const Mode mode : {Mode::attention, Mode::linear}) {
    const std::string name = fmt::format("Active in {}", schedule::mode_name(mode));
    rows.push_back(row_of(name.c_str(), columns, [&](const Column& c) -> std::string {
      if (!c.config.has_mode(mode)) return "–";
      return count_text(static_cast<double>(model::count_parameters(c.config).active(mode)));
    }));
  }
  rows.push_back(row_of("Block weights of a mode that are tied", columns, [](const Column& c) -> std::string {
    if (!c.config.is_switchable()) return "–";
    return fmt::format("{:.1f}%",
                       100 * model::count_parameters(c.config).tied_share_of_mode(Mode::attention));
  }));
  rows.push_back(row_of("State a token (float32)", columns, [](const Column& c) {
    return bytes_text(static_cast<double>(model::count_state_bytes(c.config, at::kFloat).per_token));
  }));
  rows.push_back(row_of("State a sequence (float32)", columns, [](const Column& c) {
    return bytes_text(static_cast<double>(model::count_state_bytes(c.config, at::kFloat).per_sequence));
  }));
  for (const Mode mode : {Mode::attention, Mode::linear}) {
    const std::string name = fmt::format("MFLOP a token in {}, 2048 tokens", schedule::mode_name(mode));
    rows.push_back(row_of(name.c_str(), columns,
                          [&](const Column& c) { return flops_per_token(c.config, mode, kLength); }));
  }
  return rows;
}

// Every other key: those in which the models differ as rows, the others in one paragraph.
struct Options {
  std::vector<Row> rows;
  std::string same;
};

Options options_of(const std::vector<Column>& columns) {
  static const std::set<std::string> kShown = {"layers",     "width",       "heads",     "head_dim",
                                               "kv_heads",   "value_heads", "value_dim", "mlp_width",
                                               "vocabulary", "mixers",      "hybrid",    "format_version"};
  Options options;
  for (const Entry& entry : field_table(columns[0].config).entries) {
    if (kShown.contains(entry.key)) continue;
    const std::string key = escape_markup(entry.key);
    Row row = {{fmt::format("<code>{}</code>", key)}};
    std::set<std::string> values;
    for (const Column& column : columns) {
      const Table table = field_table(column.config);
      const Value* value = table.find(entry.key);
      const std::string* text = value ? value->as<std::string>() : nullptr;
      const std::string shown = escape_markup(text ? *text : value ? value->text() : "–");
      values.insert(shown);
      row.push_back(number_cell(shown));
    }
    if (values.size() > 1) {
      options.rows.push_back(std::move(row));
    } else {
      options.same += fmt::format("<code><b>{}</b> {}</code> ", key, *values.begin());
    }
  }
  return options;
}

}  // namespace

Section models_section(const Sources& sources) {
  std::vector<Column> columns;
  for (const TrainingSource& run : sources.training) {
    if (run.config) add(columns, run.name.label, *run.config);
  }
  for (const ModelSource& source : sources.models) add(columns, source.name.label, source.config);
  for (const EvaluationSource& evaluation : sources.evaluations) {
    if (evaluation.config) add(columns, evaluation_label(evaluation, sources), *evaluation.config);
  }
  Section section{"models", "Models", ""};
  if (columns.empty()) return section;
  HtmlTable table;
  Row head = {{""}};
  for (const Column& column : columns)
    head.push_back({escape_markup(fmt::format("{}", fmt::join(column.labels, ", "))), "number"});
  table.head = {head};
  const Options options = options_of(columns);
  table.groups = {{"Sizes and costs", size_rows(columns)}};
  if (!options.rows.empty()) table.groups.push_back({"Options in which they differ", options.rows});
  if (columns.size() < 3) table.css = "narrow";
  table.caption =
      "Operations of one forward pass by the cost model, multiplications and additions counted apart.";
  section.html = to_html(table);
  section.html +=
      fmt::format("<p class=\"note same\">{} {}</p>\n",
                  columns.size() > 1 ? "The same in all:" : "Options of the block:", options.same);
  return section;
}

}  // namespace oryx::evaluation
