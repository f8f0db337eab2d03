#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

#include "base/shapes.h"
#include "operators/cpu/mixer_inputs.h"
#include "operators/device/span_table.h"
#include "operators/ssd/ssd.h"

namespace oryx::operators {

namespace {

// Where the packed rows lie in `layers` copies of [batch, padded time]: more than one where spans overlap, so
// that no two rows share a place.
struct Places {
  at::Tensor place;  // int64 [N] on the device
  int64_t layers = 1;
};

Places make_places(const at::Tensor& spans, int64_t tokens, int64_t padded_time, at::Device device) {
  std::vector<int32_t> used(static_cast<size_t>(tokens)), place;
  Places result;
  const auto rows = spans.accessor<int64_t, 2>();
  for (int64_t i = 0; i < rows.size(0); ++i) {
    for (int64_t t = rows[i][1]; t < rows[i][2]; ++t) {
      const int64_t token = rows[i][0] * padded_time + t;
      const int32_t layer = used[static_cast<size_t>(token)]++;
      result.layers = std::max<int64_t>(result.layers, layer + 1);
      place.push_back(static_cast<int32_t>(layer * tokens + token));
    }
  }
  result.place = to_device(place, device).to(at::kLong);
  return result;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> ssd_chunked(const at::Tensor& query, const at::Tensor& key,
                                               const at::Tensor& value, const at::Tensor& log_decay,
                                               const at::Tensor& step, const std::optional<at::Tensor>& skip,
                                               const at::Tensor& spans,
                                               const std::optional<at::Tensor>& initial_state,
                                               int64_t chunk) {
  const cpu::MixerShape s =
      expect_mixer_tensors({"ssd", "step", query, key, value, log_decay, step, spans, initial_state, chunk});
  const bool has_skip = skip.has_value() && skip->defined();
  if (has_skip) expect_shape("ssd", "skip", *skip, {s.output_heads});
  const at::ScalarType type = accumulate_type(value.scalar_type());
  const int64_t batch = s.batch, n = s.chunks, c = s.chunk, heads = s.state_heads, padded = n * c;
  const int64_t group = s.output_heads / heads;
  at::Tensor state = initial_state.has_value() && initial_state->defined()
                         ? *initial_state
                         : at::zeros({batch, heads, s.key_dim, s.value_dim}, log_decay.options());
  if (batch == 0 || n == 0)
    return {at::zeros({query.size(0), s.output_heads, s.value_dim}, value.options()), state};

  // [batch, n, heads, c, ..], zeros after the last token: those neither decay nor write.
  const auto in_chunks = [&](const at::Tensor& x) {
    std::vector<int64_t> pad(2 * static_cast<size_t>(x.dim() - 1)), sizes = x.sizes().vec();
    pad[pad.size() - 1] = padded - s.time;
    sizes[1] = c;
    sizes.insert(sizes.begin() + 1, n);
    return at::constant_pad_nd(x, pad).view(sizes).transpose(2, 3);
  };
  const at::Tensor k = in_chunks(key.to(type).repeat_interleave(heads / s.key_heads, 2));
  const at::Tensor v = in_chunks(value.to(type)), delta = in_chunks(step);
  const at::Tensor cumulative = in_chunks(log_decay).to(at::kDouble).cumsum(-1);
  const at::Tensor total = cumulative.narrow(-1, c - 1, 1);
  const at::Tensor weight = (total - cumulative).exp().to(type) * delta;
  const at::Tensor added = (k * weight.unsqueeze(-1)).transpose(-1, -2).matmul(v);
  const at::Tensor decay = total.exp().to(type).unsqueeze(-1);
  std::vector<at::Tensor> before;
  for (int64_t i = 0; i < n; ++i) {
    before.push_back(state);
    state = decay.select(1, i) * state + added.select(1, i);
  }
  if (query.size(0) == 0) return {at::zeros({0, s.output_heads, s.value_dim}, value.options()), state};

  static SpanCache<Places> cache;
  const auto places = cache.get(spans, batch, padded, value.device(),
                                [&] { return make_places(spans, batch * padded, padded, value.device()); });
  // [layers, batch, n, heads, group, c, key_dim]
  const at::Tensor q = at::zeros({places->layers * batch * padded, s.query_heads, s.key_dim}, k.options())
                           .index_copy(0, places->place, query.to(type))
                           .repeat_interleave(s.output_heads / s.query_heads, 1)
                           .view({places->layers, batch, n, c, heads, group, s.key_dim})
                           .permute({0, 1, 2, 4, 5, 3, 6});
  const auto for_group = [](const at::Tensor& x) { return x.unsqueeze(3); };
  const at::Tensor later = at::ones({c, c}, k.options().dtype(at::kBool)).triu(1);
  const at::Tensor between = (cumulative.unsqueeze(-1) - cumulative.unsqueeze(-2))
                                 .masked_fill(later, -std::numeric_limits<double>::infinity())
                                 .exp()
                                 .to(type);
  const at::Tensor scores =
      q.matmul(for_group(k).transpose(-1, -2)) * for_group(between * delta.unsqueeze(-2));
  at::Tensor output =
      q.matmul(for_group(at::stack(before, 1))) * for_group(cumulative.exp().to(type)).unsqueeze(-1) +
      scores.matmul(for_group(v));
  if (has_skip) output = output + skip->to(type).view({heads, group, 1, 1}) * for_group(v);
  return {output.permute({0, 1, 2, 5, 3, 4, 6})
              .reshape({places->layers * batch * padded, s.output_heads, s.value_dim})
              .index_select(0, places->place)
              .to(value.scalar_type()),
          state};
}

}  // namespace oryx::operators
