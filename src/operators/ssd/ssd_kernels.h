// CUDA kernels of ssd: chunks in parallel. docs/mathematics/ssd.md derives them.
//
// Forward: ssd_decay, ssd_forward (a block walks over the chunks of an output head). Backward: ssd_decay,
// ssd_walk forward (the state at the start of every chunk) and beside it in reverse (the gradient of the
// state at the end of every chunk), ssd_gradient. Few tokens without gradients: ssd_steps. What walks is cut
// into segments where there are too few streams for the device: local states of the segments (ssd_walk,
// `local_pieces`), ssd_join_segments, then all segments at once. bf16 activations, key_dim and value_dim of
// 64 or 128; every row starts at a multiple of 16 bytes.
#pragma once

#include "operators/cpu/mixer_arguments.h"

namespace oryx::cuda {

constexpr int kSsdChunk = 64;  // tokens of a chunk; shape.chunk of all but ssd_steps

// Of every token in the order [stream, token], streams padded to whole chunks. A padding token neither decays
// nor writes.
struct SsdDecay {
  float* cumulative;  // [.., 2] log2 of the decay since the chunk's start (γ), as the sum of two floats
  float* step;        // Δ
  float* weight;      // ρ Δ
  float* gamma;       // γ
};

struct SsdDecayArguments {
  cpu::MixerShape shape;
  const float* log_decay;  // [batch, time, state_heads]
  const float* step;
  SsdDecay decay;
};
void ssd_decay(const SsdDecayArguments& arguments, void* stream);

// S ← γ_C S + Leftᵀ (w ⊙ Right), chunk after chunk; in reverse from the last to the first.
struct SsdWalk {
  cpu::MixerShape shape;
  cpu::RowView left, right;  // token rows of key and value; reverse: packed rows of query and d_output
  const int32_t* row_of;     // reverse: [batch, time]
  const int32_t* has_rows;   // reverse: [batch, chunks] whether a chunk holds a row
  const float* weight;       // [stream, padded time]: SsdDecay::weight, or gamma in reverse
  const float* gamma;
  int64_t segments, segment_chunks;  // segment 0 comes first in the order of the walk
  // 0, or how many pieces each segment but the last is cut into, to be walked over from zero: only the next
  // two are written, by piece.
  int64_t local_pieces;
  float* last_state;   // [stream, key_dim, value_dim] after the walk or null; local: [stream, piece, ..]
  float* last_factor;  // local: [stream, piece] decay over a piece
  const float* first_state;  // [stream, segment, key_dim, value_dim] or null: zero
  void* states;              // bf16 [stream, chunk, key_dim, value_dim] before each chunk, or null
};
// Either may be null; else they have as many segments and pieces, and run side by side.
void ssd_walk(const SsdWalk* forward, const SsdWalk* reverse, void* stream);

// From the local states of the segments but the last to the states before every segment.
struct SsdSegments {
  int64_t streams, segments, local_pieces, state_size;
  const float* local_states;  // [stream, piece, state_size]
  const float* factor;        // [stream, piece]
  const float* first_state;   // [stream, state_size] or null
  float* states;              // [stream, segment, state_size]
};
void ssd_join_segments(const SsdSegments& arguments, void* stream);

struct SsdForward {
  cpu::MixerShape shape;
  cpu::RowView query, key, value, output;
  const float* skip;        // [output_heads] or null
  const int32_t* row_of;    // [batch, time] packed row or −1
  const int32_t* has_rows;  // [batch, chunks]
  SsdDecay decay;
  int64_t segments, segment_chunks;
  float* last_state;          // [stream, key_dim, value_dim] or null
  const float* first_state;   // [stream, segment, key_dim, value_dim] or null: zero
  const int64_t* first_rows;  // one segment: [batch], whose first_state a sequence takes; null: its own
};
void ssd_forward(const SsdForward& arguments, void* stream);

// The same token by token, for decoding: reads and writes the state once.
struct SsdSteps {
  cpu::MixerShape shape;
  bool is_float;  // rows are float32, else bf16; no alignment is asked of them
  cpu::RowView query, key, value, output;
  const float* log_decay;  // [batch, time, state_heads]
  const float* step;
  const float* skip;            // [output_heads] or null
  const int32_t* row_of;        // [batch, time]
  const float* initial_state;   // [stream, key_dim, value_dim] or null
  const int64_t* initial_rows;  // [batch], whose initial_state a sequence takes; null: its own
  float* final_state;           // or null
};
void ssd_steps(const SsdSteps& arguments, void* stream);

// Gradients by output head; those of heads that several output heads share are added up afterwards.
struct SsdGradient {
  cpu::MixerShape shape;
  cpu::RowView query, key, value, d_output;
  const float* skip;        // [output_heads] or null
  const int32_t* row_of;    // [batch, time]
  const int32_t* has_rows;  // [batch, chunks]
  SsdDecay decay;
  const void* states;    // of the walk
  const void* d_states;  // of the walk in reverse: the gradient of the state after every chunk
  cpu::RowView d_query;  // [N, output_heads, key_dim]
  cpu::RowView d_key;    // [batch, time, output_heads, key_dim]
  cpu::RowView d_value;  // [batch, time, output_heads, value_dim]
  float* d_log_decay;    // [batch, time, output_heads]
  float* d_step;         // [batch, time, output_heads]
  float* d_skip;         // [batch, chunks, output_heads] or null
};
void ssd_gradient(const SsdGradient& arguments, void* stream);

// Whether the current device has the shared memory that the chunk kernels take and, for gradients, a grid of
// blocks for the shape.
bool ssd_gradient_fits(const cpu::MixerShape& shape);
bool ssd_forward_fits();

}  // namespace oryx::cuda
