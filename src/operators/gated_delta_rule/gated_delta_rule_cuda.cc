#include "operators/gated_delta_rule/gated_delta_rule_cuda.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <atomic>

#include "base/error.h"
#include "operators/device/runtime.h"
#include "operators/device/span_table.h"
#include "operators/gated_delta_rule/gated_delta_rule.h"
#include "operators/gated_delta_rule/gated_delta_rule_kernels.h"

namespace oryx::operators {

namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

// Whether a call without gradients goes token by token.
bool takes_steps(const at::Tensor& value, const cpu::MixerShape& s) {
  if (s.time > most_step_tokens) return false;
  const bool chunks_serve = value.scalar_type() == at::kBFloat16 && cuda::gated_delta_fits();
  return !chunks_serve ||
         !few_tokens_want_chunks(s.time, s.batch * s.state_heads, cuda::multiprocessors(value));
}

std::atomic<int> forced_segments = 0;

// GatedDeltaArguments::rows, once per spans.
struct ChunkRows {
  at::Tensor rows;
  bool is_unique = true;  // no token has two rows
};

std::shared_ptr<const ChunkRows> chunk_rows(const at::Tensor& spans, const cpu::MixerShape& shape,
                                            at::Device device) {
  static SpanCache<ChunkRows> cache;
  return cache.get(spans, shape.batch, shape.time, device, [&] {
    constexpr int64_t chunk = cuda::gated_delta_chunk, pitch = cuda::gated_delta_row_table;
    const int64_t chunks = (shape.time + chunk - 1) / chunk;
    ChunkRows table;
    std::vector<int32_t> rows(static_cast<size_t>(shape.batch * chunks * pitch), -1);
    for (int64_t i = 0; i < shape.batch * chunks; ++i) rows[static_cast<size_t>(i * pitch + chunk)] = 0;
    int32_t next = 0;
    const auto span = spans.accessor<int64_t, 2>();
    for (int64_t i = 0; i < span.size(0); ++i) {
      for (int64_t t = span[i][1]; t < span[i][2]; ++t, ++next) {
        int32_t* of_chunk = rows.data() + (span[i][0] * chunks + t / chunk) * pitch;
        if (of_chunk[t % chunk] >= 0) table.is_unique = false;
        of_chunk[t % chunk] = next;
        ++of_chunk[chunk];
      }
    }
    table.rows = to_device(rows, device);
    return table;
  });
}

// The tensor itself where kernels can copy its rows in units of 16 bytes, else a copy.
at::Tensor with_aligned_rows(const at::Tensor& tensor) {
  const int64_t unit = 16 / static_cast<int64_t>(tensor.element_size());
  bool aligned = tensor.stride(-1) == 1 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) aligned = aligned && tensor.stride(i) % unit == 0;
  if (aligned) return tensor;
  return tensor.is_contiguous() ? tensor.clone() : tensor.contiguous();
}

cuda::GatedDeltaRows token_rows_of(const at::Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}
cuda::GatedDeltaRows packed_rows_of(const at::Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), 0, x.stride(0), x.stride(1)};
}
template <typename T>
T* data(const at::Tensor& x) {
  return x.defined() ? static_cast<T*>(const_cast<void*>(x.const_data_ptr())) : nullptr;
}

// The inputs as the kernels read them, and scratch that lives as long.
struct Call {
  cpu::MixerShape shape;
  at::Tensor query, key, value, log_decay, beta, initial_state, initial_rows, rows;
  at::Tensor inverse, gates;
  at::Tensor segment_states, segment_transfers, d_segment_states;  // where there are segments
  cuda::GatedDeltaArguments arguments{};
  void* stream;
  int64_t blocks;

  Call(const MixerTensors& t, const cpu::MixerShape& shape_given, double scale)
      : shape(shape_given),
        query(with_aligned_rows(t.query)),
        key(with_aligned_rows(t.key)),
        value(with_aligned_rows(t.value)),
        log_decay(t.log_decay.contiguous()),
        beta(t.step.contiguous()),
        rows(chunk_rows(t.spans, shape, value.device())->rows),
        stream(cuda::stream(value)) {
    if (t.initial_state.has_value() && t.initial_state->defined())
      initial_state = with_aligned_rows(t.initial_state->contiguous());
    if (t.initial_rows.defined()) initial_rows = t.initial_rows.contiguous();
    cuda::GatedDeltaArguments& a = arguments;
    a.time = shape.time;
    a.batch = static_cast<int32_t>(shape.batch);
    a.chunks = static_cast<int32_t>((shape.time + cuda::gated_delta_chunk - 1) / cuda::gated_delta_chunk);
    a.query_heads = static_cast<int32_t>(shape.query_heads);
    a.key_heads = static_cast<int32_t>(shape.key_heads);
    a.state_heads = static_cast<int32_t>(shape.state_heads);
    a.output_heads = static_cast<int32_t>(shape.output_heads);
    a.key_dim = static_cast<int32_t>(shape.key_dim);
    a.value_dim = static_cast<int32_t>(shape.value_dim);
    a.multiprocessors = cuda::multiprocessors(value);
    a.scale = static_cast<float>(scale);
    a.query = packed_rows_of(query);
    a.key = token_rows_of(key);
    a.value = token_rows_of(value);
    a.log_decay = data<const float>(log_decay);
    a.beta = data<const float>(beta);
    a.initial_state = data<const float>(initial_state);
    a.initial_rows = data<const int64_t>(initial_rows);
    a.rows = data<const int32_t>(rows);
    a.segments = 1, a.segment_chunks = a.chunks;
    blocks = shape.batch * shape.state_heads * a.chunks;
  }

  at::Tensor per_block(int64_t rows_of_block, int64_t columns, at::ScalarType type = at::kBFloat16) const {
    return at::empty({blocks, rows_of_block, columns}, value.options().dtype(type));
  }

  // States of all the segments, or other squares that belong to them.
  at::Tensor per_segment(int64_t columns) const {
    return at::empty({shape.batch * shape.state_heads, arguments.segments, shape.key_dim, columns},
                     log_decay.options());
  }
  // Takes the sequences in segments. Backward takes up those of forward.
  void split(const at::Tensor& states, const at::Tensor& transfers) {
    segment_states = states, segment_transfers = transfers;
    arguments.segment_states = data<float>(states);
    arguments.segment_transfers = data<float>(transfers);
  }
  void split(int segments, bool differentiate) {
    cuda::GatedDeltaArguments& a = arguments;
    segments = std::min(segments, a.chunks);
    if (segments < 2) return;
    if (initial_rows.defined()) {
      initial_state = initial_state.index_select(0, initial_rows);
      a.initial_state = data<const float>(initial_state);
      a.initial_rows = nullptr;
    }
    a.segment_chunks = (a.chunks + segments - 1) / segments;
    a.segments = (a.chunks + a.segment_chunks - 1) / a.segment_chunks;
    a.wants_last_transfer = differentiate;
    split(per_segment(shape.value_dim), per_segment(shape.key_dim));
    cuda::gated_delta_split(a, stream);
  }
  void take_up_split(const at::Tensor& states, const at::Tensor& transfers) {
    if (!states.defined()) return;
    cuda::GatedDeltaArguments& a = arguments;
    a.segments = static_cast<int32_t>(states.size(1));
    a.segment_chunks = (a.chunks + a.segments - 1) / a.segments;
    split(states, transfers);
    d_segment_states = per_segment(shape.value_dim);
    a.d_segment_states = data<float>(d_segment_states);
  }

  void prepare() {
    constexpr int64_t chunk = cuda::gated_delta_chunk;
    take_up_prepared(per_block(chunk, chunk), per_block(cuda::gated_delta_gate_rows, chunk, at::kFloat));
    cuda::gated_delta_prepare(arguments, stream);
  }
  // Backward takes up what forward prepared.
  void take_up_prepared(const at::Tensor& inverse_given, const at::Tensor& gates_given) {
    inverse = inverse_given, gates = gates_given;
    arguments.inverse = data<void>(inverse);
    arguments.gates = data<float>(gates);
  }
};

// Output, final state and, where `differentiate`, what backward needs of the chunks and segments.
variable_list forward_kernels(const MixerTensors& t, const cpu::MixerShape& shape, double scale,
                              bool differentiate, bool keeps_state) {
  Call call(t, shape, scale);
  at::Tensor output = at::empty({t.query.size(0), shape.output_heads, shape.value_dim}, call.value.options());
  at::Tensor state;
  if (keeps_state) {
    state =
        at::empty({shape.batch, shape.state_heads, shape.key_dim, shape.value_dim}, call.log_decay.options());
  }
  call.arguments.output = packed_rows_of(output);
  call.arguments.final_state = data<float>(state);
  if (!differentiate && takes_steps(call.value, shape)) {
    cuda::gated_delta_steps(call.arguments, call.value.scalar_type() == at::kFloat, call.stream);
  } else {
    call.prepare();
    const int forced = forced_segments;
    call.split(forced > 0 ? forced : cuda::gated_delta_segments(call.arguments, differentiate),
               differentiate);
    cuda::gated_delta_outputs(call.arguments, call.stream);
  }
  return {output, state, call.inverse, call.gates, call.segment_states, call.segment_transfers};
}

class GatedDeltaRuleCuda : public torch::autograd::Function<GatedDeltaRuleCuda> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const at::Tensor& log_decay, const at::Tensor& beta,
                               const at::Tensor& spans, const Optional& initial_state, double scale) {
    const MixerTensors t{"gated_delta_rule", "beta", query, key,           value,
                         log_decay,          beta,   spans, initial_state, cuda::gated_delta_chunk};
    const variable_list out = forward_kernels(t, expect_mixer_tensors(t), scale, true, true);
    context->set_materialize_grads(false);
    context->save_for_backward({query, key, value, log_decay, beta, spans,
                                initial_state.value_or(at::Tensor()), out[2], out[3], out[4], out[5]});
    context->saved_data["scale"] = scale;
    return {out[0], out[1]};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    expect(!at::GradMode::is_enabled(),
           "[gated_delta_rule] expected one differentiation, got a second (create_graph)");
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(8);
    const variable_list v = context->get_saved_variables();
    const c10::OptionalDeviceGuard guard(v[2].device());
    const Optional initial_state = v[6].defined() ? Optional(v[6]) : std::nullopt;
    const MixerTensors t{"gated_delta_rule",     "beta", v[0], v[1], v[2], v[3], v[4], v[5], initial_state,
                         cuda::gated_delta_chunk};
    const cpu::MixerShape shape = expect_mixer_tensors(t);
    Call call(t, shape, context->saved_data["scale"].toDouble());
    call.take_up_prepared(v[7], v[8]);
    call.take_up_split(v[9], v[10]);

    HeadGradient query(v[0], 1, shape.output_heads), key(v[1], 2, shape.state_heads);
    const at::TensorOptions wide = call.log_decay.options();
    at::Tensor d_value = at::empty(v[2].sizes(), v[2].options());
    at::Tensor d_log_decay = at::empty(v[3].sizes(), wide), d_beta = at::empty(v[4].sizes(), wide);
    at::Tensor d_initial;
    if (call.initial_state.defined()) d_initial = at::empty(call.initial_state.sizes(), wide);
    at::Tensor d_output, d_final;
    if (grads[0].defined()) d_output = with_aligned_rows(grads[0]);
    if (grads[1].defined()) d_final = with_aligned_rows(grads[1].contiguous());
    const at::Tensor states = call.per_block(shape.value_dim, shape.key_dim),
                     d_states = at::empty_like(states);
    const at::Tensor surprises = call.per_block(shape.value_dim, cuda::gated_delta_chunk),
                     d_surprises = at::empty_like(surprises);
    if (!d_output.defined()) query.partial.zero_();
    cuda::GatedDeltaArguments& a = call.arguments;
    if (d_output.defined()) a.d_output = packed_rows_of(d_output);
    a.d_final_state = data<const float>(d_final);
    a.states = data<void>(states);
    a.surprises = data<void>(surprises);
    a.d_states = data<void>(d_states);
    a.d_surprises = data<void>(d_surprises);
    a.d_query = packed_rows_of(query.partial);
    a.d_key = token_rows_of(key.partial);
    a.wide_d_query = query.wide;
    a.wide_d_key = key.wide;
    a.d_value = token_rows_of(d_value);
    a.d_log_decay = data<float>(d_log_decay);
    a.d_beta = data<float>(d_beta);
    a.d_initial_state = data<float>(d_initial);
    cuda::gated_delta_backward_passes(a, call.stream);
    cuda::gated_delta_input_gradients(a, call.stream);
    return {query.sum(), key.sum(), d_value, d_log_decay, d_beta, {}, d_initial, {}};
  }
};

bool kernels_serve(const MixerTensors& t, const cpu::MixerShape& shape, bool differentiate) {
  const at::ScalarType type = t.value.scalar_type();
  const auto is_served = [](int64_t dim) { return dim == 64 || dim == 128; };
  const bool steps = !differentiate && takes_steps(t.value, shape);
  return cuda::serves(t.value) && is_served(shape.key_dim) && is_served(shape.value_dim) &&
         (steps ? type == at::kBFloat16 || type == at::kFloat
                : type == at::kBFloat16 && cuda::gated_delta_fits()) &&
         chunk_rows(t.spans, shape, t.value.device())->is_unique;
}

}  // namespace

void force_gated_delta_segments(int segments) { forced_segments = segments; }

std::tuple<at::Tensor, at::Tensor> gated_delta_rule_cuda(const MixerTensors& t, double scale,
                                                         bool keeps_state) {
  const cpu::MixerShape shape = expect_mixer_tensors(t);
  const c10::OptionalDeviceGuard guard(t.value.device());
  const bool differentiate =
      at::GradMode::is_enabled() &&
      (t.query.requires_grad() || t.key.requires_grad() || t.value.requires_grad() ||
       t.log_decay.requires_grad() || t.step.requires_grad() ||
       (t.initial_state.has_value() && t.initial_state->defined() && t.initial_state->requires_grad()));
  if (!kernels_serve(t, shape, differentiate)) {
    const Optional own =
        t.initial_rows.defined() ? t.initial_state->index_select(0, t.initial_rows) : t.initial_state;
    return gated_delta_rule_chunked(t.query, t.key, t.value, t.log_decay, t.step, t.spans, own, scale,
                                    t.chunk);
  }
  const variable_list out = differentiate ? GatedDeltaRuleCuda::apply(t.query, t.key, t.value, t.log_decay,
                                                                      t.step, t.spans, t.initial_state, scale)
                                          : forward_kernels(t, shape, scale, false, keeps_state);
  return {out[0], out[1]};
}

}  // namespace oryx::operators
