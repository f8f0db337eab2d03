#include <ATen/ATen.h>

#include "model/mixers/mixer.h"
#include "operators/l2_norm/l2_norm.h"
#include "operators/ssd/ssd.h"

namespace oryx::model {

namespace {

// Mamba-2 (Dao & Gu 2024): Δ = softplus(x W_Δ + b_Δ), log decay −exp(A_log)·Δ, both per state head.
class Ssd : public Mixer {
 public:
  Ssd(const ModelConfig& config, const std::string& prefix, const Weights& weights)
      : options_(config.ssd),
        rotates_(config.rope == "all"),
        step_weight_(weights.at(prefix + "step.weight")),
        step_bias_(weights.at(prefix + "step_bias")),
        log_a_(weights.at(prefix + "A_log")),
        skip_(weights.at(prefix + "D")) {}

  std::vector<at::Tensor> projections() const override { return {step_weight_}; }

  bool is_kept(const LayerState& state) const override { return state.recurrent.defined(); }

  at::Tensor forward(const at::Tensor& query, const SharedInput& shared,
                     const std::vector<at::Tensor>& projected, const Selection& selection,
                     LayerState* state) const override {
    at::Tensor key = rotates_ ? shared.rotated_key : shared.key;
    if (options_.l2_norm != "none") key = operators::l2_norm(key);
    const auto [log_decay, step] =
        token_decays(projected[0], step_bias_, log_a_, std::nullopt, *shared.routing);
    const at::Tensor prepared = prepare_query(query, options_, rotates_, selection);
    if (state == nullptr) {
      return std::get<0>(
          operators::ssd(prepared, key, shared.value, log_decay, step, skip_, selection.spans, std::nullopt));
    }
    const RecurrentPiece piece(*state, *shared.routing);
    auto [output, final_state] =
        operators::ssd_inference(prepared, key, shared.value, log_decay, step, skip_, selection.spans,
                                 piece.initial, piece.initial_rows, piece.keeps_state);
    piece.keep(*state, final_state);
    return output;
  }

 private:
  MixerOptions options_;
  bool rotates_;
  at::Tensor step_weight_, step_bias_, log_a_, skip_;
};

void add_parameters(const ModelConfig& config, const std::string& prefix, std::vector<ParameterSpec>& specs) {
  const int64_t heads = config.value_heads;
  specs.push_back({prefix + "step.weight", {heads, config.width}, Initialisation::normal, true, "ssd"});
  specs.push_back({prefix + "step_bias", {heads}, Initialisation::step_bias, false, "ssd"});
  specs.push_back({prefix + "A_log", {heads}, Initialisation::log_uniform_decay, false, "ssd"});
  specs.push_back({prefix + "D", {config.output_heads()}, Initialisation::ones, false, "ssd"});
}

}  // namespace

const MixerType ssd_mixer = {"ssd", schedule::Mode::linear, add_parameters,
                             [](const ModelConfig& config, const std::string& prefix,
                                const Weights& weights) -> std::unique_ptr<Mixer> {
                               return std::make_unique<Ssd>(config, prefix, weights);
                             }};

}  // namespace oryx::model
