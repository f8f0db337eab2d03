// The CPU kernels of attention: workers that take tasks from a shared counter until none is left. Which
// thread runs a task never changes its result. Definitions in attention_cpu.cc (blocks of queries, by matrix
// products) and attention_decode_cpu.cc (one query against a long cache, at memory speed).
#pragma once

#include <ATen/core/ScalarType.h>

#include <atomic>
#include <cstdint>

#include "operators/cpu/isa.h"

namespace oryx::cpu {

// Pointers and sizes of one call. Strides are in elements; every last dimension is contiguous.
struct AttentionProblem {
  at::ScalarType dtype;  // of all tensors but those of the accumulate type
  int64_t query_heads, key_heads, key_dim, value_dim, capacity;  // capacity = S
  double scale;
  const int32_t* positions;  // [N] the place of each packed row on the S axis
  const void* query;         // [N, Hq, Dk] contiguous
  const void* key;
  const void* value;
  int64_t key_strides[3], value_strides[3];  // of sequence, position, head
  void* output;                              // [N, Hq, Dv] contiguous
  void* logsumexp;                           // [N, Hq] accumulate type, or null where backward never runs
  // Backward only, all contiguous:
  const void* output_grad;  // [N, Hq, Dv]
  void* query_grad;         // [N, Hq, Dk]
  void* key_grad;           // [B, S, Hk, Dk]
  void* value_grad;         // [B, S, Hk, Dv]
};

// Consecutive packed rows of one sequence. A block's lanes are its rows times the query heads of one key
// head.
struct QueryBlock {
  int64_t sequence, row, rows;
  int32_t first, last;  // smallest and largest position
};

struct ForwardTask {
  QueryBlock block;
  int64_t key_head;
};

// The query blocks that one worker adds into the gradients of one sequence and key head.
struct BackwardTask {
  int64_t sequence, key_head;
  const QueryBlock* blocks;  // every `stride`-th of `count`
  int64_t count, stride;
  int64_t keys;   // positions below this may have gradients
  void* partial;  // [keys, Dk + Dv] accumulate type, or null: one task has it all and stores it
};

// Sums `slots` partials, each [keys, Dk + Dv] and one behind the other, into the gradients.
struct ReduceTask {
  int64_t sequence, key_head, slots, keys;
  const void* partials;
};

// One packed row against positions [begin, end). partial: [Hq, Dv + 2] accumulate type: the unnormalised
// output, the maximum and the sum of each head.
struct DecodeTask {
  int64_t sequence, row, begin, end;
  void* partial;
};

using Next = std::atomic<int64_t>;

}  // namespace oryx::cpu

ORYX_CPU_KERNEL(void, attention_forward,
                (const cpu::AttentionProblem& problem, const cpu::ForwardTask* tasks, int64_t count,
                 cpu::Next& next),
                (problem, tasks, count, next))
ORYX_CPU_KERNEL(void, attention_backward,
                (const cpu::AttentionProblem& problem, const cpu::BackwardTask* tasks, int64_t count,
                 cpu::Next& next),
                (problem, tasks, count, next))
ORYX_CPU_KERNEL(void, attention_reduce,
                (const cpu::AttentionProblem& problem, const cpu::ReduceTask* tasks, int64_t count,
                 cpu::Next& next),
                (problem, tasks, count, next))
ORYX_CPU_KERNEL(void, attention_decode,
                (const cpu::AttentionProblem& problem, const cpu::DecodeTask* tasks, int64_t count,
                 cpu::Next& next),
                (problem, tasks, count, next))
// Merges `parts` consecutive partials of one packed row into its output.
ORYX_CPU_KERNEL(void, attention_merge,
                (const cpu::AttentionProblem& problem, int64_t row, const void* partials, int64_t parts),
                (problem, row, partials, parts))
