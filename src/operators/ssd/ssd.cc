#include "operators/ssd/ssd.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "base/error.h"
#include "base/shapes.h"
#include "operators/cpu/mixer_inputs.h"
#include "operators/device/runtime.h"
#include "operators/ssd/ssd_cpu.h"
#include "operators/ssd/ssd_cuda.h"

namespace oryx::operators {

namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

// Sequences shorter than this go token by token (measured: a chunk wins from about six tokens).
constexpr int64_t fewest_chunk_tokens = 6;

cpu::MixerInputs arguments_of(const SsdInputs& in, const QueryRows& rows) {
  return mixer_inputs(in.shape, rows, in.query, in.key, in.value, in.log_decay, in.step,
                      in.initial_state.defined() ? Optional(in.initial_state) : std::nullopt);
}

variable_list forward_kernel(const SsdInputs& in, bool differentiate) {
  if (cuda::serves(in.value)) return ssd_forward_cuda(in, differentiate, /*keeps_state=*/true);
  const cpu::MixerShape& s = in.shape;
  const QueryRows rows(in.spans, s);
  at::Tensor output = at::empty({in.query.size(0), s.output_heads, s.value_dim}, in.value.options());
  at::Tensor state = at::empty({s.batch, s.state_heads, s.key_dim, s.value_dim}, in.log_decay.options());
  const cpu::SsdForward arguments{arguments_of(in, rows), pointer(in.skip), packed_rows(output),
                                  state.mutable_data_ptr()};
  const int64_t work = s.key_dim * s.value_dim * s.time;
  if (s.time < fewest_chunk_tokens) {
    for_streams(s, work, cpu::ssd_steps_scratch(arguments), [&](int64_t begin, int64_t end, void* scratch) {
      cpu::ssd_steps(arguments, begin, end, scratch);
    });
  } else {
    for_streams(s, work, cpu::ssd_forward_scratch(arguments), [&](int64_t begin, int64_t end, void* scratch) {
      cpu::ssd_forward(arguments, begin, end, scratch);
    });
  }
  return {output, state};
}

SsdGradients backward_kernel(const SsdInputs& in, const at::Tensor& d_output, const at::Tensor& d_state) {
  if (cuda::serves(in.value)) return ssd_backward_cuda(in, d_output, d_state);
  const cpu::MixerShape& s = in.shape;
  const QueryRows rows(in.spans, s);
  const at::TensorOptions wide = in.log_decay.options();
  HeadGradient query(in.query, 1, s.output_heads), key(in.key, 2, s.state_heads);
  at::Tensor d_value = at::empty(in.value.sizes(), in.value.options());
  at::Tensor d_log_decay = at::empty(in.log_decay.sizes(), wide), d_step = at::empty_like(d_log_decay);
  at::Tensor d_skip, d_initial;
  if (in.skip.defined()) d_skip = at::empty({s.batch, s.output_heads}, wide);
  if (in.initial_state.defined()) d_initial = at::empty(in.initial_state.sizes(), wide);
  if (!d_output.defined()) query.partial.zero_();
  const cpu::SsdBackward arguments{.inputs = arguments_of(in, rows),
                                   .skip = pointer(in.skip),
                                   .d_output = packed_rows(d_output),
                                   .d_final_state = pointer(d_state),
                                   .d_query = packed_rows(query.partial, query.wide),
                                   .d_key = token_rows(key.partial, key.wide),
                                   .d_value = token_rows(d_value),
                                   .d_log_decay = d_log_decay.mutable_data_ptr(),
                                   .d_step = d_step.mutable_data_ptr(),
                                   .d_skip = const_cast<void*>(pointer(d_skip)),
                                   .d_initial_state = const_cast<void*>(pointer(d_initial))};
  for_streams(
      s, s.key_dim * s.value_dim * s.time, cpu::ssd_backward_scratch(arguments),
      [&](int64_t begin, int64_t end, void* scratch) { cpu::ssd_backward(arguments, begin, end, scratch); });
  return {query.sum(), key.sum(), d_value,
          d_log_decay, d_step,    d_skip.defined() ? d_skip.sum(0) : at::Tensor(),
          d_initial};
}

class Ssd : public torch::autograd::Function<Ssd> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const at::Tensor& log_decay, const at::Tensor& step,
                               const Optional& skip, const at::Tensor& spans, const Optional& initial_state,
                               int64_t chunk) {
    context->set_materialize_grads(false);
    context->save_for_backward({query, key, value, log_decay, step, skip.value_or(at::Tensor()), spans,
                                initial_state.value_or(at::Tensor())});
    context->saved_data["chunk"] = chunk;
    return forward_kernel({query, key, value, log_decay, step, skip, spans, initial_state, chunk}, true);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    expect(!at::GradMode::is_enabled(), "[ssd] expected one differentiation, got a second (create_graph)");
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(9);
    const variable_list v = context->get_saved_variables();
    const SsdInputs in(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], context->saved_data["chunk"].toInt());
    auto [query, key, value, log_decay, step, skip, initial] =
        backward_kernel(in, grads[0].defined() ? with_contiguous_rows(grads[0]) : grads[0],
                        grads[1].defined() ? grads[1].contiguous() : grads[1]);
    if (skip.defined()) skip = skip.to(v[5].scalar_type());
    return {query, key, value, log_decay, step, skip, {}, initial, {}};
  }
};

}  // namespace

SsdInputs::SsdInputs(const at::Tensor& query_given, const at::Tensor& key_given,
                     const at::Tensor& value_given, const at::Tensor& log_decay_given,
                     const at::Tensor& step_given, const Optional& skip_given, const at::Tensor& spans_given,
                     const Optional& state_given, int64_t chunk, const Optional& rows_given)
    : spans(spans_given),
      shape(expect_mixer_tensors({"ssd", "step", query_given, key_given, value_given, log_decay_given,
                                  step_given, spans_given, state_given, chunk,
                                  rows_given.value_or(at::Tensor())})) {
  for (const Optional& tensor : {Optional(query_given), Optional(key_given), Optional(log_decay_given),
                                 Optional(step_given), skip_given, state_given}) {
    if (!tensor.has_value() || !tensor->defined()) continue;
    expect(tensor->device() == value_given.device(), "[ssd] expected all tensors on {}, got one on {}",
           value_given.device().str(), tensor->device().str());
  }
  query = with_contiguous_rows(query_given);
  key = with_contiguous_rows(key_given);
  value = with_contiguous_rows(value_given);
  log_decay = log_decay_given.contiguous();
  step = step_given.contiguous();
  if (skip_given.has_value() && skip_given->defined()) {
    expect_shape("ssd", "skip", *skip_given, {shape.output_heads});
    skip = skip_given->to(accumulate_type(value.scalar_type())).contiguous();
  }
  if (state_given.has_value() && state_given->defined()) initial_state = state_given->contiguous();
  if (rows_given.has_value()) initial_rows = rows_given->contiguous();
}

std::tuple<at::Tensor, at::Tensor> ssd(const at::Tensor& query, const at::Tensor& key,
                                       const at::Tensor& value, const at::Tensor& log_decay,
                                       const at::Tensor& step, const Optional& skip, const at::Tensor& spans,
                                       const Optional& initial_state, int64_t chunk) {
  const auto wants = [](const Optional& x) { return x.has_value() && x->defined() && x->requires_grad(); };
  const bool differentiate =
      at::GradMode::is_enabled() &&
      (query.requires_grad() || key.requires_grad() || value.requires_grad() || log_decay.requires_grad() ||
       step.requires_grad() || wants(skip) || wants(initial_state));
  const bool on_kernels = cuda::serves(value);
  if (differentiate) {
    if (on_kernels ? ssd_chunks_serve({query, key, value, log_decay, step, skip, spans, initial_state, chunk})
                   : value.is_cpu()) {
      const variable_list out =
          Ssd::apply(query, key, value, log_decay, step, skip, spans, initial_state, chunk);
      return {out[0], out[1]};
    }
  } else if (on_kernels || value.is_cpu()) {
    const SsdInputs in(query, key, value, log_decay, step, skip, spans, initial_state, chunk);
    if (!on_kernels || ssd_chunks_serve(in) || ssd_steps_serve(in)) {
      const variable_list out = forward_kernel(in, false);
      return {out[0], out[1]};
    }
  }
  return ssd_chunked(query, key, value, log_decay, step, skip, spans, initial_state, chunk);
}

std::tuple<at::Tensor, at::Tensor> ssd_inference(const at::Tensor& query, const at::Tensor& key,
                                                 const at::Tensor& value, const at::Tensor& log_decay,
                                                 const at::Tensor& step, const Optional& skip,
                                                 const at::Tensor& spans, const Optional& initial_state,
                                                 const Optional& initial_rows, bool keeps_state) {
  const at::NoGradGuard without_gradients;
  if (cuda::serves(value)) {
    const SsdInputs in(query, key, value, log_decay, step, skip, spans, initial_state, 64, initial_rows);
    if (ssd_chunks_serve(in) || ssd_steps_serve(in)) {
      const variable_list out = ssd_forward_cuda(in, /*differentiate=*/false, keeps_state);
      return {out[0], out[1]};
    }
  }
  const Optional own = initial_rows ? initial_state->index_select(0, *initial_rows) : initial_state;
  return ssd(query, key, value, log_decay, step, skip, spans, own);
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  constexpr const char* arguments =
      "(Tensor query, Tensor key, Tensor value, Tensor log_decay, Tensor step, Tensor? skip, Tensor spans, "
      "Tensor? initial_state, int chunk=64) -> (Tensor output, Tensor final_state)";
  m.def((std::string("ssd") + arguments).c_str(), &ssd);
  m.def((std::string("ssd_recurrence") + arguments).c_str(), &ssd_recurrence);
}

}  // namespace oryx::operators
