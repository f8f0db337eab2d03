// What a block asks of a mixer. Attention, ssd and gated_delta are peers: a block owns several and each
// token's mode says which one answers. A new mixer is one operator, one file here and one line in
// registry.cc.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "model/config.h"
#include "model/routing.h"
#include "model/state.h"
#include "model/weights.h"

namespace oryx::model {

// What the block computed once for all its mixers, R = batch · time rows.
struct SharedInput {
  at::Tensor key;           // [batch, time, kv_heads, head_dim] after convolution and activation, not rotated
  at::Tensor rotated_key;   // the same rotated; undefined when no mixer of the block reads it
  at::Tensor value;         // [batch, time, value_heads, value_dim]
  at::Tensor cosine, sine;  // rotary tables of the piece [time or R, head_dim / 2]
  const Routing* routing = nullptr;
};

class Mixer {
 public:
  virtual ~Mixer() = default;

  // Further projections of the block's input that the mixer needs for every token, e.g. its steps.
  virtual std::vector<at::Tensor> projections() const { return {}; }

  // Whether `state` holds this mixer's part.
  virtual bool is_kept(const LayerState& state) const = 0;

  // Whether forward has anything to do for this selection: outputs, or a state that a later piece reads.
  bool is_needed(const Selection& selection, const Routing& routing, const LayerState* state) const {
    return selection.count > 0 || (routing.keeps_state && is_kept(*state));
  }

  // query [selection.count, heads, head_dim], straight from its projection; `projected`: those of
  // projections(), each [R, n], its rows in the order of routing.h. Takes every token of the piece into this
  // mixer's part of `state` (unless null or not kept), whatever its mode, and returns the outputs of the
  // selected tokens [selection.count, output_heads, value_dim].
  virtual at::Tensor forward(const at::Tensor& query, const SharedInput& shared,
                             const std::vector<at::Tensor>& projected, const Selection& selection,
                             LayerState* state) const = 0;
};

// How a linear mixer goes on from a state and leaves one: what ssd_inference() and its like ask for.
struct RecurrentPiece {
  std::optional<at::Tensor> initial, initial_rows;
  bool keeps_state;

  RecurrentPiece(const LayerState& state, const Routing& routing)
      : keeps_state(routing.keeps_state && state.recurrent.defined()) {
    if (routing.starts || !state.recurrent.defined()) return;  // from zero
    initial = state.recurrent;
    if (state.recurrent_rows.defined()) initial_rows = state.recurrent_rows;
  }
  void keep(LayerState& state, const at::Tensor& final_state) const {
    if (!keeps_state) return;
    state.recurrent = final_state;
    state.recurrent_rows = at::Tensor();
  }
};

struct MixerType {
  std::string_view name;
  schedule::Mode mode;
  // Appends the parameters that only this mixer reads, beside its query projection.
  void (*add_parameters)(const ModelConfig& config, const std::string& prefix,
                         std::vector<ParameterSpec>& specs);
  std::unique_ptr<Mixer> (*make)(const ModelConfig& config, const std::string& prefix,
                                 const Weights& weights);
};

// Throws Error naming the nearest mixer when there is none of this name.
const MixerType& mixer_type(std::string_view name);

extern const MixerType attention_mixer, ssd_mixer, gated_delta_mixer;

// The query as a mixer reads it: activation, then L2 norm, then rotation (a rotation keeps the L2 norm).
at::Tensor prepare_query(const at::Tensor& query, const MixerOptions& options, bool rotate,
                         const Selection& selection);

// decays() of projections [R, heads], for the tokens of the routing, padding masked.
std::tuple<at::Tensor, at::Tensor> token_decays(const at::Tensor& projected, const at::Tensor& bias,
                                                const at::Tensor& log_a,
                                                const std::optional<at::Tensor>& beta,
                                                const Routing& routing);

}  // namespace oryx::model
