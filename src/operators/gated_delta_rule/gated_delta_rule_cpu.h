// CPU kernels of gated_delta_rule: chunked forward and backward, and single steps.
// docs/mathematics/gated_delta_rule.md derives them.
#pragma once

#include "operators/cpu/isa.h"
#include "operators/cpu/mixer_arguments.h"

namespace oryx::cpu {

struct GatedDeltaForward {
  MixerInputs inputs;  // step is β
  double scale;
  RowView output;     // [N, output_heads, value_dim]
  void* final_state;  // [batch, state_heads, key_dim, value_dim]
  // (I + L)⁻¹ of every chunk for backward: [batch, state_heads, chunks, chunk, chunk padded to a multiple of
  // 16] in the accumulate type, or null.
  void* inverse;
};

struct GatedDeltaBackward {
  MixerInputs inputs;
  double scale;
  const void* inverse;
  RowView d_output;           // data null: no gradient
  const void* d_final_state;  // null: no gradient
  RowView d_query;            // [N, output_heads, key_dim]
  RowView d_key;              // [batch, time, state_heads, key_dim]
  RowView d_value;            // [batch, time, state_heads, value_dim]
  void* d_log_decay;          // [batch, time, state_heads]
  void* d_beta;               // [batch, time, state_heads]
  void* d_initial_state;      // or null
};

}  // namespace oryx::cpu

// Each works on streams [begin, end); `scratch` holds …_scratch() bytes, aligned to 64.
ORYX_CPU_KERNEL(int64_t, gated_delta_forward_scratch, (const ::oryx::cpu::GatedDeltaForward& a), (a))
ORYX_CPU_KERNEL(void, gated_delta_forward,
                (const ::oryx::cpu::GatedDeltaForward& a, int64_t begin, int64_t end, void* scratch),
                (a, begin, end, scratch))
ORYX_CPU_KERNEL(int64_t, gated_delta_backward_scratch, (const ::oryx::cpu::GatedDeltaBackward& a), (a))
ORYX_CPU_KERNEL(void, gated_delta_backward,
                (const ::oryx::cpu::GatedDeltaBackward& a, int64_t begin, int64_t end, void* scratch),
                (a, begin, end, scratch))
// The same forward token by token: for decoding, bound by reading and writing the state. Ignores `inverse`.
ORYX_CPU_KERNEL(int64_t, gated_delta_steps_scratch, (const ::oryx::cpu::GatedDeltaForward& a), (a))
ORYX_CPU_KERNEL(void, gated_delta_steps,
                (const ::oryx::cpu::GatedDeltaForward& a, int64_t begin, int64_t end, void* scratch),
                (a, begin, end, scratch))
