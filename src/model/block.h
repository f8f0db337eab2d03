// The shared block: one set of keys, values, gate, output projection and MLP under several mixers.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/mixers/mixer.h"
#include "model/routing.h"
#include "model/state.h"
#include "model/weights.h"

namespace oryx::model {

// The parameters of layer `layer` in the order of the files.
void add_layer_parameters(const ModelConfig& config, int64_t layer, std::vector<ParameterSpec>& specs);

// The mixing half of a layer: Y = GatedNorm(O, G) W_O with O from the mixer that each token's mode names.
class Block {
 public:
  Block(const ModelConfig& config, int64_t layer, const Weights& weights);

  // x [batch · time, width], normed → [batch · time, width]. `state` may be null.
  at::Tensor forward(const at::Tensor& x, const Routing& routing, LayerState* state) const;

 private:
  struct Part {
    std::unique_ptr<Mixer> mixer;
    schedule::Mode mode;
    at::Tensor query;  // its projection
    bool reads_rotated_key;
    at::Tensor output_norm;  // intra_layer hybrids only: the norm of this mixer's output
  };
  struct Convolution {
    at::Tensor weight, bias;  // undefined where the config has none
  };

  // One tensor, for attention and for the linear mixer: what flows back from each is added where it was made,
  // in no pass of its own.
  using Handles = std::array<at::Tensor, 2>;

  const Selection& selection(const Part& part, const Routing& routing) const;
  // x [rows, channels] through the convolution (when there is one) and its activation, continuing `tail`.
  Handles convolve(const at::Tensor& x, const Convolution& convolution, const Routing& routing,
                   at::Tensor* tail) const;
  at::Tensor gated_norm(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& norm) const;

  ModelConfig config_;
  std::vector<Part> parts_;
  at::Tensor key_, value_, gate_, output_, norm_, shared_query_;
  Convolution key_conv_, value_conv_, query_conv_;
};

// A layer of the Transformer++ kind: X + Block(RMSNorm(X)), then X + SwiGLU(RMSNorm(X)).
class Layer {
 public:
  Layer(const ModelConfig& config, int64_t layer, const Weights& weights);

  const at::Tensor& input_norm() const { return mixer_norm_; }

  // Takes the residual stream and its normed form, and returns both as the next layer (or the final norm,
  // `next_norm`) wants them, so that each residual addition is one pass together with the norm after it.
  std::pair<at::Tensor, at::Tensor> forward(const at::Tensor& residual, const at::Tensor& normed,
                                            const at::Tensor& next_norm, const Routing& routing,
                                            LayerState* state) const;

 private:
  double norm_eps_;
  Block block_;
  at::Tensor mixer_norm_, mlp_norm_, mlp_gate_, mlp_up_, mlp_down_;
};

}  // namespace oryx::model
