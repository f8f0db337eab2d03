#include <ATen/ATen.h>

#include <cmath>

#include "model/mixers/mixer.h"
#include "operators/attention/attention.h"
#include "operators/l2_norm/l2_norm.h"
#include "operators/merge_rows/merge_rows.h"
#include "operators/rotary/rotary.h"

namespace oryx::model {

namespace {

// Copies `tokens` [batch, time, heads, dim] to their places in `cache`, which has room for them, and returns
// what attention may read of it.
at::Tensor append_to_cache(const at::Tensor& cache, const at::Tensor& tokens, const Routing& routing) {
  if (routing.cache_rows) {
    operators::write_rows(cache.flatten(0, 1), *routing.cache_rows, tokens.flatten(0, 1));
    return cache;
  }
  cache.narrow(1, routing.position, routing.time).copy_(tokens);
  return cache.narrow(1, 0, routing.position + routing.time);
}

class Attention : public Mixer {
 public:
  explicit Attention(const ModelConfig& config)
      : options_(config.attention), rotates_(config.rope != "none") {
    scale_ = 1.0 / std::sqrt(static_cast<double>(config.head_dim));
  }

  bool is_kept(const LayerState& state) const override { return state.key_cache.defined(); }

  at::Tensor forward(const at::Tensor& query, const SharedInput& shared, const std::vector<at::Tensor>&,
                     const Selection& selection, LayerState* state) const override {
    at::Tensor key = rotates_ ? shared.rotated_key : shared.key;
    if (options_.l2_norm != "none") {
      key = operators::l2_norm(shared.key);
      if (rotates_) key = operators::rotary(key, shared.cosine, shared.sine);
    }
    at::Tensor value = shared.value;
    if (state != nullptr && is_kept(*state)) {
      key = append_to_cache(state->key_cache, key, *shared.routing);
      value = append_to_cache(state->value_cache, value, *shared.routing);
    }
    return operators::attention(prepare_query(query, options_, rotates_, selection), key, value,
                                selection.spans_in_sequence, scale_);
  }

 private:
  MixerOptions options_;
  bool rotates_;
  double scale_;
};

}  // namespace

const MixerType attention_mixer = {
    "attention", schedule::Mode::attention,
    [](const ModelConfig&, const std::string&, std::vector<ParameterSpec>&) {},
    [](const ModelConfig& config, const std::string&, const Weights&) -> std::unique_ptr<Mixer> {
      return std::make_unique<Attention>(config);
    }};

}  // namespace oryx::model
