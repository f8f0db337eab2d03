#include <ATen/ATen.h>

#include "operators/cpu/mixer_inputs.h"
#include "operators/device/span_table.h"
#include "operators/gated_delta_rule/gated_delta_rule.h"

namespace oryx::operators {

namespace {

// The packed rows chunk by chunk, each chunk padded to the same number of slots.
struct Slots {
  int64_t per_chunk;
  at::Tensor row;       // [batch · chunks · per_chunk] packed row of a slot; 0 where it is padding
  at::Tensor position;  // [batch, 1, chunks, per_chunk] its token within the chunk
  at::Tensor of_row;    // [N] slot of a packed row

  Slots(const at::Tensor& spans, const cpu::MixerShape& s, at::Device device) {
    const QueryRows rows(spans, s);
    per_chunk = rows.largest;
    std::vector<int32_t> row_of(static_cast<size_t>(s.batch * s.chunks * per_chunk), 0), within = row_of;
    std::vector<int32_t> slot_of(rows.rows.size());
    for (int64_t batch = 0; batch < s.batch; ++batch) {
      for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
        const int64_t* begin = rows.chunk_begin.data() + batch * (s.chunks + 1) + chunk;
        for (int64_t i = begin[0]; i < begin[1]; ++i) {
          const auto slot = static_cast<size_t>((batch * s.chunks + chunk) * per_chunk + i - begin[0]);
          const auto entry = static_cast<size_t>(i);
          row_of[slot] = static_cast<int32_t>(rows.rows[entry]);
          within[slot] = static_cast<int32_t>(rows.positions[entry] - chunk * s.chunk);
          slot_of[static_cast<size_t>(rows.rows[entry])] = static_cast<int32_t>(slot);
        }
      }
    }
    row = to_device(row_of, device);
    position = to_device(within, device).to(at::kLong).view({s.batch, 1, s.chunks, per_chunk});
    of_row = to_device(slot_of, device);
  }
};

// e^{to − from} where `mask` holds, else 0, without an exponential that overflows.
at::Tensor decay_between(const at::Tensor& to, const at::Tensor& from, const at::Tensor& mask) {
  return (to.unsqueeze(-1) - from.unsqueeze(-2)).masked_fill(mask.logical_not(), -INFINITY).exp();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> gated_delta_rule_chunked(const at::Tensor& query, const at::Tensor& key,
                                                            const at::Tensor& value,
                                                            const at::Tensor& log_decay,
                                                            const at::Tensor& beta, const at::Tensor& spans,
                                                            const std::optional<at::Tensor>& initial_state,
                                                            double scale, int64_t chunk) {
  const cpu::MixerShape s = expect_mixer_tensors(
      {"gated_delta_rule", "beta", query, key, value, log_decay, beta, spans, initial_state, chunk});
  const at::ScalarType type = accumulate_type(value.scalar_type());
  at::Tensor state = initial_state.has_value() && initial_state->defined()
                         ? *initial_state
                         : at::zeros({s.batch, s.state_heads, s.key_dim, s.value_dim}, log_decay.options());
  const int64_t readers = s.output_heads / s.state_heads;
  if (s.chunks == 0) return {query.new_zeros({query.size(0), s.output_heads, s.value_dim}), state};

  // [batch, time, heads, …] as [batch, heads, chunks, chunk, …]; tokens past the end change nothing.
  const auto blocks = [&](const at::Tensor& x) {
    const int64_t missing = s.chunks * s.chunk - s.time;
    const at::Tensor wide = x.to(type);
    const at::Tensor padded = x.dim() == 4 ? at::constant_pad_nd(wide, {0, 0, 0, 0, 0, missing})
                                           : at::constant_pad_nd(wide, {0, 0, 0, missing});
    return padded.unflatten(1, {s.chunks, s.chunk}).movedim(3, 1);
  };
  const at::Tensor k = blocks(key).repeat_interleave(s.state_heads / s.key_heads, 1);
  const at::Tensor v = blocks(value), step = blocks(beta);
  const at::Tensor log_gamma = blocks(log_decay).cumsum(-1);
  const at::Tensor last = log_gamma.narrow(-1, s.chunk - 1, 1);
  const at::Tensor gamma = log_gamma.exp().unsqueeze(-1), rho = (last - log_gamma).exp().unsqueeze(-1);
  const at::Tensor total = last.exp().unsqueeze(-1);

  const at::Tensor token = at::arange(s.chunk, log_decay.options().dtype(at::kLong));
  const at::Tensor staircase = token.unsqueeze(1).ge(token);
  const at::Tensor lower =
      (step.unsqueeze(-1) * k.matmul(k.mT()) * decay_between(log_gamma, log_gamma, staircase)).tril(-1);
  const at::Tensor unit = at::eye(s.chunk, lower.options()).expand_as(lower);
  const at::Tensor inverse = at::linalg_solve_triangular(lower + unit, unit, /*upper=*/false, /*left=*/true,
                                                         /*unitriangular=*/true) *
                             step.unsqueeze(-2);
  // U = A (β ⊙ (V − γ ⊙ (K S))), with what does not know S done for all chunks at once.
  const at::Tensor from_value = inverse.matmul(v), from_state = inverse.matmul(gamma * k);
  const at::Tensor into_state = (rho * k).mT();
  std::vector<at::Tensor> states, updates;
  for (int64_t i = 0; i < s.chunks; ++i) {
    states.push_back(state);
    updates.push_back(from_value.select(2, i) - from_state.select(2, i).matmul(state));
    state = total.select(2, i) * state + into_state.select(2, i).matmul(updates.back());
  }
  if (query.size(0) == 0) return {value.new_zeros({0, s.output_heads, s.value_dim}), state};

  const Slots slots(spans, s, value.device());
  const int64_t per_chunk = slots.per_chunk;
  const at::Tensor q = query.to(type)
                           .index_select(0, slots.row)
                           .repeat_interleave(s.output_heads / s.query_heads, 1)
                           .view({s.batch, s.chunks, per_chunk, s.state_heads, readers, s.key_dim})
                           .permute({0, 3, 1, 4, 2, 5})
                           .reshape({s.batch, s.state_heads, s.chunks, readers * per_chunk, s.key_dim});
  const at::Tensor log_gamma_q =
      log_gamma.gather(-1, slots.position.expand({s.batch, s.state_heads, s.chunks, per_chunk}));
  const auto by_reader = [&](const at::Tensor& x) { return x.unflatten(3, {readers, per_chunk}); };
  const at::Tensor between = decay_between(log_gamma_q, log_gamma, slots.position.unsqueeze(-1).ge(token));
  const at::Tensor weights = by_reader(q.matmul(k.mT())) * between.unsqueeze(3);
  const at::Tensor from_states =
      by_reader(q.matmul(at::stack(states, 2))) * log_gamma_q.exp().unsqueeze(-1).unsqueeze(3);
  const at::Tensor output =
      scale * (from_states + by_reader(weights.flatten(3, 4).matmul(at::stack(updates, 2))));
  const at::Tensor packed = output.permute({0, 2, 4, 1, 3, 5})
                                .reshape({-1, s.output_heads, s.value_dim})
                                .index_select(0, slots.of_row);
  return {packed.to(value.scalar_type()), state};
}

}  // namespace oryx::operators
