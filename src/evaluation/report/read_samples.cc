#include "base/error.h"
#include "evaluation/report/json_fields.h"
#include "evaluation/report/sources.h"
#include "formats/file.h"
#include "formats/json.h"

namespace oryx::evaluation {

namespace {

Sample read_sample(const JsonFields& fields) {
  Sample sample;
  sample.model = fields.text("model", "");
  sample.schedule = fields.text("schedule", "");
  sample.prompt_tokens = fields.integer("prompt_tokens", 0);
  const Value* ids = fields.find("ids");
  if (ids && ids->as<Array>()) sample.tokens = static_cast<int64_t>(ids->as<Array>()->size());
  for (const JsonFields& piece : fields.objects("pieces")) {
    const std::string mode = piece.text("mode");
    expect(mode == "attention" || mode == "linear", "{}: mode is {}, expected attention or linear",
           piece.where(), mode);
    sample.pieces.push_back({piece.text("text"), mode, piece.flag("prompt", false)});
  }
  return sample;
}

}  // namespace

SampleSource read_samples(const SourceName& name) {
  SampleSource source{name, {}};
  const std::string text = formats::read_file(name.path);
  int64_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = std::string_view(text).substr(begin, end - begin);
    ++number;
    begin = end + 1;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    // Anything may be named on the command line: the message says what a file is for.
    Value value;
    try {
      value = formats::parse_json(line, fmt::format("{}:{}", name.path, number));
    } catch (const Error& error) {
      fail("{} is no file of samples (what oryx generate --json prints): {}", name.path, error.what());
    }
    const Table* table = value.as<Table>();
    expect(table && table->find("pieces"),
           "{}:{} is no sample: expected an object with \"pieces\", as oryx generate --json prints",
           name.path, number);
    source.samples.push_back(read_sample(JsonFields(*table, fmt::format("{}:{}", name.path, number))));
  }
  expect(!source.samples.empty(), "{} holds no sample", name.path);
  return source;
}

}  // namespace oryx::evaluation
