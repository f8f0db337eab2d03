#include <ATen/ATen.h>

#include "operators/cpu/mixer_inputs.h"
#include "operators/gated_delta_rule/gated_delta_rule.h"

namespace oryx::operators {

std::tuple<at::Tensor, at::Tensor> gated_delta_rule_recurrence(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& log_decay,
    const at::Tensor& beta, const at::Tensor& spans, const std::optional<at::Tensor>& initial_state,
    double scale, int64_t chunk) {
  const MixerTensors tensors{"gated_delta_rule", "beta", query, key,           value,
                             log_decay,          beta,   spans, initial_state, chunk};
  const cpu::MixerShape shape = expect_mixer_tensors(tensors);
  const auto [output, state] =
      recurrence(tensors, shape,
                 [](const at::Tensor& before, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& decay, const at::Tensor& step) {
                   const at::Tensor s = decay * before;
                   const at::Tensor error = v.unsqueeze(2) - k.unsqueeze(2).matmul(s);  // [B, Hv, 1, Dv]
                   return s + step * k.unsqueeze(3) * error;
                 });
  return {(scale * output).to(value.scalar_type()), state};
}

}  // namespace oryx::operators
