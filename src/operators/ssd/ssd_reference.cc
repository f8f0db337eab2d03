#include <ATen/ATen.h>

#include "base/shapes.h"
#include "operators/cpu/mixer_inputs.h"
#include "operators/ssd/ssd.h"

namespace oryx::operators {

std::tuple<at::Tensor, at::Tensor> ssd_recurrence(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& log_decay,
    const at::Tensor& step, const std::optional<at::Tensor>& skip, const at::Tensor& spans,
    const std::optional<at::Tensor>& initial_state, int64_t chunk) {
  const MixerTensors tensors{"ssd", "step", query, key, value, log_decay, step, spans, initial_state, chunk};
  const cpu::MixerShape shape = expect_mixer_tensors(tensors);
  auto [output, state] =
      recurrence(tensors, shape,
                 [](const at::Tensor& s, const at::Tensor& k, const at::Tensor& v, const at::Tensor& decay,
                    const at::Tensor& delta) { return decay * s + delta * k.unsqueeze(3) * v.unsqueeze(2); });
  if (skip.has_value() && skip->defined()) {
    expect_shape("ssd", "skip", *skip, {shape.output_heads});
    const auto [sequence, position] = row_places(spans, value.device());
    const at::Tensor read = value.index({sequence, position})
                                .to(output.scalar_type())
                                .repeat_interleave(shape.output_heads / shape.state_heads, 1);
    output = output + skip->to(output.scalar_type()).unsqueeze(1) * read;
  }
  return {output.to(value.scalar_type()), state};
}

}  // namespace oryx::operators
