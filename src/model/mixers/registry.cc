#include <ATen/ATen.h>

#include <array>

#include "base/error.h"
#include "base/nearest_name.h"
#include "model/mixers/mixer.h"
#include "operators/l2_norm/l2_norm.h"
#include "operators/rotary/rotary.h"

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
  at::Tensor prepared = query;
  if (options.query_activation == "silu") prepared = at::silu(prepared);
  if (options.l2_norm == "query_key") prepared = operators::l2_norm(prepared);
  if (rotate) prepared = operators::rotary(prepared, selection.cosine, selection.sine);
  return prepared;
}

}  // namespace oryx::model
