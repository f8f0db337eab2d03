// CUDA kernels of gated_delta_rule for bfloat16 query, key and value with head dimensions of 64 and 128, in
// chunks of 64 tokens. docs/mathematics/gated_delta_rule.md derives them and names the letters; "On a GPU"
// there says what is done serially and what in parallel.
//
// A stream is one state: sequence b and state head h, stream = b · state_heads + h; a block is one chunk of a
// stream, block = stream · chunks + chunk. Scratch of a block lies together and whole, also in a last chunk
// that is shorter: the rows past the end have k = v = β = 0 and no decay.
#pragma once

#include <cstdint>

namespace oryx::cuda {

constexpr int gated_delta_chunk = 64;
// int32 of one chunk in GatedDeltaArguments::rows: 64 rows, their count, padding to 16 bytes.
constexpr int gated_delta_row_table = 68;
// Rows of one chunk in GatedDeltaArguments::gates.
constexpr int gated_delta_gate_rows = 5;

// Rows along the last dimension of a tensor, 16-byte aligned; strides in elements. Packed tensors have batch
// 0 and time = the stride between packed rows.
struct GatedDeltaRows {
  void* data = nullptr;
  int64_t batch = 0, time = 0, head = 0;
};

// What every kernel is given; each reads and writes the members that its launcher names.
struct GatedDeltaArguments {
  int64_t time;
  int32_t batch, chunks;
  int32_t query_heads, key_heads, state_heads, output_heads;
  int32_t key_dim, value_dim;
  int32_t multiprocessors;
  float scale;

  GatedDeltaRows query, key, value;
  const float* log_decay;      // [batch, time, state_heads]
  const float* beta;           // [batch, time, state_heads]
  const float* initial_state;  // [batch, state_heads, key_dim, value_dim] or null
  // Where segments == 1: [batch], whose initial_state a sequence takes; null: its own.
  const int64_t* initial_rows;
  // [batch, chunks, gated_delta_row_table]: the packed row of every token or −1, then how many are not −1.
  const int32_t* rows;

  GatedDeltaRows output;
  float* final_state;  // like initial_state; or null

  // The serial passes may take a sequence in segments of segment_chunks chunks, side by side; the last has
  // the rest. Where segments > 1:
  int32_t segments, segment_chunks;
  float* segment_states;  // [batch, state_heads, segments, key_dim, value_dim]: S before the segment
  // [batch, state_heads, segments, key_dim, key_dim]: T of S after the segment = T S before it + ….
  float* segment_transfers;
  float* d_segment_states;   // like segment_states: dS after the segment
  bool wants_last_transfer;  // of every stream: only backward reads it

  // bf16 [blocks, 64, 64]: C, strictly lower, where A = (I + L)⁻¹ = I + β ⊙ C. Squares of 16 above those on
  // the diagonal hold anything.
  void* inverse;
  float* gates;     // [blocks, gated_delta_gate_rows, 64]: G · log₂e, β, γ, ρ, β ⊙ ρ
  void* states;     // bf16 [blocks, value_dim, key_dim]: Sᵀ before the chunk
  void* surprises;  // bf16 [blocks, value_dim, 64]: Nᵀ, U = β ⊙ N

  GatedDeltaRows d_output;        // data null: no gradient
  const float* d_final_state;     // or null
  void* d_states;                 // bf16 [blocks, value_dim, key_dim]: dSᵀ after the chunk
  void* d_surprises;              // bf16 [blocks, value_dim, 64]: Yᵀ, Y = Aᵀ dU
  GatedDeltaRows d_query;         // per output head
  GatedDeltaRows d_key;           // per state head
  bool wide_d_query, wide_d_key;  // float32 instead of bfloat16
  GatedDeltaRows d_value;
  float* d_log_decay;      // like log_decay
  float* d_beta;           // like beta
  float* d_initial_state;  // or null
};

// How many segments are best, as far as their sizes tell; for backward too where `differentiates`.
int gated_delta_segments(const GatedDeltaArguments& arguments, bool differentiates);

// Whether the current device has the shared memory that all of these but the single steps are laid out for
// (227 KiB a block: compute capability 9.0 and its successors).
bool gated_delta_fits();

// key, log_decay, beta → gates, inverse.
void gated_delta_prepare(const GatedDeltaArguments& arguments, void* stream);
// For segments > 1: key, value, gates, inverse, initial_state → segment_states, segment_transfers (the first
// only where there is an initial state).
void gated_delta_split(const GatedDeltaArguments& arguments, void* stream);
// query, key, value, gates, inverse, rows, initial_state (segment_states) → output, final_state.
// Serial over the chunks of a segment.
void gated_delta_outputs(const GatedDeltaArguments& arguments, void* stream);

// Both serial over the chunks of a segment, the second from the last:
// key, value, gates, inverse, initial_state (segment_states) → states, surprises;
// query, key, gates, inverse, rows, d_output, d_final_state (segment_transfers) → d_states,
// d_surprises, d_value, d_initial_state (where not null) (d_segment_states).
void gated_delta_backward_passes(const GatedDeltaArguments& arguments, void* stream);
// query, key, gates, states, surprises, rows, d_output, d_states, d_surprises → d_query, d_key, d_log_decay,
// d_beta.
void gated_delta_input_gradients(const GatedDeltaArguments& arguments, void* stream);

// The whole forward token by token, for decoding: query, key, value (float32 where `wide`, else bfloat16),
// log_decay, beta, initial_state, rows (of one chunk) → output, final_state.
void gated_delta_steps(const GatedDeltaArguments& arguments, bool wide, void* stream);

}  // namespace oryx::cuda
