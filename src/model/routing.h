// Which rows of a batch each mixer serves: computed once from the schedules and shared by all layers.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "model/config.h"

namespace oryx::model {

// The tokens one mixer answers for.
struct Selection {
  int64_t first_row = 0, count = 0;  // where they lie, in ascending order
  at::Tensor spans;  // int64 [n, 3] on the CPU: (sequence, begin, end), offsets within this piece
  // The same counted from the start of the sequence, as a cache of the earlier tokens sees them. One tensor
  // for all layers: operators keep what they work out of it as long as it lives.
  at::Tensor spans_in_sequence;
  at::Tensor cosine, sine;  // rotary tables of those rows [count or time, head_dim / 2]
};

// The part of each sequence that one forward pass reads.
struct Piece {
  int64_t batch = 0;
  int64_t time = 0;                // tokens of every sequence, padding included
  std::vector<int64_t> positions;  // [batch] tokens before the piece
  std::vector<int64_t> lengths;    // [batch] tokens of the piece; what is left of `time` is padding
  bool keeps_state = false;        // whether the state after it is asked for
};

// Whatever treats tokens one by one sees them as R = batch · time rows, those of each mode side by side, so
// that a query is projected from neighbouring rows and its answers are put in their place without a copy of
// each row. Where one mode serves all tokens (or a mixer all of them), row r is token r = sequence · time +
// offset.
struct Routing {
  int64_t batch = 0;
  int64_t time = 0;
  std::optional<at::Tensor> tokens;  // int64 [R]: of each row; absent where row r is token r
  std::optional<at::Tensor> rows;    // int64 [batch, time]: of each token; likewise
  Selection attention, linear;       // by mode
  Selection everything;              // for a mixer that serves all tokens

  // Where the tokens go in a cache of `capacity` tokens a sequence: all at one position, or, where sequences
  // differ, as rows of [batch · capacity], int64 [batch · time].
  int64_t position = 0;
  std::optional<at::Tensor> cache_rows;
  bool starts = false;  // whether no sequence has tokens before the piece
  // Where a state is to be kept up past padding: [batch, time, 1] of the accumulate type, 0 for padding; and
  // the last `taps` tokens of each sequence, int64 [batch · taps], as rows of the R where the piece has them
  // all (has_tails), else of [batch · (taps + time)], the tokens before it included.
  std::optional<at::Tensor> mask, tail_rows;
  bool has_tails = false;
  bool keeps_state = false;
};

// `spans` holds one schedule for all sequences or one per sequence, in absolute positions; each must cover
// its sequence's tokens of the piece. Padding goes to the mode of the token before it. `capacity`: of the
// caches, where positions differ. Throws Error when spans leave a token out, or ask for a mode that the model
// lacks.
Routing route(const ModelConfig& config, const std::vector<schedule::ModeSpans>& spans, const Piece& piece,
              int64_t capacity, at::ScalarType dtype, at::Device device);

// x [R, …], its rows as above, in the order of the tokens. Differentiable.
at::Tensor in_token_order(const at::Tensor& x, const Routing& routing);

}  // namespace oryx::model
