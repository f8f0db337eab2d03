// Checks and bookkeeping that ssd and gated_delta_rule share.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "operators/cpu/mixer_arguments.h"

namespace oryx::operators {

// float64 for float64, else float32.
at::ScalarType accumulate_type(at::ScalarType type);

// The arguments of a linear mixer as its caller gave them; `who` and `step_name` ("step", "beta") only
// appear in messages.
struct MixerTensors {
  std::string_view who, step_name;
  const at::Tensor &query, &key, &value, &log_decay, &step, &spans;
  const std::optional<at::Tensor>& initial_state;
  int64_t chunk;
  at::Tensor initial_rows = {};  // or undefined, as in ssd_inference()
};

// Throws Error where a shape, dtype, device, head count, span or chunk is wrong; returns the sizes.
cpu::MixerShape expect_mixer_tensors(const MixerTensors& tensors);

// On a GPU, without gradients, sequences of up to so many tokens may go token by token: the state passes
// through memory once either way.
constexpr int64_t most_step_tokens = 15;

// Whether pieces of so few tokens that a GPU may take them one by one go by chunks all the same: the tokens
// of a stream wait for each other, and with many streams nothing is idle meanwhile that they could use.
inline bool few_tokens_want_chunks(int64_t time, int64_t streams, int64_t multiprocessors) {
  return time > 2 && streams >= 4 * multiprocessors;
}

// Storage behind a cpu::QueryRowTable.
struct QueryRows {
  std::vector<int32_t> positions;
  std::vector<int64_t> rows, chunk_begin;
  int64_t largest = 0;

  QueryRows(const at::Tensor& spans, const cpu::MixerShape& shape);
  cpu::QueryRowTable table() const { return {positions.data(), rows.data(), chunk_begin.data(), largest}; }
};

// tensor itself, or a copy whose last dimension is contiguous.
at::Tensor with_contiguous_rows(const at::Tensor& tensor);

// [batch, time, heads, dim] and packed [N, heads, dim] tensors as row views.
cpu::RowView token_rows(const at::Tensor& tensor, bool wide = false);
cpu::RowView packed_rows(const at::Tensor& tensor, bool wide = false);

// An undefined tensor or an empty optional gives null.
const void* pointer(const at::Tensor& tensor);
const void* pointer(const std::optional<at::Tensor>& tensor);

// The common part of the kernel arguments. The tensors must outlive it, have contiguous rows, and decay,
// step and initial state must be contiguous.
cpu::MixerInputs mixer_inputs(const cpu::MixerShape& shape, const QueryRows& rows, const at::Tensor& query,
                              const at::Tensor& key, const at::Tensor& value, const at::Tensor& log_decay,
                              const at::Tensor& step, const std::optional<at::Tensor>& initial_state);

// Runs kernel(begin, end, scratch) over all streams on the threads of ATen; each call gets its own scratch.
// `work` is the number of state elements a stream touches: small work stays on one thread.
void for_streams(const cpu::MixerShape& shape, int64_t work, int64_t scratch_bytes,
                 const std::function<void(int64_t, int64_t, void*)>& kernel);

// The gradient of a tensor whose heads may be shared: one partial gradient per reader, added up afterwards.
// Partials of shared heads are kept in the accumulate type and rounded once, after the sum.
struct HeadGradient {
  at::Tensor partial;  // like the tensor, with `readers` heads
  bool wide;           // partial is in the accumulate type

  HeadGradient(const at::Tensor& tensor, int64_t head_dimension, int64_t readers);
  at::Tensor sum() const;  // like the tensor

 private:
  std::vector<int64_t> grouped_;  // sizes with the head dimension split into [heads, readers / heads]
  int64_t head_dimension_;
  at::ScalarType type_;
};

// The token recurrences: one step after another in differentiable ATen operations, on any device.
// update(S, k, v, e^{log_decay}, step) with S [B, Hv, Dk, Dv], k [B, Hv, Dk], v [B, Hv, Dv] and the last two
// [B, Hv, 1, 1] gives the next state. Returns q_t S_t [N, Ho, Dv] for the rows of the spans and the last
// state, both in the accumulate type.
using StateUpdate = std::function<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                             const at::Tensor&, const at::Tensor&)>;
std::pair<at::Tensor, at::Tensor> recurrence(const MixerTensors& tensors, const cpu::MixerShape& shape,
                                             const StateUpdate& update);

// Sequence and position of every packed row, int64 on `device`.
std::pair<at::Tensor, at::Tensor> row_places(const at::Tensor& spans, at::Device device);

}  // namespace oryx::operators
