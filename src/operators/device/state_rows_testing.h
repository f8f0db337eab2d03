// Test support of the linear mixers' kernels that go on from states among others.
#pragma once

#include <c10/core/GradMode.h>

#include "operators/cpu/mixer_cases.h"
#include "operators/device/device_testing.h"

namespace oryx::operators::testing {

// States among others, read where they lie: by steps, by chunks and in segments; and none is left if none is
// asked for. `own` is the mixer from a state of each sequence's own, for tensors on the CPU; inference(x,
// states, rows, keeps_state) the one that reads them by row, for tensors on the kernels' device.
template <typename Inference>
void expect_goes_on_from_rows(const Mixer& own, bool normalised_keys, Inference inference) {
  const c10::NoGradGuard no_grad;
  const auto move = [](const at::Tensor& t) { return t.to(kernel_device()); };
  for (const auto& [batch, time] : {std::pair<int64_t, int64_t>{3, 2}, {3, 70}, {40, 9}, {1, 400}}) {
    const MixerCase c{batch, time, 2, 2, 2, 64, 64, 64, Decay::mild, Step::random, Spans::random};
    MixerTensors x = convert(draw(c, at::kBFloat16, 16, normalised_keys), at::kBFloat16);
    const at::Tensor states = at::randn({5, 2, 64, 64}), rows = at::randint(5, {batch}, at::kLong);
    x.initial_state = states.index_select(0, rows);
    const MixerTensors there{move(x.query), move(x.key),  move(x.value), move(x.log_decay),
                             move(x.step),  move(x.skip), x.spans,       std::nullopt};
    with_kernels([&] {
      const auto [want, want_state] = own(x);
      const auto [output, state] = inference(there, move(states), move(rows), true);
      const auto [alone, nothing] = inference(there, move(states), move(rows), false);
      EXPECT_TRUE(at::equal(output.cpu(), want) && at::equal(alone.cpu(), want)) << c.name();
      EXPECT_TRUE(at::equal(state.cpu(), want_state)) << c.name();
      EXPECT_FALSE(nothing.defined());
      return std::vector{output, state};
    });
  }
}

}  // namespace oryx::operators::testing
