#include "operators/cpu/mixer_step.h"
#include "operators/gated_delta_rule/gated_delta_rule_cpu.h"

namespace oryx::ORYX_CPU_ISA {

using cpu::GatedDeltaForward;

namespace {

// Two passes over the state: the first, from memory, gives k S and q S; the second, from cache, writes
// S' = a S + kᵀ w with w = β (v − a k S). Then q S' = a q S + (q·k) w needs no third.
template <typename Element>
void steps(const GatedDeltaForward& f, int64_t begin, int64_t end, char* scratch) {
  using Acc = Accumulate<Element>;
  const cpu::MixerShape& shape = f.inputs.shape;
  const int64_t key_dim = shape.key_dim, value_dim = shape.value_dim;
  const Acc scale = static_cast<Acc>(f.scale);
  Arena arena{scratch};
  StepWork<Element> w(f.inputs, arena);
  for_each_token<Acc>(
      f.inputs, begin, end, f.final_state,
      [&](const Stream& s, int64_t time, int64_t entry, int64_t rows, const Acc* from, Acc* to) {
        const int64_t at = (s.batch * shape.time + time) * shape.state_heads + s.head;
        const Acc decay = std::exp(static_cast<const Acc*>(f.inputs.log_decay)[at]);
        const Acc beta = static_cast<const Acc*>(f.inputs.step)[at];
        const int64_t readers = rows > 0 ? w.group : 0;
        w.load_token(s, time);
        if (rows > 0) w.load_query(s, f.inputs.rows.row[entry], scale);
        std::memset(w.update, 0, value_dim * sizeof(Acc));
        for (int64_t i = 0; i < key_dim; i += kStepRows) {
          const int64_t count = key_dim - i < kStepRows ? key_dim - i : kStepRows;
          sum_rows(count, value_dim, w.key + i, from + i * value_dim, w.update);
          for (int64_t r = 0; r < readers; ++r) {
            sum_rows(count, value_dim, w.query + r * key_dim + i, from + i * value_dim,
                     w.output + r * value_dim);
          }
        }
        for (int64_t j = 0; j < value_dim; ++j) w.update[j] = beta * (w.value[j] - decay * w.update[j]);
        step_rows(key_dim, value_dim, decay, w.key, w.update, from, to);
        for (int64_t r = 0; r < readers; ++r) {
          Acc product = 0;
          for (int64_t i = 0; i < key_dim; ++i) product += w.query[r * key_dim + i] * w.key[i];
          Acc* output = w.output + r * value_dim;
          for (int64_t j = 0; j < value_dim; ++j) output[j] = decay * output[j] + product * w.update[j];
        }
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t packed = f.inputs.rows.row[entry + row];
          if (row > 0) {  // the same token asked for again, by an overlapping span
            w.load_query(s, packed, scale);
            for (int64_t r = 0; r < w.group; ++r) {
              sum_rows(key_dim, value_dim, w.query + r * key_dim, to, w.output + r * value_dim);
            }
          }
          w.store_output(s, packed, f.output);
        }
      });
}

}  // namespace

int64_t gated_delta_steps_scratch(const GatedDeltaForward& a) {
  return with_element(a.inputs.type, [&](auto element) {
    Arena arena{nullptr};
    StepWork<decltype(element)> work(a.inputs, arena);
    return arena.used;
  });
}

void gated_delta_steps(const GatedDeltaForward& a, int64_t begin, int64_t end, void* scratch) {
  with_element(a.inputs.type, [&](auto element) {
    steps<decltype(element)>(a, begin, end, static_cast<char*>(scratch));
    return 0;
  });
}

}  // namespace oryx::ORYX_CPU_ISA
