// The language model: embedding, layers, final norm, tied head. The one forward pass that training, scoring
// and generation share.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "model/block.h"
#include "model/config.h"
#include "model/state.h"
#include "model/weights.h"

namespace oryx::model {

class LanguageModel {
 public:
  // `dtype` is the computing type of activations and products; it may be lower than the weights' own
  // (bfloat16 over float32 master weights).
  LanguageModel(ModelConfig config, Weights weights, at::ScalarType dtype);
  LanguageModel(LanguageModel&&) = default;
  LanguageModel& operator=(LanguageModel&&) = default;

  // A model directory, its matrices held in `dtype`.
  static LanguageModel load(const std::filesystem::path& directory, at::ScalarType dtype, at::Device device);

  const ModelConfig& config() const { return config_; }
  Weights& weights() { return weights_; }
  const Weights& weights() const { return weights_; }
  at::ScalarType dtype() const { return dtype_; }
  at::Device device() const;

  JointState empty_state(int64_t batch, NextModes next = {}) const;

  // Whether training keeps only the inputs of each layer and runs the layer again in backward.
  void set_recompute_layers(bool recompute) { recompute_layers_ = recompute; }

  // tokens [batch, time] int64 → the normed hidden states [batch · time, width].
  // `spans`: one schedule for all sequences or one a sequence, in absolute positions, covering the piece.
  // `state`: when given, it is continued and advanced; otherwise the piece starts a sequence.
  // `lengths`: where sequences have fewer than `time` tokens in this piece, how many; the rest of their row
  // is padding of any ids, which enters no state, and whose hidden states mean nothing. Throws Error on a
  // token id outside the vocabulary, and on a mode that the state keeps nothing for.
  at::Tensor hidden(const at::Tensor& tokens, const std::vector<schedule::ModeSpans>& spans,
                    JointState* state = nullptr, const std::vector<int64_t>& lengths = {}) const;

  // The same, for the last piece: `state` is continued, but neither kept up nor changed.
  at::Tensor last_hidden(const at::Tensor& tokens, const std::vector<schedule::ModeSpans>& spans,
                         const JointState& state, const std::vector<int64_t>& lengths = {}) const;

  // hidden [n, width] → logits [n, vocabulary] in the computing type.
  at::Tensor logits(const at::Tensor& hidden) const;

  // Loss of hidden [n, width] against targets [n] int64 (negative: ignored), without ever holding the logits
  // of all rows: first the scalar scale · Σ losses (differentiable), then each token's loss [n].
  std::pair<at::Tensor, at::Tensor> loss(const at::Tensor& hidden, const at::Tensor& targets,
                                         double scale) const;

 private:
  at::Tensor run(const at::Tensor& tokens, const std::vector<schedule::ModeSpans>& spans, JointState* state,
                 const std::vector<int64_t>& lengths, bool keeps_state) const;

  ModelConfig config_;
  Weights weights_;
  at::ScalarType dtype_;
  std::vector<Layer> layers_;
  at::Tensor embedding_, final_norm_;
  bool recompute_layers_ = false;
};

}  // namespace oryx::model
