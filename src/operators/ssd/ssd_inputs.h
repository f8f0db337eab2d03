// The arguments of ssd as its kernels take them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "operators/cpu/mixer_arguments.h"

namespace oryx::operators {

// The inputs with contiguous rows; skip in the accumulate type. Checks everything.
struct SsdInputs {
  at::Tensor query, key, value, log_decay, step, skip, spans, initial_state,
      initial_rows;  // skip, initial_state, initial_rows: or undefined
  cpu::MixerShape shape;

  SsdInputs(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
            const at::Tensor& log_decay, const at::Tensor& step, const std::optional<at::Tensor>& skip,
            const at::Tensor& spans, const std::optional<at::Tensor>& initial_state, int64_t chunk,
            const std::optional<at::Tensor>& initial_rows = std::nullopt);
};

// Gradients of query, key, value, log_decay, step, skip and initial_state; the last two undefined without
// them.
using SsdGradients = std::array<at::Tensor, 7>;

}  // namespace oryx::operators
