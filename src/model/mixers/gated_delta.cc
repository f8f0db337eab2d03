#include <ATen/ATen.h>

#include <cmath>

#include "model/mixers/mixer.h"
#include "operators/gated_delta_rule/gated_delta_rule.h"
#include "operators/l2_norm/l2_norm.h"

namespace oryx::model {

namespace {

// Gated DeltaNet (Yang et al. 2025): log decay −exp(A_log)·softplus(x W_a + b_a), β = sigmoid(x W_b), both
// per state head; outputs scaled by 1/√head_dim.
class GatedDelta : public Mixer {
 public:
  GatedDelta(const ModelConfig& config, const std::string& prefix, const Weights& weights)
      : options_(config.gated_delta),
        rotates_(config.rope == "all"),
        scale_(1.0 / std::sqrt(static_cast<double>(config.head_dim))),
        decay_weight_(weights.at(prefix + "decay.weight")),
        decay_bias_(weights.at(prefix + "decay_bias")),
        log_a_(weights.at(prefix + "A_log")),
        beta_weight_(weights.at(prefix + "beta.weight")) {}

  std::vector<at::Tensor> projections() const override { return {decay_weight_, beta_weight_}; }

  bool is_kept(const LayerState& state) const override { return state.recurrent.defined(); }

  at::Tensor forward(const at::Tensor& query, const SharedInput& shared,
                     const std::vector<at::Tensor>& projected, const Selection& selection,
                     LayerState* state) const override {
    at::Tensor key = rotates_ ? shared.rotated_key : shared.key;
    if (options_.l2_norm != "none") key = operators::l2_norm(key);
    const auto [log_decay, beta] =
        token_decays(projected[0], decay_bias_, log_a_, projected[1], *shared.routing);
    const at::Tensor prepared = prepare_query(query, options_, rotates_, selection);
    if (state == nullptr) {
      return std::get<0>(operators::gated_delta_rule(prepared, key, shared.value, log_decay, beta,
                                                     selection.spans, std::nullopt, scale_));
    }
    const RecurrentPiece piece(*state, *shared.routing);
    auto [output, final_state] =
        operators::gated_delta_rule_inference(prepared, key, shared.value, log_decay, beta, selection.spans,
                                              piece.initial, piece.initial_rows, scale_, piece.keeps_state);
    piece.keep(*state, final_state);
    return output;
  }

 private:
  MixerOptions options_;
  bool rotates_;
  double scale_;
  at::Tensor decay_weight_, decay_bias_, log_a_, beta_weight_;
};

void add_parameters(const ModelConfig& config, const std::string& prefix, std::vector<ParameterSpec>& specs) {
  const int64_t heads = config.value_heads;
  specs.push_back(
      {prefix + "decay.weight", {heads, config.width}, Initialisation::normal, true, "gated_delta"});
  specs.push_back({prefix + "decay_bias", {heads}, Initialisation::step_bias, false, "gated_delta"});
  specs.push_back({prefix + "A_log", {heads}, Initialisation::log_small_decay, false, "gated_delta"});
  specs.push_back(
      {prefix + "beta.weight", {heads, config.width}, Initialisation::normal, true, "gated_delta"});
}

}  // namespace

const MixerType gated_delta_mixer = {"gated_delta", schedule::Mode::linear, add_parameters,
                                     [](const ModelConfig& config, const std::string& prefix,
                                        const Weights& weights) -> std::unique_ptr<Mixer> {
                                       return std::make_unique<GatedDelta>(config, prefix, weights);
                                     }};

}  // namespace oryx::model
