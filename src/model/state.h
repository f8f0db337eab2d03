// The joint state: everything a sequence carries from one piece to the next, whatever mixer comes next.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <vector>

#include "model/config.h"

namespace oryx::model {

// One layer's part. Tensors that the layer, or whatever comes next, has no use for stay undefined.
struct LayerState {
  // [batch, capacity, kv_heads, head_dim] and [.., value_heads, value_dim], computing type, keys rotated as
  // attention reads them. Only the first tokens of each sequence, up to its position, are meaningful:
  // capacity grows ahead of use.
  at::Tensor key_cache, value_cache;
  // [n, value_heads, head_dim, value_dim], float32 or float64: of sequence b row recurrent_rows[b] (int64
  // [batch]), or row b where those are undefined. Never written to: states that were selected from one share
  // it until each goes on.
  at::Tensor recurrent, recurrent_rows;
  at::Tensor key_tail, value_tail,
      query_tail;  // [batch, conv_width − 1, channels], raw inputs of the convolution
};

// The modes that tokens yet to come may have. A state for some of them keeps nothing for the others: neither
// the memory nor the time of keeping it up.
struct NextModes {
  bool attention = true, linear = true;
};

class JointState {
 public:
  // The state before the first token. Where modes decide nothing (ModelConfig::is_switchable), all is kept.
  static JointState empty(const ModelConfig& config, int64_t batch, at::ScalarType dtype, at::Device device,
                          NextModes next = {});

  int64_t batch() const { return batch_; }
  const NextModes& next_modes() const { return next_; }
  // Tokens of each sequence so far.
  const std::vector<int64_t>& positions() const { return positions_; }
  // Of all sequences. Throws Error where they differ.
  int64_t position() const;
  std::vector<LayerState>& layers() { return layers_; }
  const std::vector<LayerState>& layers() const { return layers_; }
  // The mode of every token so far, one schedule a sequence: a cached prefix serves only a text with equal
  // tokens and equal modes.
  const std::vector<schedule::ModeSpans>& modes() const { return modes_; }

  // Called by the language model alone: before a piece, room in the caches for `time` tokens more; and, once
  // every layer has taken it in, its length in each sequence.
  void make_room(int64_t time);
  void advance(const std::vector<schedule::ModeSpans>& spans, const std::vector<int64_t>& lengths);

  // A deep copy: continuing either leaves the other as it is. A copy kept aside is how a state rolls back.
  JointState clone() const;
  // The sequences `rows` (int64 [n]) of this state, in that order, repeats allowed, with room for that many
  // tokens more.
  JointState select(const at::Tensor& rows, int64_t room = 0) const;

  // Bytes of the meaningful part (spare capacity of the caches excluded).
  int64_t bytes() const;

  // One safetensors file: per layer `layers.N.{key,value}_cache`, `layers.N.<mixer>.state`,
  // `layers.N.{key,value,query}_conv_tail`, and `position` [1] int64, `modes` [batch, position] uint8. Throws
  // Error where sequences differ in length or not everything is kept.
  void save(const std::filesystem::path& file, const ModelConfig& config) const;
  // Throws Error when the file is of another shape than `config` asks for. Tensors are converted to the
  // computing type (the recurrent state to float32 at least).
  static JointState load(const std::filesystem::path& file, const ModelConfig& config, at::ScalarType dtype,
                         at::Device device);

 private:
  int64_t longest() const;

  int64_t batch_ = 0;
  NextModes next_;
  std::vector<int64_t> positions_;
  std::vector<LayerState> layers_;
  std::vector<schedule::ModeSpans> modes_;
};

}  // namespace oryx::model
