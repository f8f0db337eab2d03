#include <algorithm>
#include <cmath>
#include <filesystem>

#include "base/error.h"
#include "evaluation/report/json_fields.h"
#include "evaluation/report/sources.h"
#include "formats/json.h"

namespace oryx::evaluation {

namespace {

namespace fs = std::filesystem;
using schedule::Mode;

Mode mode_of(const std::string& text, const std::string& where) {
  expect(text == "attention" || text == "linear", "{}: mode is {}, expected attention or linear", where,
         text);
  return text == "attention" ? Mode::attention : Mode::linear;
}

std::vector<ExcessRow> read_excess(const JsonFields& fields, const char* key) {
  std::vector<ExcessRow> rows;
  for (const JsonFields& row : fields.objects(key)) {
    rows.push_back(
        {row.integer("begin"), row.integer("end"), row.number("excess_loss"), row.number("standard_error")});
  }
  return rows;
}

CurveSchedule read_schedule(const JsonFields& fields, int64_t length) {
  CurveSchedule curve;
  CurveLine& line = curve.line;
  line.schedule = fields.text("schedule");
  line.is_reference = fields.flag("reference", false);
  curve.perplexity = fields.number("perplexity");
  line.curve.perplexity = fields.numbers("smoothed_perplexity");
  line.curve.low = fields.numbers("smoothed_perplexity_low");
  line.curve.high = fields.numbers("smoothed_perplexity_high");
  for (const std::vector<double>* values : {&line.curve.perplexity, &line.curve.low, &line.curve.high}) {
    const bool fits = static_cast<int64_t>(values->size()) == length ||
                      (values->empty() && values != &line.curve.perplexity);
    expect(fits, "{}: a curve of {} positions, expected {}", fields.where(), values->size(), length);
  }
  for (const JsonFields& row : fields.objects("switches")) {
    curve.switches.push_back({row.integer("position"), row.text("from"), row.text("to"),
                              read_excess(row, "excess"), read_excess(row, "bins")});
  }
  const std::vector<JsonFields> modes = fields.objects("modes");
  if (modes.empty()) {
    // Written before curve.json held modes: its text says them, for windows of this length.
    const schedule::ModeSpans spans = schedule::Schedule::parse(line.schedule).spans(length, length);
    line.first = spans.front().mode;
    line.last = spans.back().mode;
    for (size_t i = 1; i < spans.size(); ++i) line.switches.push_back(spans[i].begin);
    return curve;
  }
  line.first = mode_of(modes.front().text("mode"), fields.where());
  line.last = mode_of(modes.back().text("mode"), fields.where());
  for (size_t i = 1; i < modes.size(); ++i) line.switches.push_back(modes[i].integer("begin"));
  return curve;
}

}  // namespace

CurveSource read_curve(const SourceName& name) {
  const std::string file = (fs::path(name.path) / "curve.json").string();
  const Table table = formats::read_json(file);
  const JsonFields fields(table, file);
  CurveSource source;
  source.name = name;
  source.model = fields.text("model", "");
  source.data = fields.text("data", "");
  source.dtype = fields.text("dtype", "");
  source.windows = fields.integer("windows");
  source.length = fields.integer("length");
  source.smooth = fields.integer("smooth");
  expect(source.windows > 0 && source.length > 1 && source.smooth > 0, "{} holds no windows", file);
  for (const JsonFields& curve : fields.objects("curves"))
    source.curves.push_back(read_schedule(curve, source.length));
  expect(!source.curves.empty(), "{} holds no curve", file);
  return source;
}

}  // namespace oryx::evaluation
