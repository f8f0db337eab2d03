#include "operators/ssd/ssd_cuda.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "operators/cpu/mixer_inputs.h"
#include "operators/device/runtime.h"
#include "operators/device/span_table.h"
#include "operators/ssd/ssd_kernels.h"

namespace oryx::operators {

namespace {

// Which chunks of a sequence hold rows: int32 [batch, chunks].
struct ChunkTable {
  at::Tensor has_rows;
};

std::shared_ptr<const ChunkTable> chunk_table(const at::Tensor& spans, int64_t batch, int64_t time,
                                              at::Device device) {
  static SpanCache<ChunkTable> cache;
  return cache.get(spans, batch, time, device, [&] {
    const int64_t chunks = (time + cuda::kSsdChunk - 1) / cuda::kSsdChunk;
    std::vector<int32_t> has_rows(static_cast<size_t>(batch * chunks));
    const auto rows = spans.accessor<int64_t, 2>();
    for (int64_t i = 0; i < rows.size(0); ++i) {
      if (rows[i][1] == rows[i][2]) continue;
      const auto first = has_rows.begin() + rows[i][0] * chunks;
      std::fill(first + rows[i][1] / cuda::kSsdChunk, first + (rows[i][2] - 1) / cuda::kSsdChunk + 1, 1);
    }
    return ChunkTable{to_device(has_rows, device)};
  });
}

// Rows that cp.async can read: aligned to 16 bytes.
at::Tensor aligned(const at::Tensor& x) {
  bool is_aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) is_aligned = is_aligned && x.stride(d) % 8 == 0;
  return is_aligned ? x : x.clone(at::MemoryFormat::Contiguous);
}

// What the launchers of one call share.
struct Call {
  const SsdInputs& in;
  cpu::MixerShape shape;
  at::Tensor query, key, value, initial_state;
  std::shared_ptr<const SpanTable> spans;
  std::shared_ptr<const ChunkTable> table;
  void* stream;
  at::Tensor decay_storage;
  cuda::SsdDecay decay{};

  explicit Call(const SsdInputs& given)
      : in(given),
        shape(given.shape),
        query(aligned(given.query)),
        key(aligned(given.key)),
        value(aligned(given.value)),
        initial_state(given.initial_state.defined() ? aligned(given.initial_state) : given.initial_state),
        spans(span_table(given.spans, shape.batch, shape.time, value.device())),
        table(chunk_table(given.spans, shape.batch, shape.time, value.device())),
        stream(cuda::stream(value)) {
    shape.chunk = cuda::kSsdChunk;
    shape.chunks = (shape.time + shape.chunk - 1) / shape.chunk;
    const int64_t tokens = streams() * shape.chunks * shape.chunk;
    decay_storage = at::empty({5 * tokens}, in.log_decay.options());
    auto* base = decay_storage.mutable_data_ptr<float>();
    decay = {base, base + 2 * tokens, base + 3 * tokens, base + 4 * tokens};
    cuda::ssd_decay({shape, in.log_decay.const_data_ptr<float>(), in.step.const_data_ptr<float>(), decay},
                    stream);
  }

  int64_t streams() const { return shape.batch * shape.state_heads; }

  // What is to be known of a sequence's segments before they are walked over side by side. Keeps what `local`
  // and the walk point at.
  struct Cut {
    cuda::SsdWalk local{};  // finds what the segments add to the state
    at::Tensor local_states, factor, states;
  };

  // Cuts what walks from the state `first` (or zero) to `last` (or nowhere) into about `segments` segments of
  // two chunks and more; `local` walks over the same tokens, from zero. One of `walks` launched together.
  template <typename Arguments>
  Cut cut(Arguments& arguments, cuda::SsdWalk local, const at::Tensor& first, const at::Tensor& last,
          int64_t segments, int64_t walks) const {
    const int64_t state_size = shape.key_dim * shape.value_dim;
    const auto data = [](const at::Tensor& x) { return x.defined() ? x.mutable_data_ptr<float>() : nullptr; };
    arguments.shape = shape;
    arguments.segment_chunks = std::max<int64_t>(2, (shape.chunks + segments - 1) / segments);
    arguments.segments = (shape.chunks + arguments.segment_chunks - 1) / arguments.segment_chunks;
    arguments.first_state = data(first);
    arguments.last_state = data(last);
    Cut result;
    if (arguments.segments == 1) return result;
    // As many pieces as fill the device, of two chunks and more.
    const int64_t blocks = walks * streams() * (shape.value_dim / 64) * (arguments.segments - 1);
    const int64_t length = arguments.segment_chunks,
                  most = std::clamp<int64_t>(walk_blocks() / blocks, 1, (length + 1) / 2),
                  piece_chunks = (length + most - 1) / most;
    local.local_pieces = (length + piece_chunks - 1) / piece_chunks;
    const int64_t pieces = (arguments.segments - 1) * local.local_pieces;
    result.local_states = at::empty({streams(), pieces, state_size}, in.log_decay.options());
    result.factor = at::empty({streams(), pieces}, in.log_decay.options());
    result.states = at::empty({streams(), arguments.segments, state_size}, in.log_decay.options());
    local.shape = shape;
    local.gamma = decay.gamma;
    local.segments = arguments.segments, local.segment_chunks = arguments.segment_chunks;
    local.last_state = data(result.local_states);
    local.last_factor = data(result.factor);
    arguments.first_state = data(result.states);
    result.local = local;
    return result;
  }
  // From the local states to those before every segment.
  void join(const Cut& cut, const at::Tensor& first) const {
    cuda::ssd_join_segments(
        {streams(), cut.local.segments, cut.local.local_pieces, shape.key_dim * shape.value_dim,
         cut.local_states.const_data_ptr<float>(), cut.factor.const_data_ptr<float>(),
         first.defined() ? first.const_data_ptr<float>() : nullptr, cut.states.mutable_data_ptr<float>()},
        stream);
  }

  // Blocks of ssd_walk that the device has room for: three fit into a multiprocessor.
  int64_t walk_blocks() const { return 3 * cuda::multiprocessors(value); }

  // The states before every chunk from the state `first` on, and what `reverse` finds after every chunk: from
  // `last_gradient` to `first_gradient` (where that is defined).
  void walk(cuda::SsdWalk forward, const at::Tensor& first, const at::Tensor& states, cuda::SsdWalk reverse,
            const at::Tensor& last_gradient, const at::Tensor& first_gradient,
            const at::Tensor& d_states) const {
    forward.gamma = reverse.gamma = decay.gamma;
    // In one launch where that saves segments. It does not where one way alone fills the device, nor much
    // where there are many segments either way.
    const int64_t blocks = streams() * (shape.value_dim / 64), of_both = walk_blocks() / (2 * blocks);
    const bool together = of_both == 1 || of_both == 2;
    const int64_t walks = together ? 2 : 1, segments = std::max<int64_t>(1, walk_blocks() / (walks * blocks));
    const Cut before = cut(forward, forward, first, at::Tensor(), segments, walks),
              after = cut(reverse, reverse, last_gradient, first_gradient, segments, walks);
    const auto launch = [&](const cuda::SsdWalk& a, const cuda::SsdWalk& b) {
      if (together) return cuda::ssd_walk(&a, &b, stream);
      cuda::ssd_walk(&a, nullptr, stream);
      cuda::ssd_walk(nullptr, &b, stream);
    };
    if (forward.segments > 1) {
      launch(before.local, after.local);
      join(before, first);
      join(after, last_gradient);
    }
    forward.states = states.mutable_data_ptr();
    reverse.states = d_states.mutable_data_ptr();
    launch(forward, reverse);
  }

  cuda::SsdWalk forward_walk() const {
    cuda::SsdWalk forward{};
    forward.left = token_rows(key);
    forward.right = token_rows(value);
    forward.weight = decay.weight;
    return forward;
  }

  at::Tensor states() const {
    return at::empty({streams(), shape.chunks, shape.key_dim, shape.value_dim}, value.options());
  }
};

bool has_served_dimensions(const SsdInputs& in) {
  const auto is_served = [](int64_t dim) { return dim == 64 || dim == 128; };
  const cpu::MixerShape& s = in.shape;
  return is_served(s.key_dim) && is_served(s.value_dim) && s.batch > 0 && s.time > 0 &&
         span_table(in.spans, s.batch, s.time, in.value.device())->is_unique;
}

at::Tensor empty_state(const SsdInputs& in, bool keeps_state) {
  const cpu::MixerShape& s = in.shape;
  if (!keeps_state) return {};
  return at::empty({s.batch, s.state_heads, s.key_dim, s.value_dim}, in.log_decay.options());
}

std::vector<at::Tensor> steps(const SsdInputs& in, bool keeps_state) {
  const cpu::MixerShape& s = in.shape;
  at::Tensor output = at::empty({in.query.size(0), s.output_heads, s.value_dim}, in.value.options());
  const at::Tensor state = empty_state(in, keeps_state);
  const at::Tensor initial = in.initial_state.defined() ? aligned(in.initial_state) : in.initial_state;
  const auto spans = span_table(in.spans, s.batch, s.time, in.value.device());
  cuda::ssd_steps({.shape = s,
                   .is_float = in.value.scalar_type() == at::kFloat,
                   .query = packed_rows(in.query),
                   .key = token_rows(in.key),
                   .value = token_rows(in.value),
                   .output = packed_rows(output),
                   .log_decay = in.log_decay.const_data_ptr<float>(),
                   .step = in.step.const_data_ptr<float>(),
                   .skip = static_cast<const float*>(pointer(in.skip)),
                   .row_of = spans->row_of.const_data_ptr<int32_t>(),
                   .initial_state = static_cast<const float*>(pointer(initial)),
                   .initial_rows = static_cast<const int64_t*>(pointer(in.initial_rows)),
                   .final_state = state.defined() ? state.mutable_data_ptr<float>() : nullptr},
                  cuda::stream(in.value));
  return {output, state};
}

}  // namespace

bool ssd_chunks_serve(const SsdInputs& in) {
  return in.value.scalar_type() == at::kBFloat16 && has_served_dimensions(in) && cuda::ssd_forward_fits() &&
         cuda::ssd_gradient_fits(in.shape);
}

bool ssd_steps_serve(const SsdInputs& in) {
  const at::ScalarType type = in.value.scalar_type();
  return (type == at::kBFloat16 || type == at::kFloat) && in.shape.time <= most_step_tokens &&
         has_served_dimensions(in);
}

std::vector<at::Tensor> ssd_forward_cuda(const SsdInputs& in, bool differentiate, bool keeps_state) {
  const c10::OptionalDeviceGuard guard(in.value.device());
  if (!differentiate && ssd_steps_serve(in)) {
    const cpu::MixerShape& s = in.shape;
    const bool chunks_win =
        few_tokens_want_chunks(s.time, s.batch * s.state_heads, cuda::multiprocessors(in.value));
    if (!chunks_win || !ssd_chunks_serve(in)) return steps(in, keeps_state);
  }
  Call call(in);
  const cpu::MixerShape& s = call.shape;
  at::Tensor output = at::empty({in.query.size(0), s.output_heads, s.value_dim}, in.value.options());
  const at::Tensor state = empty_state(in, keeps_state);
  cuda::SsdForward forward{};
  forward.query = packed_rows(call.query);
  forward.key = token_rows(call.key);
  forward.value = token_rows(call.value);
  forward.output = packed_rows(output);
  forward.skip = static_cast<const float*>(pointer(in.skip));
  forward.row_of = call.spans->row_of.const_data_ptr<int32_t>();
  forward.has_rows = call.table->has_rows.const_data_ptr<int32_t>();
  forward.decay = call.decay;
  // One block fits into a multiprocessor.
  const int64_t segments = std::max<int64_t>(1, cuda::multiprocessors(in.value) / (s.batch * s.output_heads));
  if (in.initial_rows.defined() && segments == 1) {
    forward.first_rows = in.initial_rows.const_data_ptr<int64_t>();
  } else if (in.initial_rows.defined()) {
    call.initial_state = call.initial_state.index_select(0, in.initial_rows);
  }
  const auto cut = call.cut(forward, call.forward_walk(), call.initial_state, state, segments, 1);
  if (forward.segments > 1) {
    cuda::ssd_walk(&cut.local, nullptr, call.stream);
    call.join(cut, call.initial_state);
  }
  cuda::ssd_forward(forward, call.stream);
  return {output, state};
}

SsdGradients ssd_backward_cuda(const SsdInputs& in, const at::Tensor& d_output_given,
                               const at::Tensor& d_state_given) {
  const c10::OptionalDeviceGuard guard(in.value.device());
  const Call call(in);
  const cpu::MixerShape& s = call.shape;
  const at::Tensor d_output = d_output_given.defined() ? aligned(d_output_given) : d_output_given;
  const at::Tensor d_state = d_state_given.defined() ? aligned(d_state_given) : d_state_given;
  // Without a gradient of the output there are no rows.
  const at::Tensor has_rows =
      d_output.defined() ? call.table->has_rows : at::zeros_like(call.table->has_rows);
  const auto* row_of = call.spans->row_of.const_data_ptr<int32_t>();

  const at::TensorOptions wide = in.log_decay.options();
  at::Tensor d_initial;
  if (in.initial_state.defined()) d_initial = at::empty(in.initial_state.sizes(), wide);
  const at::Tensor states = call.states(), d_states = call.states();
  cuda::SsdWalk reverse{};
  reverse.left = packed_rows(call.query);
  reverse.right = packed_rows(d_output);
  reverse.row_of = row_of;
  reverse.has_rows = has_rows.const_data_ptr<int32_t>();
  reverse.weight = call.decay.gamma;
  call.walk(call.forward_walk(), call.initial_state, states, reverse, d_state, d_initial, d_states);

  HeadGradient query(in.query, 1, s.output_heads), key(in.key, 2, s.output_heads),
      value(in.value, 2, s.output_heads);
  if (!d_output.defined()) query.partial.zero_();
  const std::vector<int64_t> by_head = {s.batch, s.time, s.state_heads, s.output_heads / s.state_heads};
  at::Tensor d_log_decay = at::empty(by_head, wide), d_step = at::empty(by_head, wide), d_skip;
  if (in.skip.defined()) d_skip = at::empty({s.batch * s.chunks, s.output_heads}, wide);
  cuda::ssd_gradient({.shape = s,
                      .query = packed_rows(call.query),
                      .key = token_rows(call.key),
                      .value = token_rows(call.value),
                      .d_output = packed_rows(d_output),
                      .skip = static_cast<const float*>(pointer(in.skip)),
                      .row_of = row_of,
                      .has_rows = has_rows.const_data_ptr<int32_t>(),
                      .decay = call.decay,
                      .states = states.const_data_ptr(),
                      .d_states = d_states.const_data_ptr(),
                      .d_query = packed_rows(query.partial, query.wide),
                      .d_key = token_rows(key.partial, key.wide),
                      .d_value = token_rows(value.partial, value.wide),
                      .d_log_decay = d_log_decay.mutable_data_ptr<float>(),
                      .d_step = d_step.mutable_data_ptr<float>(),
                      .d_skip = d_skip.defined() ? d_skip.mutable_data_ptr<float>() : nullptr},
                     call.stream);
  const auto sum_of_group = [](const at::Tensor& x) { return x.size(3) == 1 ? x.squeeze(3) : x.sum(3); };
  return {query.sum(),
          key.sum(),
          value.sum(),
          sum_of_group(d_log_decay),
          sum_of_group(d_step),
          d_skip.defined() ? d_skip.sum(0) : at::Tensor(),
          d_initial};
}

}  // namespace oryx::operators
