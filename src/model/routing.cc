#include "model/routing.h"

#include <ATen/ATen.h>

#include <fmt/ranges.h>

#include "base/device_copy.h"
#include "base/error.h"
#include "operators/activations.h"
#include "operators/rotary/rotary.h"

namespace oryx::model {

namespace {

struct Builder {
  std::vector<int64_t> spans, rows;

  void add(int64_t sequence, int64_t begin, int64_t end, int64_t time) {
    spans.insert(spans.end(), {sequence, begin, end});
    for (int64_t t = begin; t < end; ++t) rows.push_back(sequence * time + t);
  }
};

void set_spans(Selection& selection, const std::vector<int64_t>& values, int64_t position) {
  selection.spans = at::tensor(values, at::kLong).view({-1, 3});
  selection.spans_in_sequence =
      position == 0 ? selection.spans
                    : selection.spans + at::tensor({int64_t{0}, position, position}, at::kLong);
}

}  // namespace

Routing route(const ModelConfig& config, const std::vector<schedule::ModeSpans>& spans, int64_t batch,
              int64_t time, int64_t position, at::ScalarType dtype, at::Device device) {
  expect(spans.size() == 1 || static_cast<int64_t>(spans.size()) == batch,
         "expected one schedule or {} (one a sequence), got {}", batch, spans.size());
  Routing routing;
  routing.batch = batch;
  routing.time = time;
  routing.position = position;

  Selection& everything = routing.everything;
  if (config.rope != "none") {
    std::tie(everything.cosine, everything.sine) = operators::rotary_tables(
        at::arange(position, position + time, at::TensorOptions(at::kLong).device(device)), config.head_dim,
        config.rope_base, operators::accumulate_type(dtype));
  }
  everything.count = batch * time;
  Builder all;
  for (int64_t b = 0; b < batch; ++b) all.spans.insert(all.spans.end(), {b, 0, time});
  set_spans(everything, all.spans, position);

  Builder builders[2];
  for (int64_t b = 0; b < batch; ++b) {
    const schedule::ModeSpans& own = spans[spans.size() == 1 ? 0 : b];
    int64_t covered = position;
    for (const schedule::ModeSpan& span : own) {
      const int64_t begin = std::max(span.begin, position), end = std::min(span.end, position + time);
      if (begin >= end) continue;
      expect(begin == covered, "the schedule leaves token {} without a mode", covered);
      if (!config.has_mode(span.mode)) {
        fail("the schedule asks for {} at token {}, but the model's mixers are {}",
             schedule::mode_name(span.mode), begin, fmt::join(config.mixers, ", "));
      }
      builders[span.mode == schedule::Mode::linear].add(b, begin - position, end - position, time);
      covered = end;
    }
    expect(covered == position + time, "the schedule ends at token {}, expected {}", covered,
           position + time);
  }
  if (!config.is_switchable()) return routing;

  Selection* selections[2] = {&routing.attention, &routing.linear};
  for (int i = 0; i < 2; ++i) {
    Selection& selection = *selections[i];
    const int64_t count = static_cast<int64_t>(builders[i].rows.size());
    if (count == everything.count) {
      selection = everything;
      continue;
    }
    selection.count = count;
    set_spans(selection, builders[i].spans, position);
    selection.rows = copy_to(at::tensor(builders[i].rows, at::kLong), device);
    if (everything.cosine.defined()) {
      const at::Tensor offsets = selection.rows->remainder(time);
      selection.cosine = everything.cosine.index_select(0, offsets);
      selection.sine = everything.sine.index_select(0, offsets);
    }
  }
  return routing;
}

}  // namespace oryx::model
