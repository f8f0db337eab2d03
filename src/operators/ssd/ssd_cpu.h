// CPU kernels of ssd: chunked forward and backward, and single steps. docs/mathematics/ssd.md derives them.
#pragma once

#include "operators/cpu/isa.h"
#include "operators/cpu/mixer_arguments.h"

namespace oryx::cpu {

struct SsdForward {
  MixerInputs inputs;
  const void* skip;   // [output_heads] or null
  RowView output;     // [N, output_heads, value_dim]
  void* final_state;  // [batch, state_heads, key_dim, value_dim]
};

struct SsdBackward {
  MixerInputs inputs;
  const void* skip;
  RowView d_output;           // data null: no gradient
  const void* d_final_state;  // null: no gradient
  RowView d_query;            // [N, output_heads, key_dim]
  RowView d_key;              // [batch, time, state_heads, key_dim]
  RowView d_value;            // [batch, time, state_heads, value_dim]
  void* d_log_decay;          // [batch, time, state_heads]
  void* d_step;               // [batch, time, state_heads]
  void* d_skip;               // [batch, output_heads] or null
  void* d_initial_state;      // or null
};

}  // namespace oryx::cpu

// Each works on streams [begin, end); `scratch` holds …_scratch() bytes, aligned to 64.
ORYX_CPU_KERNEL(int64_t, ssd_forward_scratch, (const ::oryx::cpu::SsdForward& a), (a))
ORYX_CPU_KERNEL(void, ssd_forward,
                (const ::oryx::cpu::SsdForward& a, int64_t begin, int64_t end, void* scratch),
                (a, begin, end, scratch))
ORYX_CPU_KERNEL(int64_t, ssd_backward_scratch, (const ::oryx::cpu::SsdBackward& a), (a))
ORYX_CPU_KERNEL(void, ssd_backward,
                (const ::oryx::cpu::SsdBackward& a, int64_t begin, int64_t end, void* scratch),
                (a, begin, end, scratch))
// The same forward token by token: for decoding, bound by reading and writing the state.
ORYX_CPU_KERNEL(int64_t, ssd_steps_scratch, (const ::oryx::cpu::SsdForward& a), (a))
ORYX_CPU_KERNEL(void, ssd_steps,
                (const ::oryx::cpu::SsdForward& a, int64_t begin, int64_t end, void* scratch),
                (a, begin, end, scratch))
