#include "model/routing.h"

#include <ATen/ATen.h>

#include <algorithm>

#include <fmt/ranges.h>

#include "base/device_copy.h"
#include "base/error.h"
#include "operators/activations.h"
#include "operators/merge_rows/merge_rows.h"
#include "operators/rotary/rotary.h"

namespace oryx::model {

namespace {

struct Builder {
  std::vector<int64_t> spans, tokens;

  void add(int64_t sequence, int64_t begin, int64_t end, int64_t time) {
    spans.insert(spans.end(), {sequence, begin, end});
    for (int64_t t = begin; t < end; ++t) tokens.push_back(sequence * time + t);
  }
};

void set_spans(Selection& selection, const std::vector<int64_t>& values,
               const std::vector<int64_t>& positions) {
  selection.spans = at::tensor(values, at::kLong).view({-1, 3});
  selection.spans_in_sequence = selection.spans;
  if (std::all_of(positions.begin(), positions.end(), [](int64_t position) { return position == 0; })) return;
  std::vector<int64_t> moved = values;
  for (size_t i = 0; i < moved.size(); i += 3) {
    moved[i + 1] += positions[moved[i]];
    moved[i + 2] += positions[moved[i]];
  }
  selection.spans_in_sequence = at::tensor(moved, at::kLong).view({-1, 3});
}

// The tables of all rows: [time] of them where sequences are at one position, else [batch · time].
void set_rotation(Selection& everything, const ModelConfig& config, const Piece& piece, at::ScalarType dtype,
                  at::Device device) {
  const auto [first, last] = std::minmax_element(piece.positions.begin(), piece.positions.end());
  std::tie(everything.cosine, everything.sine) = operators::rotary_tables(
      at::arange(*first, *last + piece.time, at::TensorOptions(at::kLong).device(device)), config.head_dim,
      config.rope_base, operators::accumulate_type(dtype));
  if (*first == *last) return;
  at::Tensor rows = at::empty({piece.batch, piece.time}, at::kLong);
  int64_t* row = rows.mutable_data_ptr<int64_t>();
  for (const int64_t position : piece.positions) {
    for (int64_t t = 0; t < piece.time; ++t) *row++ = position - *first + t;
  }
  rows = copy_to(rows.view(-1), device);
  everything.cosine = everything.cosine.index_select(0, rows);
  everything.sine = everything.sine.index_select(0, rows);
}

at::Tensor rows_in_cache(const Piece& piece, int64_t capacity) {
  at::Tensor rows = at::empty({piece.batch * piece.time}, at::kLong);
  int64_t* row = rows.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < piece.batch; ++b) {
    for (int64_t t = 0; t < piece.time; ++t) *row++ = b * capacity + piece.positions[b] + t;
  }
  return rows;
}

at::Tensor mask_of(const Piece& piece) {
  at::Tensor mask = at::zeros({piece.batch, piece.time, 1}, at::kFloat);
  float* values = mask.mutable_data_ptr<float>();
  for (int64_t b = 0; b < piece.batch; ++b) std::fill_n(values + b * piece.time, piece.lengths[b], 1.0F);
  return mask;
}

// The last `taps` tokens of each sequence among those of the piece or, where it has not all of them, among
// these and the `taps` before.
at::Tensor tail_rows_of(const Piece& piece, int64_t taps, bool has_tails) {
  const int64_t before = has_tails ? 0 : taps;
  at::Tensor rows = at::empty({piece.batch * taps}, at::kLong);
  int64_t* row = rows.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < piece.batch; ++b) {
    for (int64_t i = 0; i < taps; ++i) {
      *row++ = b * (before + piece.time) + before + piece.lengths[b] - taps + i;
    }
  }
  return rows;
}

// The tokens of a sequence that each mode serves, padding with the last of them.
void add_sequence(Builder (&builders)[2], const ModelConfig& config, const schedule::ModeSpans& spans,
                  const Piece& piece, int64_t sequence) {
  const int64_t position = piece.positions[sequence], last = position + piece.lengths[sequence];
  int64_t covered = position;
  for (const schedule::ModeSpan& span : spans) {
    const int64_t begin = std::max(span.begin, position), end = std::min(span.end, last);
    if (begin >= end) continue;
    expect(begin == covered, "the schedule leaves token {} without a mode", covered);
    if (!config.has_mode(span.mode)) {
      fail("the schedule asks for {} at token {}, but the model's mixers are {}",
           schedule::mode_name(span.mode), begin, fmt::join(config.mixers, ", "));
    }
    const int64_t padded = end == last ? piece.time : end - position;
    builders[span.mode == schedule::Mode::linear].add(sequence, begin - position, padded, piece.time);
    covered = end;
  }
  expect(covered == last, "the schedule ends at token {}, expected {}", covered, last);
}

}  // namespace

Routing route(const ModelConfig& config, const std::vector<schedule::ModeSpans>& spans, const Piece& piece,
              int64_t capacity, at::ScalarType dtype, at::Device device) {
  const int64_t batch = piece.batch, time = piece.time;
  expect(spans.size() == 1 || static_cast<int64_t>(spans.size()) == batch,
         "expected one schedule or {} (one a sequence), got {}", batch, spans.size());
  Routing routing;
  routing.batch = batch;
  routing.time = time;
  routing.position = piece.positions[0];
  routing.keeps_state = piece.keeps_state;
  const bool is_even = std::all_of(piece.positions.begin(), piece.positions.end(),
                                   [&](int64_t position) { return position == routing.position; });
  const bool is_padded =
      std::any_of(piece.lengths.begin(), piece.lengths.end(), [&](int64_t length) { return length != time; });
  if (!is_even) routing.cache_rows = copy_to(rows_in_cache(piece, capacity), device);
  routing.starts = is_even && routing.position == 0;
  if (is_padded && piece.keeps_state) {
    routing.mask = copy_to(mask_of(piece).to(operators::accumulate_type(dtype)), device);
    if (config.short_conv) {
      const int64_t taps = config.conv_width - 1;
      routing.has_tails = *std::min_element(piece.lengths.begin(), piece.lengths.end()) >= taps;
      routing.tail_rows = copy_to(tail_rows_of(piece, taps, routing.has_tails), device);
    }
  }

  Selection& everything = routing.everything;
  if (config.rope != "none") set_rotation(everything, config, piece, dtype, device);
  everything.count = batch * time;
  Builder all;
  for (int64_t b = 0; b < batch; ++b) all.spans.insert(all.spans.end(), {b, 0, time});
  set_spans(everything, all.spans, piece.positions);

  Builder builders[2];
  for (int64_t b = 0; b < batch; ++b) {
    add_sequence(builders, config, spans[spans.size() == 1 ? 0 : b], piece, b);
  }
  if (!config.is_switchable()) return routing;

  Selection* selections[2] = {&routing.attention, &routing.linear};
  std::vector<int64_t> order;  // of the tokens
  for (int i = 0; i < 2; ++i) {
    Selection& selection = *selections[i];
    selection.first_row = static_cast<int64_t>(order.size());
    selection.count = static_cast<int64_t>(builders[i].tokens.size());
    order.insert(order.end(), builders[i].tokens.begin(), builders[i].tokens.end());
    if (selection.count == everything.count) {
      selection = everything;
    } else {
      set_spans(selection, builders[i].spans, piece.positions);
    }
  }
  if (routing.attention.count > 0 && routing.linear.count > 0) {
    at::Tensor rows = at::empty({batch, time}, at::kLong);
    int64_t* row = rows.mutable_data_ptr<int64_t>();
    for (size_t r = 0; r < order.size(); ++r) row[order[r]] = static_cast<int64_t>(r);
    routing.rows = copy_to(rows, device);
    routing.tokens = copy_to(at::tensor(order, at::kLong), device);
    if (routing.has_tails) routing.tail_rows = routing.rows->view(-1).index_select(0, *routing.tail_rows);
  }
  if (!everything.cosine.defined()) return routing;
  for (Selection* selection : selections) {
    if (selection->count == everything.count) continue;
    if (selection->count == 0) {
      selection->cosine = selection->sine = everything.cosine.narrow(0, 0, 0);
      continue;
    }
    const at::Tensor tokens = routing.tokens->narrow(0, selection->first_row, selection->count);
    const at::Tensor offsets = is_even ? tokens.remainder(time) : tokens;
    selection->cosine = everything.cosine.index_select(0, offsets);
    selection->sine = everything.sine.index_select(0, offsets);
  }
  return routing;
}

at::Tensor in_token_order(const at::Tensor& x, const Routing& routing) {
  return routing.tokens ? operators::merge_rows({x}, {*routing.tokens}, x.size(0)) : x;
}

}  // namespace oryx::model
