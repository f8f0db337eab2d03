#include "operators/gated_delta_rule/gated_delta_rule.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "base/error.h"
#include "operators/cpu/mixer_inputs.h"
#include "operators/device/runtime.h"
#include "operators/gated_delta_rule/gated_delta_rule_cpu.h"
#include "operators/gated_delta_rule/gated_delta_rule_cuda.h"

namespace oryx::operators {

namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

// Sequences shorter than this go token by token (measured: a chunk wins from about six tokens).
constexpr int64_t fewest_chunk_tokens = 6;

// The inputs with contiguous rows.
struct Inputs {
  at::Tensor query, key, value, log_decay, beta, spans, initial_state;
  double scale;
  cpu::MixerShape shape;

  Inputs(const at::Tensor& query_given, const at::Tensor& key_given, const at::Tensor& value_given,
         const at::Tensor& log_decay_given, const at::Tensor& beta_given, const at::Tensor& spans_given,
         const Optional& state_given, double scale_given, int64_t chunk)
      : spans(spans_given),
        scale(scale_given),
        shape(expect_mixer_tensors({"gated_delta_rule", "beta", query_given, key_given, value_given,
                                    log_decay_given, beta_given, spans_given, state_given, chunk})) {
    query = with_contiguous_rows(query_given);
    key = with_contiguous_rows(key_given);
    value = with_contiguous_rows(value_given);
    log_decay = log_decay_given.contiguous();
    beta = beta_given.contiguous();
    if (state_given.has_value() && state_given->defined()) initial_state = state_given->contiguous();
  }

  cpu::MixerInputs arguments(const QueryRows& rows) const {
    return mixer_inputs(shape, rows, query, key, value, log_decay, beta,
                        initial_state.defined() ? Optional(initial_state) : std::nullopt);
  }
};

// Output, final state and, where `keep` asks for it, the inverses that backward needs.
variable_list forward_kernel(const Inputs& in, bool keep) {
  const cpu::MixerShape& s = in.shape;
  const QueryRows rows(in.spans, s);
  at::Tensor output = at::empty({in.query.size(0), s.output_heads, s.value_dim}, in.value.options());
  at::Tensor state = at::empty({s.batch, s.state_heads, s.key_dim, s.value_dim}, in.log_decay.options());
  at::Tensor inverse;
  if (keep) {
    inverse =
        at::empty({s.batch, s.state_heads, s.chunks, s.chunk, (s.chunk + 15) / 16 * 16}, state.options());
  }
  const cpu::GatedDeltaForward arguments{in.arguments(rows), in.scale, packed_rows(output),
                                         state.mutable_data_ptr(), const_cast<void*>(pointer(inverse))};
  const int64_t work = s.key_dim * s.value_dim * s.time;
  if (s.time < fewest_chunk_tokens && !keep) {
    for_streams(s, work, cpu::gated_delta_steps_scratch(arguments),
                [&](int64_t begin, int64_t end, void* scratch) {
                  cpu::gated_delta_steps(arguments, begin, end, scratch);
                });
  } else {
    for_streams(s, work, cpu::gated_delta_forward_scratch(arguments),
                [&](int64_t begin, int64_t end, void* scratch) {
                  cpu::gated_delta_forward(arguments, begin, end, scratch);
                });
  }
  return {output, state, inverse};
}

// Gradients of query, key, value, log_decay, beta and initial_state.
std::array<at::Tensor, 6> backward_kernel(const Inputs& in, const at::Tensor& inverse,
                                          const at::Tensor& d_output, const at::Tensor& d_state) {
  const cpu::MixerShape& s = in.shape;
  const QueryRows rows(in.spans, s);
  const at::TensorOptions wide = in.log_decay.options();
  HeadGradient query(in.query, 1, s.output_heads), key(in.key, 2, s.state_heads);
  at::Tensor d_value = at::empty(in.value.sizes(), in.value.options());
  at::Tensor d_log_decay = at::empty(in.log_decay.sizes(), wide), d_beta = at::empty_like(d_log_decay);
  at::Tensor d_initial;
  if (in.initial_state.defined()) d_initial = at::empty(in.initial_state.sizes(), wide);
  if (!d_output.defined()) query.partial.zero_();
  const cpu::GatedDeltaBackward arguments{.inputs = in.arguments(rows),
                                          .scale = in.scale,
                                          .inverse = inverse.const_data_ptr(),
                                          .d_output = packed_rows(d_output),
                                          .d_final_state = pointer(d_state),
                                          .d_query = packed_rows(query.partial, query.wide),
                                          .d_key = token_rows(key.partial, key.wide),
                                          .d_value = token_rows(d_value),
                                          .d_log_decay = d_log_decay.mutable_data_ptr(),
                                          .d_beta = d_beta.mutable_data_ptr(),
                                          .d_initial_state = const_cast<void*>(pointer(d_initial))};
  for_streams(s, s.key_dim * s.value_dim * s.time, cpu::gated_delta_backward_scratch(arguments),
              [&](int64_t begin, int64_t end, void* scratch) {
                cpu::gated_delta_backward(arguments, begin, end, scratch);
              });
  return {query.sum(), key.sum(), d_value, d_log_decay, d_beta, d_initial};
}

class GatedDeltaRule : public torch::autograd::Function<GatedDeltaRule> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const at::Tensor& log_decay, const at::Tensor& beta,
                               const at::Tensor& spans, const Optional& initial_state, double scale,
                               int64_t chunk) {
    const variable_list out =
        forward_kernel({query, key, value, log_decay, beta, spans, initial_state, scale, chunk}, true);
    context->set_materialize_grads(false);
    context->save_for_backward(
        {query, key, value, log_decay, beta, spans, initial_state.value_or(at::Tensor()), out[2]});
    context->saved_data["scale"] = scale;
    context->saved_data["chunk"] = chunk;
    return {out[0], out[1]};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    expect(!at::GradMode::is_enabled(),
           "[gated_delta_rule] expected one differentiation, got a second (create_graph)");
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(9);
    const variable_list v = context->get_saved_variables();
    const Inputs in(v[0], v[1], v[2], v[3], v[4], v[5], v[6], context->saved_data["scale"].toDouble(),
                    context->saved_data["chunk"].toInt());
    const auto [query, key, value, log_decay, beta, initial] =
        backward_kernel(in, v[7], grads[0].defined() ? with_contiguous_rows(grads[0]) : grads[0],
                        grads[1].defined() ? grads[1].contiguous() : grads[1]);
    return {query, key, value, log_decay, beta, {}, initial, {}, {}};
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> gated_delta_rule(const at::Tensor& query, const at::Tensor& key,
                                                    const at::Tensor& value, const at::Tensor& log_decay,
                                                    const at::Tensor& beta, const at::Tensor& spans,
                                                    const Optional& initial_state, double scale,
                                                    int64_t chunk) {
  if (!value.device().is_cpu() || cuda::serves(value)) {
    return gated_delta_rule_cuda(
        {"gated_delta_rule", "beta", query, key, value, log_decay, beta, spans, initial_state, chunk}, scale);
  }
  const bool differentiate =
      at::GradMode::is_enabled() &&
      (query.requires_grad() || key.requires_grad() || value.requires_grad() || log_decay.requires_grad() ||
       beta.requires_grad() ||
       (initial_state.has_value() && initial_state->defined() && initial_state->requires_grad()));
  const variable_list out =
      differentiate
          ? GatedDeltaRule::apply(query, key, value, log_decay, beta, spans, initial_state, scale, chunk)
          : forward_kernel({query, key, value, log_decay, beta, spans, initial_state, scale, chunk}, false);
  return {out[0], out[1]};
}

std::tuple<at::Tensor, at::Tensor> gated_delta_rule_inference(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& log_decay,
    const at::Tensor& beta, const at::Tensor& spans, const Optional& initial_state,
    const Optional& initial_rows, double scale, bool keeps_state) {
  const at::NoGradGuard without_gradients;
  if (cuda::serves(value)) {
    return gated_delta_rule_cuda({"gated_delta_rule", "beta", query, key, value, log_decay, beta, spans,
                                  initial_state, 64, initial_rows.value_or(at::Tensor())},
                                 scale, keeps_state);
  }
  const Optional own = initial_rows ? initial_state->index_select(0, *initial_rows) : initial_state;
  return gated_delta_rule(query, key, value, log_decay, beta, spans, own, scale);
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  constexpr const char* arguments =
      "(Tensor query, Tensor key, Tensor value, Tensor log_decay, Tensor beta, Tensor spans, "
      "Tensor? initial_state, float scale, int chunk=64) -> (Tensor output, Tensor final_state)";
  m.def((std::string("gated_delta_rule") + arguments).c_str(), &gated_delta_rule);
  m.def((std::string("gated_delta_rule_chunked") + arguments).c_str(), &gated_delta_rule_chunked);
  m.def((std::string("gated_delta_rule_recurrence") + arguments).c_str(), &gated_delta_rule_recurrence);
}

}  // namespace oryx::operators
