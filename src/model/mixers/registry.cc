#include <ATen/ATen.h>

#include <array>

#include "base/error.h"
#include "base/nearest_name.h"
#include "model/mixers/mixer.h"
#include "operators/decays/decays.h"
#include "operators/prepare_heads/prepare_heads.h"

namespace oryx::model {

namespace {
const std::array mixer_types = {&attention_mixer, &ssd_mixer, &gated_delta_mixer};
}

const MixerType& mixer_type(std::string_view name) {
  std::vector<std::string> names;
  for (const MixerType* type : mixer_types) {
    if (type->name == name) return *type;
    names.emplace_back(type->name);
  }
  fail("unknown mixer '{}', did you mean '{}'?", name, nearest_name(name, names));
}

at::Tensor prepare_query(const at::Tensor& query, const MixerOptions& options, bool rotate,
                         const Selection& selection) {
  operators::HeadSteps steps;
  steps.silu = options.query_activation == "silu";
  steps.l2_norm = options.l2_norm == "query_key";
  if (rotate) {
    steps.cosine = selection.cosine;
    steps.sine = selection.sine;
  }
  return operators::prepare_heads(query, steps);
}

std::tuple<at::Tensor, at::Tensor> token_decays(const at::Tensor& projected, const at::Tensor& bias,
                                                const at::Tensor& log_a,
                                                const std::optional<at::Tensor>& beta,
                                                const Routing& routing) {
  const auto tokens = [&](const at::Tensor& x) {
    return routing.rows ? x : x.view({routing.batch, routing.time, x.size(1)});
  };
  return operators::decays(tokens(projected), bias, log_a,
                           beta ? std::optional<at::Tensor>(tokens(*beta)) : std::nullopt, routing.rows,
                           routing.mask);
}

}  // namespace oryx::model
