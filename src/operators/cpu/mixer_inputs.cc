#include "operators/cpu/mixer_inputs.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "base/shapes.h"

namespace oryx::operators {

namespace {

// Longer chunks cost more products inside the chunk than they save between chunks.
constexpr int64_t largest_chunk = 1024;

void expect_dtype(const MixerTensors& t, std::string_view name, const at::Tensor& tensor,
                  at::ScalarType type) {
  expect(tensor.scalar_type() == type, "[{}] expected {} of type {}, got {}", t.who, name,
         c10::toString(type), c10::toString(tensor.scalar_type()));
}

void expect_spans(const MixerTensors& t, const cpu::MixerShape& shape) {
  expect(t.spans.defined() && t.spans.dim() == 2 && t.spans.size(1) == 3 && t.spans.device().is_cpu() &&
             t.spans.scalar_type() == at::kLong,
         "[{}] expected spans [n, 3] of int64 on the CPU", t.who);
  const at::Tensor spans = t.spans.contiguous();
  const int64_t* row = spans.const_data_ptr<int64_t>();
  int64_t count = 0;
  for (int64_t i = 0; i < spans.size(0); ++i, row += 3) {
    expect(row[0] >= 0 && row[0] < shape.batch && row[1] >= 0 && row[1] <= row[2] && row[2] <= shape.time,
           "[{}] expected spans within {} sequences of {} tokens, got ({}, {}, {})", t.who, shape.batch,
           shape.time, row[0], row[1], row[2]);
    count += row[2] - row[1];
  }
  expect(count == t.query.size(0),
         "[{}] expected query with a row for each of the {} tokens of the spans, got [{}]", t.who, count,
         fmt::join(t.query.sizes(), ", "));
}

}  // namespace

at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

cpu::MixerShape expect_mixer_tensors(const MixerTensors& t) {
  expect_dimensions(t.who, "query", t.query, 3);
  expect_dimensions(t.who, "key", t.key, 4);
  expect_dimensions(t.who, "value", t.value, 4);
  cpu::MixerShape s{.batch = t.key.size(0),
                    .time = t.key.size(1),
                    .query_heads = t.query.size(1),
                    .key_heads = t.key.size(2),
                    .state_heads = t.value.size(2),
                    .output_heads = std::max(t.query.size(1), t.value.size(2)),
                    .key_dim = t.key.size(3),
                    .value_dim = t.value.size(3),
                    .chunk = t.chunk,
                    .chunks = 0};
  expect(t.chunk >= 1 && t.chunk <= largest_chunk, "[{}] expected a chunk of 1 to {} tokens, got {}", t.who,
         largest_chunk, t.chunk);
  expect(s.query_heads >= 1 && s.key_heads >= 1 && s.state_heads >= 1 && s.state_heads % s.key_heads == 0 &&
             s.output_heads % s.state_heads == 0 && s.output_heads % s.query_heads == 0,
         "[{}] expected key heads that divide the value heads, and query heads that divide them or are a "
         "multiple of them; got {} query, {} key and {} value heads",
         t.who, s.query_heads, s.key_heads, s.state_heads);
  expect(s.key_dim >= 1 && s.value_dim >= 1, "[{}] expected head dimensions of at least 1, got {} and {}",
         t.who, s.key_dim, s.value_dim);
  expect_shape(t.who, "query", t.query, {-1, -1, s.key_dim});
  expect_shape(t.who, "value", t.value, {s.batch, s.time, -1, -1});
  expect_shape(t.who, "log_decay", t.log_decay, {s.batch, s.time, s.state_heads});
  expect_shape(t.who, t.step_name, t.step, {s.batch, s.time, s.state_heads});
  const at::ScalarType type = t.value.scalar_type();
  expect(type == at::kFloat || type == at::kDouble || type == at::kBFloat16,
         "[{}] expected value of type float32, float64 or bfloat16, got {}", t.who, c10::toString(type));
  expect_dtype(t, "query", t.query, type);
  expect_dtype(t, "key", t.key, type);
  expect_dtype(t, "log_decay", t.log_decay, accumulate_type(type));
  expect_dtype(t, t.step_name, t.step, accumulate_type(type));
  if (t.initial_state.has_value() && t.initial_state->defined()) {
    const bool by_rows = t.initial_rows.defined();
    expect_shape(t.who, "initial_state", *t.initial_state,
                 {by_rows ? -1 : s.batch, s.state_heads, s.key_dim, s.value_dim});
    if (by_rows) expect_shape(t.who, "initial_rows", t.initial_rows, {s.batch});
    expect_dtype(t, "initial_state", *t.initial_state, accumulate_type(type));
  }
  expect_spans(t, s);
  s.chunk = std::min(s.chunk, std::max<int64_t>(1, s.time));
  s.chunks = (s.time + s.chunk - 1) / s.chunk;
  return s;
}

QueryRows::QueryRows(const at::Tensor& spans_given, const cpu::MixerShape& shape) {
  const at::Tensor spans = spans_given.contiguous();
  const int64_t* data = spans.const_data_ptr<int64_t>();
  const int64_t count = spans.size(0);
  // Spans in order of sequence and start: the order of the packed rows unless the caller chose another.
  std::vector<int64_t> order(count), first_row(count);
  std::iota(order.begin(), order.end(), 0);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    first_row[i] = total;
    total += data[3 * i + 2] - data[3 * i + 1];
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
    return std::pair(data[3 * x], data[3 * x + 1]) < std::pair(data[3 * y], data[3 * y + 1]);
  });
  positions.reserve(total);
  rows.reserve(total);
  chunk_begin.assign(shape.batch * (shape.chunks + 1), 0);
  auto next = order.begin();
  std::vector<int64_t> by_position;
  for (int64_t batch = 0; batch < shape.batch; ++batch) {
    const int64_t begin = static_cast<int64_t>(positions.size());
    for (; next != order.end() && data[3 * *next] == batch; ++next) {
      for (int64_t t = data[3 * *next + 1]; t < data[3 * *next + 2]; ++t) {
        positions.push_back(static_cast<int32_t>(t));
        rows.push_back(first_row[*next] + t - data[3 * *next + 1]);
      }
    }
    const int64_t end = static_cast<int64_t>(positions.size());
    if (!std::is_sorted(positions.begin() + begin, positions.begin() + end)) {  // spans that overlap
      by_position.resize(end - begin);
      std::iota(by_position.begin(), by_position.end(), begin);
      std::stable_sort(by_position.begin(), by_position.end(),
                       [&](int64_t x, int64_t y) { return positions[x] < positions[y]; });
      const std::vector<int32_t> old_positions = positions;
      const std::vector<int64_t> old_rows = rows;
      for (int64_t i = begin; i < end; ++i) {
        positions[i] = old_positions[by_position[i - begin]];
        rows[i] = old_rows[by_position[i - begin]];
      }
    }
    int64_t* starts = chunk_begin.data() + batch * (shape.chunks + 1);
    int64_t at = begin;
    starts[0] = begin;
    for (int64_t chunk = 0; chunk < shape.chunks; ++chunk) {
      while (at < end && positions[at] < (chunk + 1) * shape.chunk) ++at;
      starts[chunk + 1] = at;
      largest = std::max(largest, starts[chunk + 1] - starts[chunk]);
    }
  }
}

at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor : tensor.contiguous();
}

cpu::RowView token_rows(const at::Tensor& tensor, bool wide) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          wide};
}

cpu::RowView packed_rows(const at::Tensor& tensor, bool wide) {
  if (!tensor.defined()) return {nullptr, 0, 0, 0, wide};
  return {const_cast<void*>(tensor.const_data_ptr()), 0, tensor.stride(0), tensor.stride(1), wide};
}

const void* pointer(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
const void* pointer(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? pointer(*tensor) : nullptr;
}

cpu::MixerInputs mixer_inputs(const cpu::MixerShape& shape, const QueryRows& rows, const at::Tensor& query,
                              const at::Tensor& key, const at::Tensor& value, const at::Tensor& log_decay,
                              const at::Tensor& step, const std::optional<at::Tensor>& initial_state) {
  const at::ScalarType type = value.scalar_type();
  return {.shape = shape,
          .rows = rows.table(),
          .type = type == at::kDouble     ? cpu::ElementType::float64
                  : type == at::kBFloat16 ? cpu::ElementType::bfloat16
                                          : cpu::ElementType::float32,
          .query = packed_rows(query),
          .key = token_rows(key),
          .value = token_rows(value),
          .log_decay = log_decay.const_data_ptr(),
          .step = step.const_data_ptr(),
          .initial_state = pointer(initial_state)};
}

void for_streams(const cpu::MixerShape& shape, int64_t work, int64_t scratch_bytes,
                 const std::function<void(int64_t, int64_t, void*)>& kernel) {
  constexpr int64_t smallest_task = 32768;  // elements: below it starting a thread costs more than it saves
  const int64_t grain = std::max<int64_t>(1, smallest_task / std::max<int64_t>(1, work));
  at::parallel_for(0, shape.batch * shape.state_heads, grain, [&](int64_t begin, int64_t end) {
    const at::Tensor scratch = at::empty({scratch_bytes}, at::kByte);  // ATen aligns to 64 bytes
    kernel(begin, end, scratch.mutable_data_ptr());
  });
}

HeadGradient::HeadGradient(const at::Tensor& tensor, int64_t head_dimension, int64_t readers)
    : wide(tensor.size(head_dimension) != readers),
      grouped_(tensor.sizes().vec()),
      head_dimension_(head_dimension),
      type_(tensor.scalar_type()) {
  std::vector<int64_t> sizes = grouped_;
  sizes[head_dimension] = readers;
  grouped_.insert(grouped_.begin() + head_dimension + 1, readers / tensor.size(head_dimension));
  partial = at::empty(sizes, tensor.options().dtype(wide ? accumulate_type(type_) : type_));
}

at::Tensor HeadGradient::sum() const {
  return wide ? partial.view(grouped_).sum(head_dimension_ + 1).to(type_) : partial;
}

std::pair<at::Tensor, at::Tensor> row_places(const at::Tensor& spans_given, at::Device device) {
  std::vector<int64_t> sequences, positions;
  const at::Tensor spans = spans_given.contiguous();
  const int64_t* row = spans.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < spans.size(0); ++i, row += 3) {
    for (int64_t t = row[1]; t < row[2]; ++t) {
      sequences.push_back(row[0]);
      positions.push_back(t);
    }
  }
  return {at::tensor(sequences, at::kLong).to(device), at::tensor(positions, at::kLong).to(device)};
}

std::pair<at::Tensor, at::Tensor> recurrence(const MixerTensors& t, const cpu::MixerShape& s,
                                             const StateUpdate& update) {
  const at::ScalarType type = accumulate_type(t.value.scalar_type());
  const at::Tensor query = t.query.to(type).repeat_interleave(s.output_heads / s.query_heads, 1);
  const at::Tensor key = t.key.to(type).repeat_interleave(s.state_heads / s.key_heads, 2);
  const at::Tensor value = t.value.to(type);
  at::Tensor state = t.initial_state.has_value() && t.initial_state->defined()
                         ? *t.initial_state
                         : at::zeros({s.batch, s.state_heads, s.key_dim, s.value_dim}, value.options());
  const auto [sequence, position] = row_places(t.spans, value.device());
  std::vector<at::Tensor> outputs, order;
  for (int64_t time = 0; time < s.time; ++time) {
    const auto factor = [&](const at::Tensor& x) { return x.select(1, time).unsqueeze(-1).unsqueeze(-1); };
    state =
        update(state, key.select(1, time), value.select(1, time), factor(t.log_decay).exp(), factor(t.step));
    const at::Tensor rows = position.eq(time).nonzero().squeeze(1);
    if (rows.size(0) == 0) continue;
    const at::Tensor read = state.index_select(0, sequence.index_select(0, rows))
                                .repeat_interleave(s.output_heads / s.state_heads, 1);
    outputs.push_back(query.index_select(0, rows).unsqueeze(2).matmul(read).squeeze(2));
    order.push_back(rows);
  }
  if (outputs.empty()) return {query.new_zeros({0, s.output_heads, s.value_dim}), state};
  return {at::cat(outputs).index_select(0, at::cat(order).argsort()), state};
}

}  // namespace oryx::operators
