// What the CPU kernels of the linear mixers (ssd, gated_delta_rule) are given: raw pointers, sizes and
// strides. Plain data without functions: kernel files are compiled once per instruction set.
//
// A stream is one state: sequence b and state head h, stream = b · state_heads + h. It reads key head
// h / (state_heads / key_heads) and answers the output heads h · R … h · R + R − 1 with
// R = output_heads / state_heads; output head o reads query head o / (output_heads / query_heads).
#pragma once

#include <cstdint>

namespace oryx::cpu {

enum class ElementType { float32, float64, bfloat16 };

struct MixerShape {
  int64_t batch, time;
  int64_t query_heads, key_heads, state_heads, output_heads;
  int64_t key_dim, value_dim;
  int64_t chunk;   // tokens per chunk, at most time
  int64_t chunks;  // chunks per sequence, the last one possibly shorter
};

// Rows of elements that are contiguous along the last dimension; strides in elements. Packed tensors have
// batch = 0 and time = the stride between packed rows. In outputs `wide` says that rows are stored in the
// accumulate type instead of the element type.
struct RowView {
  void* data;
  int64_t batch, time, head;
  bool wide;
};

// The tokens that want an output, sorted by position within each sequence.
struct QueryRowTable {
  const int32_t* position;     // [N] token index in its sequence
  const int64_t* row;          // [N] row in the packed tensors
  const int64_t* chunk_begin;  // [batch, chunks + 1] where each chunk's tokens start in the two above
  int64_t largest;             // most tokens in one chunk
};

// The inputs of both mixers. `step` is Δ or β. Decay, step and states are contiguous, in the accumulate
// type (double for float64, else float); a missing initial state is null.
struct MixerInputs {
  MixerShape shape;
  QueryRowTable rows;
  ElementType type;
  RowView query, key, value;
  const void* log_decay;      // [batch, time, state_heads]
  const void* step;           // [batch, time, state_heads]
  const void* initial_state;  // [batch, state_heads, key_dim, value_dim] or null
};

}  // namespace oryx::cpu
