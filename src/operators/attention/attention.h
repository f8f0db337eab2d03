// Causal softmax attention, computed only for the queries that ask for it.
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx::operators {

// o_t = Σ_{s ≤ t} softmax_s(scale · q_t·k_s) v_s for every row t of the spans; key and value hold all tokens.
//
//   query [N, Hq, Dk]       packed rows of the spans, in their order
//   key   [B, S, Hk, Dk]    strided in any dimension but the last; query head h reads key head h / (Hq / Hk)
//   value [B, S, Hk, Dv]    likewise. S may exceed what is used (a cache with spare room): nothing at or past
//                           the largest end of a sequence's spans is read
//   spans [n, 3] int64 CPU  rows (sequence, begin, end); positions on the S axis; N = Σ (end − begin)
// Returns [N, Hq, Dv], contiguous. float32, float64 or bfloat16, the same for all three.
//
// Scores, softmax and sums are in the accumulate type (float64 for float64, else float32); for bfloat16 the
// probabilities (and in backward their gradients) are rounded to bfloat16 before the products that read them.
// The cost follows the queries given: each reads the keys up to its own position.
// Differentiable in query, key and value. Saved for backward: inputs, output, log-sum-exp; the probabilities
// are recomputed (FlashAttention-2, arXiv 2307.08691). The gradients of key and value are whole: [B, S, ...].
//
// Deterministic. Key blocks sit at fixed positions, and a sequence with several rows is computed so that,
// where the BLAS computes a row of a product alike for every number of rows (MKL's AVX-512 kernels do), a
// row's output is bitwise the same however the sequence was cut, whatever its neighbours. A sequence with one
// row (decoding) takes a path of its own: bitwise independent of its neighbours and the number of threads
// too, equal to the other path up to rounding.
//
// On a GPU (compute capability 8.0 and up) kernels serve bfloat16 with Dk = Dv of 64 or 128, and float32
// where every sequence has one row and no gradient is asked for. They are deterministic, and a row's output
// is the same bits however its sequence was cut and whatever its neighbours, except that a sequence with one
// row takes a path of its own there too (which keeps the probabilities in float32). Where gradients are asked
// for, the rows are most of the tokens and every sequence uses as many positions, a library (cuDNN, else
// PyTorch's flash attention) computes all tokens instead: faster, but how it sums the gradients is its own
// affair; at::globalContext()'s deterministic algorithms keep to the kernels. Other dtypes and head
// dimensions take composed operations, whose backward pass keeps the probabilities. Nothing waits for the
// device. Where blocks of threads have 227 KiB of shared memory (H100, H200), backward keeps the gradients of
// the scores of some heads at a time, two bytes each, in at most 1.5 GiB of scratch between its kernels,
// unless one head has more.
//
// Throws Error on other shapes, dtypes or spans outside the tensors.
at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const at::Tensor& spans, double scale);

// The same in composed ATen operations, one span after another: the definition, for any device and dtype.
at::Tensor attention_reference(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const at::Tensor& spans, double scale);

}  // namespace oryx::operators
