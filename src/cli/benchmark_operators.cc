#include "cli/benchmark_operators.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "cli/measure.h"
#include "cli/replay.h"
#include "operators/activations.h"
#include "operators/adamw/adamw.h"
#include "operators/attention/attention.h"
#include "operators/cross_entropy/cross_entropy.h"
#include "operators/decays/decays.h"
#include "operators/gated_delta_rule/gated_delta_rule.h"
#include "operators/gated_norm/gated_norm.h"
#include "operators/l2_norm/l2_norm.h"
#include "operators/rotary/rotary.h"
#include "operators/short_conv/short_conv.h"
#include "operators/ssd/ssd.h"

namespace oryx::cli {

namespace {

using Tensors = std::vector<at::Tensor>;

struct Cost {
  double forward_flops, forward_bytes, backward_flops, backward_bytes;
};

class Measurement {
 public:
  Measurement(at::Device device, std::string filter, int64_t repeats)
      : device_(device), filter_(std::move(filter)), repeats_(repeats) {}

  bool wants(const std::string& name) const { return name.find(filter_) != std::string::npos; }
  bool has_filter() const { return !filter_.empty(); }

  void add(const std::string& name, double flops, double bytes, const std::function<void()>& call) {
    results.push_back({name, median(time_calls(device_, 2, repeats_, call)), flops, bytes});
  }

  // Times forward (with what it keeps for backward) and backward of function(inputs).
  void differentiate(const std::string& name, const Cost& cost, Tensors inputs,
                     const std::function<Tensors(const Tensors&)>& function) {
    if (!wants(name)) return;
    Tensors leaves;
    for (at::Tensor& x : inputs) {
      if (at::isFloatingType(x.scalar_type())) leaves.push_back(x.set_requires_grad(true));
    }
    const auto add_replays = [&](const std::string& pass, double flops, double bytes, const auto& call) {
      results.push_back({name + pass, median(time_replays(device_, 3, repeats_, call)), flops, bytes});
    };
    on_side_stream(device_, [&] {
      add_replays(" forward", cost.forward_flops, cost.forward_bytes, [&] { function(inputs); });
      Tensors outputs, gradients;
      for (const at::Tensor& y : function(inputs)) {
        if (!y.requires_grad()) continue;
        outputs.push_back(y);
        gradients.push_back(y.dim() == 0 ? at::ones_like(y) : at::randn_like(y));
      }
      add_replays(" backward", cost.backward_flops, cost.backward_bytes, [&] {
        torch::autograd::grad(outputs, leaves, gradients, /*retain_graph=*/true, false,
                              /*allow_unused=*/true);
      });
    });
  }

  std::vector<OperatorTime> results;

 private:
  at::Device device_;
  std::string filter_;
  int64_t repeats_;
};

// All tokens, or this share of the chunks of 128, spread evenly: every(4) for a quarter.
at::Tensor spans_of(const OperatorSizes& sizes, double share) {
  constexpr int64_t chunk = 128;
  std::vector<int64_t> rows;
  for (int64_t b = 0; b < sizes.batch; ++b) {
    if (share == 1) {
      rows.insert(rows.end(), {b, 0, sizes.length});
      continue;
    }
    double taken = 0;
    for (int64_t begin = 0; begin < sizes.length; begin += chunk) {
      taken += share;
      if (taken < 1 - 1e-9) continue;
      taken -= 1;
      rows.insert(rows.end(), {b, begin, std::min(begin + chunk, sizes.length)});
    }
  }
  return at::tensor(rows, at::kLong).view({-1, 3});
}

}  // namespace

Ceilings measure_ceilings(c10::Device device, c10::ScalarType dtype) {
  const int64_t size = device.is_cpu() ? 1024 : 8192;
  const auto options = at::TensorOptions(dtype).device(device);
  const at::Tensor a = at::randn({size, size}, options), b = at::randn({size, size}, options);
  at::Tensor c = at::empty({size, size}, options);
  const double product = median(time_calls(device, 3, 10, [&] { at::mm_out(c, a, b); }));
  const int64_t bytes = device.is_cpu() ? int64_t{256} << 20 : int64_t{2} << 30;
  const at::Tensor from = at::ones({bytes}, options.dtype(at::kByte));
  at::Tensor to = at::empty_like(from);
  const double copy = median(time_calls(device, 2, 10, [&] { to.copy_(from); }));
  return {2.0 * std::pow(static_cast<double>(size), 3) / product, 2.0 * static_cast<double>(bytes) / copy};
}

double OperatorTime::floor(const Ceilings& ceilings) const {
  return std::max(flops / ceilings.flops_per_second, bytes / ceilings.bytes_per_second);
}

std::vector<OperatorTime> measure_operators(const OperatorSizes& sizes, c10::Device device,
                                            c10::ScalarType dtype, const std::string& filter,
                                            int64_t repeats) {
  Measurement measure(device, filter, repeats);
  at::manual_seed(1);
  const int64_t tokens = sizes.batch * sizes.length, width = sizes.heads * sizes.head_dim;
  const double elements = static_cast<double>(tokens * width),
               e = static_cast<double>(c10::elementSize(dtype));
  const double dim = static_cast<double>(sizes.head_dim), states = static_cast<double>(tokens * sizes.heads);
  const auto options = at::TensorOptions(dtype).device(device);
  const auto wide = options.dtype(operators::accumulate_type(dtype));
  const auto normal = [&](at::IntArrayRef shape) { return at::randn(shape, options); };
  const auto heads = [&] { return normal({sizes.batch, sizes.length, sizes.heads, sizes.head_dim}); };
  const auto unit = [&](const at::Tensor& x) {
    return (x / x.norm(2, -1, /*keepdim=*/true).clamp_min(1e-6)).to(dtype);
  };
  const at::Tensor every = spans_of(sizes, 1);
  const auto per_head = [&] { return at::rand({sizes.batch, sizes.length, sizes.heads}, wide); };

  // Products of the chunked forms in chunks of 64 (docs/mathematics): 3/2 of the state's size forward …
  const auto mixer = [&](double forward_products, double backward_products) {
    return Cost{forward_products * states * dim * dim, (4 * e * dim + 8) * states,
                backward_products * states * dim * dim, (7 * e * dim + 16) * states};
  };
  const auto rows_of = [&](const at::Tensor& x, const at::Tensor& spans) {
    Tensors parts;
    const auto s = spans.accessor<int64_t, 2>();
    for (int64_t i = 0; i < s.size(0); ++i) parts.push_back(x[s[i][0]].slice(0, s[i][1], s[i][2]));
    return at::cat(parts);
  };
  if (measure.wants("ssd")) {
    measure.differentiate(
        "ssd", mixer(6, 15),
        {rows_of(heads(), every), heads() / std::sqrt(dim), heads(), -0.1 * per_head(), per_head()},
        [&](const Tensors& x) {
          const auto [y, state] =
              operators::ssd(x[0], x[1], x[2], x[3], x[4], std::nullopt, every, std::nullopt);
          return Tensors{y};
        });
  }
  if (measure.wants("gated_delta_rule")) {
    measure.differentiate(
        "gated_delta_rule", mixer(10, 30),
        {rows_of(unit(heads()), every), unit(heads()), heads(), -0.1 * per_head(), per_head()},
        [&](const Tensors& x) {
          const auto [y, state] = operators::gated_delta_rule(x[0], x[1], x[2], x[3], x[4], every,
                                                              std::nullopt, 1 / std::sqrt(dim));
          return Tensors{y};
        });
  }
  for (const int percent : {100, 90, 75, 60, 50, 25, 10}) {
    const std::string name = fmt::format("attention {}%", percent);
    const bool is_usual = percent == 100 || percent == 25;  // the others where attention is asked for
    if (!measure.wants(name) || (!is_usual && !measure.has_filter())) continue;
    const at::Tensor spans = spans_of(sizes, percent / 100.0);
    if (spans.size(0) == 0) continue;  // a short sequence without such a chunk
    double pairs = 0, rows = 0;
    const auto s = spans.accessor<int64_t, 2>();
    for (int64_t i = 0; i < s.size(0); ++i) {
      const double begin = static_cast<double>(s[i][1]), end = static_cast<double>(s[i][2]);
      rows += end - begin;
      pairs += (end - begin) * (begin + end + 1) / 2;
    }
    const double products = 4 * dim * pairs * static_cast<double>(sizes.heads), read = 2 * e * elements,
                 queries = e * rows * static_cast<double>(width);
    const double all_pairs =
        static_cast<double>(sizes.batch) * static_cast<double>(sizes.length * (sizes.length + 1)) / 2;
    const std::string with_pairs =
        percent == 100 ? name : fmt::format("{} ({:.1f}% of pairs)", name, 100 * pairs / all_pairs);
    measure.differentiate(with_pairs, {products, read + 2 * queries, 2.5 * products, 2 * read + 4 * queries},
                          {rows_of(heads(), spans), heads(), heads()}, [&](const Tensors& x) {
                            return Tensors{operators::attention(x[0], x[1], x[2], spans, 1 / std::sqrt(dim))};
                          });
  }
  const auto plain = [&](double forward_passes, double backward_passes) {
    return Cost{0, forward_passes * e * elements, 0, backward_passes * e * elements};
  };
  const auto matrix = [&] { return normal({tokens, width}); };
  measure.differentiate(
      "short_conv", plain(2, 3), {normal({sizes.batch, sizes.length, width}), at::randn({width, 4}, wide)},
      [&](const Tensors& x) {
        return Tensors{std::get<0>(operators::short_conv(x[0], x[1], std::nullopt, std::nullopt, "silu"))};
      });
  // Per state head: x and beta and both results; backward both inputs, what flows back and two gradients.
  const auto narrow = [&] { return normal({sizes.batch, sizes.length, sizes.heads}); };
  measure.differentiate("decays", {0, (2 * e + 8) * states, 0, (4 * e + 8) * states},
                        {narrow(), at::randn({sizes.heads}, wide), at::randn({sizes.heads}, wide), narrow()},
                        [&](const Tensors& x) {
                          const auto [log_decay, strength] = operators::decays(x[0], x[1], x[2], x[3]);
                          return Tensors{log_decay, strength};
                        });
  measure.differentiate(
      "gated_norm", plain(3, 5), {matrix(), matrix(), at::ones({width}, wide)},
      [&](const Tensors& x) { return Tensors{operators::gated_norm(x[0], x[1], x[2], 1e-5, "after_gate")}; });
  measure.differentiate("gated_norm per head", plain(3, 5),
                        {matrix(), matrix(), at::ones({sizes.head_dim}, wide)}, [&](const Tensors& x) {
                          return Tensors{operators::gated_norm(x[0], x[1], x[2], 1e-5, "before_gate")};
                        });
  measure.differentiate("swiglu", plain(3, 5), {matrix(), matrix()}, [&](const Tensors& x) {
    return Tensors{operators::gated_norm(x[0], x[1], std::nullopt, 1e-5, "after_gate")};
  });
  measure.differentiate("add_norm", plain(4, 4), {matrix(), matrix(), at::ones({width}, wide)},
                        [&](const Tensors& x) {
                          const auto [sum, normed] = operators::add_norm(x[0], x[1], x[2], 1e-5);
                          return Tensors{sum, normed};
                        });
  measure.differentiate("l2_norm", plain(2, 3), {heads()},
                        [&](const Tensors& x) { return Tensors{operators::l2_norm(x[0])}; });
  if (measure.wants("rotary")) {
    const auto [cosine, sine] =
        operators::rotary_tables(at::arange(sizes.length, at::TensorOptions(at::kLong).device(device)),
                                 sizes.head_dim, 1e4, wide.dtype().toScalarType());
    measure.differentiate("rotary", plain(2, 2), {heads()}, [&, c = cosine, s = sine](const Tensors& x) {
      return Tensors{operators::rotary(x[0], c, s)};
    });
  }
  if (measure.wants("cross_entropy")) {
    const int64_t vocabulary = 50304;
    const double products = 2.0 * static_cast<double>(vocabulary) * elements;
    const at::Tensor targets = at::randint(vocabulary, {tokens}, options.dtype(at::kLong));
    measure.differentiate("cross_entropy",
                          {3 * products, 0, 0, e * elements + 4.0 * static_cast<double>(vocabulary * width)},
                          {matrix(), at::randn({vocabulary, width}, wide) * 0.02}, [&](const Tensors& x) {
                            return Tensors{std::get<0>(operators::cross_entropy(x[0], x[1], targets, 1e-4))};
                          });
  }
  if (measure.wants("adamw")) {
    const int64_t parameters = int64_t{1} << 27;
    const Tensors p = {at::randn({parameters}, wide)}, g = {at::randn({parameters}, wide)},
                  m = {at::zeros({parameters}, wide)}, v = {at::zeros({parameters}, wide)};
    const double bytes = 4.0 * static_cast<double>(parameters);
    const c10::NoGradGuard no_grad;
    measure.add("adamw 134m parameters", 0, 7 * bytes, [&] { operators::adamw_step(p, g, m, v, {}); });
  }
  return measure.results;
}

}  // namespace oryx::cli
