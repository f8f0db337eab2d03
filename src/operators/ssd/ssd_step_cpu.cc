#include "operators/cpu/mixer_step.h"
#include "operators/ssd/ssd_cpu.h"

namespace oryx::ORYX_CPU_ISA {

using cpu::SsdForward;

namespace {

template <typename Element>
void steps(const SsdForward& f, int64_t begin, int64_t end, char* scratch) {
  using Acc = Accumulate<Element>;
  const cpu::MixerShape& shape = f.inputs.shape;
  const int64_t key_dim = shape.key_dim, value_dim = shape.value_dim;
  Arena arena{scratch};
  StepWork<Element> w(f.inputs, arena);
  for_each_token<Acc>(
      f.inputs, begin, end, f.final_state,
      [&](const Stream& s, int64_t time, int64_t entry, int64_t rows, const Acc* from, Acc* to) {
        const int64_t at = (s.batch * shape.time + time) * shape.state_heads + s.head;
        const Acc decay = std::exp(static_cast<const Acc*>(f.inputs.log_decay)[at]);
        const Acc step = static_cast<const Acc*>(f.inputs.step)[at];
        w.load_token(s, time);
        for (int64_t j = 0; j < value_dim; ++j) w.update[j] = step * w.value[j];
        if (rows > 0) w.load_query(s, f.inputs.rows.row[entry], Acc(1));
        for (int64_t i = 0; i < key_dim; i += kStepRows) {
          const int64_t count = key_dim - i < kStepRows ? key_dim - i : kStepRows;
          step_rows(count, value_dim, decay, w.key + i, w.update, from + i * value_dim, to + i * value_dim);
          for (int64_t r = 0; r < (rows > 0 ? w.group : 0); ++r) {
            sum_rows(count, value_dim, w.query + r * key_dim + i, to + i * value_dim,
                     w.output + r * value_dim);
          }
        }
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t packed = f.inputs.rows.row[entry + row];
          if (row > 0) {  // the same token asked for again, by an overlapping span
            w.load_query(s, packed, Acc(1));
            for (int64_t r = 0; r < w.group; ++r) {
              sum_rows(key_dim, value_dim, w.query + r * key_dim, to, w.output + r * value_dim);
            }
          }
          for (int64_t r = 0; f.skip != nullptr && r < w.group; ++r) {
            const Acc skip = static_cast<const Acc*>(f.skip)[s.first_output + r];
            for (int64_t j = 0; j < value_dim; ++j) w.output[r * value_dim + j] += skip * w.value[j];
          }
          w.store_output(s, packed, f.output);
        }
      });
}

}  // namespace

int64_t ssd_steps_scratch(const SsdForward& a) {
  return with_element(a.inputs.type, [&](auto element) {
    Arena arena{nullptr};
    StepWork<decltype(element)> work(a.inputs, arena);
    return arena.used;
  });
}

void ssd_steps(const SsdForward& a, int64_t begin, int64_t end, void* scratch) {
  with_element(a.inputs.type, [&](auto element) {
    steps<decltype(element)>(a, begin, end, static_cast<char*>(scratch));
    return 0;
  });
}

}  // namespace oryx::ORYX_CPU_ISA
