// Which rows of a batch each mixer serves: computed once from the schedules and shared by all layers.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "model/config.h"

namespace oryx::model {

// The tokens one mixer answers for. Rows are numbered sequence · time + offset and ascend.
struct Selection {
  int64_t count = 0;
  at::Tensor spans;  // int64 [n, 3] on the CPU: (sequence, begin, end), offsets within this piece
  std::optional<at::Tensor> rows;  // int64 [count]; absent when every row is selected
  // The same counted from the start of the sequence, as a cache of the earlier tokens sees them. One tensor
  // for all layers: operators keep what they work out of it as long as it lives.
  at::Tensor spans_in_sequence;
  at::Tensor cosine, sine;  // rotary tables of those rows [count or time, head_dim / 2]
};

struct Routing {
  int64_t batch = 0;
  int64_t time = 0;
  int64_t position = 0;         // tokens before this piece
  Selection attention, linear;  // by mode
  Selection everything;         // for a mixer that serves all tokens
};

// `spans` holds one schedule for all sequences or one per sequence, in absolute positions; each must cover
// [position, position + time). Throws Error when it does not, or when it asks for a mode the model lacks.
Routing route(const ModelConfig& config, const std::vector<schedule::ModeSpans>& spans, int64_t batch,
              int64_t time, int64_t position, at::ScalarType dtype, at::Device device);

}  // namespace oryx::model
