// Test support of the linear mixers: one table of cases drives values, gradients and precision.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

namespace oryx::operators::testing {

enum class Decay { none, mild, strong, mixed };
enum class Step { random, zero, one, two };
enum class Spans {
  all,
  none,
  random,
  scattered
};  // scattered: out of order, overlapping, several a sequence

struct MixerCase {
  int64_t batch, time, query_heads, key_heads, value_heads, key_dim, value_dim, chunk;
  Decay decay = Decay::mild;
  Step step = Step::random;
  Spans spans = Spans::random;
  bool initial_state = true, correlated_keys = false, strided = false;

  std::string name() const {
    return fmt::format("B{} T{} H{}/{}/{} D{}/{} C{} decay{} step{} spans{} init{} corr{} strided{}", batch,
                       time, query_heads, key_heads, value_heads, key_dim, value_dim, chunk,
                       static_cast<int>(decay), static_cast<int>(step), static_cast<int>(spans),
                       initial_state, correlated_keys, strided);
  }
  int64_t output_heads() const { return std::max(query_heads, value_heads); }
};

// Lengths around the chunk, chunk sizes, head layouts, decay extremes, steps, spans.
inline std::vector<MixerCase> mixer_cases() {
  std::vector<MixerCase> cases;
  for (int64_t time : {1, 63, 64, 65, 333}) cases.push_back({2, time, 2, 2, 2, 16, 24, 64});
  for (int64_t chunk : {1, 7, 16, 100, 128}) cases.push_back({1, 131, 2, 2, 2, 20, 16, chunk});
  cases.push_back({2, 70, 4, 1, 2, 16, 16, 32});  // Hq > Hv > Hk
  cases.push_back({2, 70, 1, 2, 4, 16, 33, 32});  // Hq < Hk < Hv
  cases.push_back({1, 90, 6, 3, 3, 8, 8, 64, Decay::mild, Step::random, Spans::all});
  cases.push_back({1, 100, 2, 1, 2, 32, 16, 64, Decay::none, Step::random, Spans::all, false});
  cases.push_back({1, 100, 2, 2, 2, 16, 16, 64, Decay::strong});
  cases.push_back({2, 200, 2, 2, 2, 16, 16, 64, Decay::mixed, Step::random, Spans::all});
  for (Step step : {Step::zero, Step::one, Step::two}) {
    cases.push_back({1, 80, 1, 1, 1, 16, 16, 64, Decay::mild, step, Spans::all});
    cases.push_back({1, 150, 1, 1, 1, 16, 16, 64, Decay::none, step, Spans::all, true, true});
  }
  cases.push_back({2, 130, 2, 2, 2, 16, 16, 64, Decay::mixed, Step::random, Spans::random, true, true});
  cases.push_back({2, 100, 2, 2, 2, 16, 16, 64, Decay::mild, Step::random, Spans::none});
  cases.push_back({3, 100, 2, 2, 2, 16, 16, 32, Decay::mild, Step::random, Spans::scattered});
  cases.push_back({2, 9, 4, 2, 2, 16, 16, 64, Decay::mild, Step::random, Spans::scattered});
  cases.push_back(
      {2, 100, 2, 2, 2, 64, 64, 64, Decay::mild, Step::random, Spans::random, false, false, true});
  cases.push_back({1, 64, 1, 1, 1, 1, 1, 64});
  return cases;
}

struct MixerTensors {
  at::Tensor query, key, value, log_decay, step, skip, spans;
  std::optional<at::Tensor> initial_state;
};

inline at::Tensor draw_spans(const MixerCase& c, std::mt19937_64& random) {
  std::vector<int64_t> rows;
  const auto add = [&](int64_t sequence, int64_t begin, int64_t end) {
    for (int64_t x : {sequence, begin, end}) rows.push_back(x);
  };
  if (c.spans == Spans::all) {
    for (int64_t b = 0; b < c.batch; ++b) add(b, 0, c.time);
  } else if (c.spans == Spans::random) {  // runs of random lengths, every other one, different per sequence
    for (int64_t b = 0; b < c.batch; ++b) {
      bool wanted = random() % 2 == 0;
      for (int64_t t = 0; t < c.time; wanted = !wanted) {
        const int64_t end = std::min<int64_t>(c.time, t + 1 + static_cast<int64_t>(random() % 90));
        if (wanted) add(b, t, end);
        t = end;
      }
    }
  } else if (c.spans == Spans::scattered) {
    for (int i = 0; i < 7; ++i) {
      const int64_t begin = static_cast<int64_t>(random() % c.time);
      add(static_cast<int64_t>(random() % c.batch), begin,
          begin + static_cast<int64_t>(random() % (c.time - begin + 1)));
    }
  }
  return at::tensor(rows, at::kLong).view({-1, 3});
}

// Values in float64 that `type` represents exactly, so that every precision sees the same problem.
inline MixerTensors draw(const MixerCase& c, at::ScalarType type, uint64_t seed, bool normalised_keys) {
  std::mt19937_64 random(seed);
  at::Generator generator = at::detail::createCPUGenerator(seed);
  const at::ScalarType accumulate = type == at::kDouble ? at::kDouble : at::kFloat;
  const auto normal = [&](at::IntArrayRef sizes) { return at::randn(sizes, generator, at::kDouble); };
  const auto rounded = [](const at::Tensor& x, at::ScalarType to) { return x.to(to).to(at::kDouble); };
  MixerTensors x;
  x.spans = draw_spans(c, random);
  const int64_t rows = (x.spans.select(1, 2) - x.spans.select(1, 1)).sum().item<int64_t>();
  x.query = normal({rows, c.query_heads, c.key_dim});
  x.key = normal({c.batch, c.time, c.key_heads, c.key_dim});
  if (c.correlated_keys)
    x.key = x.key * std::sqrt(0.1) + normal({1, 1, c.key_heads, c.key_dim}) * std::sqrt(0.9);
  if (normalised_keys) {
    x.query = x.query / x.query.norm(2, -1, true).clamp_min(1e-6);
    x.key = x.key / x.key.norm(2, -1, true).clamp_min(1e-6);
  } else {
    x.query = x.query / std::sqrt(static_cast<double>(c.key_dim));
  }
  x.value = normal({c.batch, c.time, c.value_heads, c.value_dim});
  const std::vector<int64_t> per_token = {c.batch, c.time, c.value_heads};
  const at::Tensor chance = at::rand(per_token, generator, at::kDouble);
  x.log_decay = -at::softplus(normal(per_token) - 2);
  if (c.decay == Decay::none) x.log_decay.zero_();
  if (c.decay == Decay::strong) x.log_decay.fill_(-100);
  if (c.decay == Decay::mixed) {
    x.log_decay = at::where(chance < 0.1, at::full_like(chance, -100), x.log_decay);
    x.log_decay = at::where(chance > 0.7, at::zeros_like(chance), x.log_decay);
  }
  x.step = at::rand(per_token, generator, at::kDouble) * (normalised_keys ? 2.0 : 1.0);
  if (c.step != Step::random) x.step.fill_(c.step == Step::zero ? 0 : c.step == Step::one ? 1 : 2);
  x.skip = normal({c.output_heads()});
  if (c.initial_state) x.initial_state = normal({c.batch, c.value_heads, c.key_dim, c.value_dim});
  for (at::Tensor* t : {&x.query, &x.key, &x.value}) *t = rounded(*t, type);
  for (at::Tensor* t : {&x.log_decay, &x.step, &x.skip}) *t = rounded(*t, accumulate);
  if (x.initial_state) *x.initial_state = rounded(*x.initial_state, accumulate);
  if (c.strided) {  // key and value as parts of one projection, heads before tokens
    const at::Tensor both = at::cat({x.key, x.value}, 3).transpose(1, 2).contiguous().transpose(1, 2);
    x.key = both.narrow(3, 0, c.key_dim);
    x.value = both.narrow(3, c.key_dim, c.value_dim);
  }
  return x;
}

inline MixerTensors convert(const MixerTensors& x, at::ScalarType type) {
  const at::ScalarType accumulate = type == at::kDouble ? at::kDouble : at::kFloat;
  MixerTensors y{x.query.to(type),      x.key.to(type),        x.value.to(type), x.log_decay.to(accumulate),
                 x.step.to(accumulate), x.skip.to(accumulate), x.spans,          {}};
  if (x.initial_state) y.initial_state = x.initial_state->to(accumulate);
  return y;
}

using Mixer = std::function<std::tuple<at::Tensor, at::Tensor>(const MixerTensors&)>;

struct Named {
  std::string name;
  at::Tensor value;
};

// Output, final state and the gradients of Σ output ⊙ w + Σ state ⊙ w' in every input, all in float64.
inline std::vector<Named> evaluate(const Mixer& mixer, const MixerTensors& given, at::ScalarType type,
                                   bool has_skip, bool from_output = true, bool from_state = true) {
  MixerTensors x = convert(given, type);
  std::vector<Named> inputs = {{"d_query", x.query},
                               {"d_key", x.key},
                               {"d_value", x.value},
                               {"d_log_decay", x.log_decay},
                               {"d_step", x.step}};
  if (has_skip) inputs.push_back({"d_skip", x.skip});
  if (x.initial_state) inputs.push_back({"d_initial_state", *x.initial_state});
  std::vector<at::Tensor> leaves;
  for (Named& input : inputs) {
    input.value = input.value.detach().set_requires_grad(true);
    leaves.push_back(input.value);
  }
  MixerTensors y{leaves[0], leaves[1], leaves[2], leaves[3], leaves[4], has_skip ? leaves[5] : x.skip,
                 x.spans,   {}};
  if (x.initial_state) y.initial_state = leaves.back();
  const auto [output, state] = mixer(y);
  at::Generator generator = at::detail::createCPUGenerator(99);
  const auto weights = [&](const at::Tensor& t) {
    return at::randn(t.sizes(), generator, at::kDouble).to(at::kBFloat16).to(t.scalar_type());
  };
  const at::Tensor output_weights = weights(output), state_weights = weights(state);
  std::vector<at::Tensor> roots, root_gradients;
  if (from_output && output.requires_grad())
    roots.push_back(output), root_gradients.push_back(output_weights);
  if (from_state && state.requires_grad()) roots.push_back(state), root_gradients.push_back(state_weights);
  std::vector<at::Tensor> gradients(leaves.size());
  if (!roots.empty())
    gradients = torch::autograd::grad(roots, leaves, root_gradients, std::nullopt, false, true);
  std::vector<Named> out = {{"output", output.detach().to(at::kDouble)},
                            {"state", state.detach().to(at::kDouble)}};
  for (size_t i = 0; i < leaves.size(); ++i) {
    const at::Tensor g = gradients[i].defined() ? gradients[i] : at::zeros_like(leaves[i]);
    EXPECT_EQ(g.scalar_type(), leaves[i].scalar_type()) << inputs[i].name;
    out.push_back({inputs[i].name, g.to(at::kDouble)});
  }
  return out;
}

// ‖x − y‖ / ‖y‖, with 1e-3 of an element's worth of floor for gradients that vanish; NaN compares as
// infinite.
inline double relative_error(const at::Tensor& x, const at::Tensor& y) {
  if (y.numel() == 0) return x.numel() == 0 ? 0 : INFINITY;
  const double floor = 1e-3 * std::sqrt(static_cast<double>(y.numel()));
  const double error = ((x - y).norm() / y.norm().clamp_min(floor)).item<double>();
  return std::isfinite(error) ? error : INFINITY;
}

inline void expect_near(const std::vector<Named>& x, const std::vector<Named>& y,
                        const std::function<double(const std::string&)>& tolerance, const std::string& what) {
  ASSERT_EQ(x.size(), y.size());
  for (size_t i = 0; i < x.size(); ++i) {
    EXPECT_LE(relative_error(x[i].value, y[i].value), tolerance(x[i].name)) << x[i].name << " of " << what;
  }
}

// Along one random direction of all inputs: the gradient's product with it against central differences.
inline double directional_error(const Mixer& mixer, const MixerTensors& x, bool has_skip) {
  const std::vector<Named> at_x = evaluate(mixer, x, at::kDouble, has_skip);
  at::Generator generator = at::detail::createCPUGenerator(5);
  MixerTensors direction = x;
  double slope = 0;
  const auto turn = [&](at::Tensor& t, const std::string& name) {
    t = at::randn(t.sizes(), generator, at::kDouble);
    for (const Named& g : at_x) {
      if (g.name == name) slope += (g.value * t).sum().item<double>();
    }
  };
  turn(direction.query, "d_query");
  turn(direction.key, "d_key");
  turn(direction.value, "d_value");
  turn(direction.log_decay, "d_log_decay");
  turn(direction.step, "d_step");
  turn(direction.skip, "d_skip");
  if (direction.initial_state) turn(*direction.initial_state, "d_initial_state");
  const auto loss = [&](double distance) {
    MixerTensors y = x;
    const auto move = [&](at::Tensor& t, const at::Tensor& d) { t = t + distance * d; };
    move(y.query, direction.query);
    move(y.key, direction.key);
    move(y.value, direction.value);
    move(y.log_decay, direction.log_decay);
    move(y.step, direction.step);
    if (has_skip) move(y.skip, direction.skip);
    if (y.initial_state) move(*y.initial_state, *direction.initial_state);
    const auto [output, state] = mixer(y);
    at::Generator weights = at::detail::createCPUGenerator(99);  // as evaluate() draws them
    const auto weighted = [&](const at::Tensor& t) {
      return (t * at::randn(t.sizes(), weights, at::kDouble).to(at::kBFloat16)).sum().item<double>();
    };
    const double first = weighted(output);
    return first + weighted(state);
  };
  const double step = 1e-5;
  const double difference = (loss(step) - loss(-step)) / (2 * step);
  return std::abs(difference - slope) / std::max(1.0, std::abs(slope));
}

inline MixerCase any_case() {
  const auto any = [](int64_t from, int64_t to) { return *rc::gen::inRange<int64_t>(from, to + 1); };
  MixerCase c{};
  c.batch = any(1, 3);
  c.time = any(1, 50);
  c.key_heads = any(1, 2);
  c.value_heads = c.key_heads * any(1, 2);
  c.query_heads = any(0, 1) == 0 ? c.value_heads * any(1, 3) : 1;
  c.key_dim = any(1, 40);
  c.value_dim = any(1, 40);
  c.chunk = any(1, 40);
  c.decay = static_cast<Decay>(any(0, 3));
  c.step = static_cast<Step>(any(0, 3));
  c.spans = static_cast<Spans>(any(0, 3));
  c.initial_state = any(0, 1) == 1;
  c.correlated_keys = any(0, 1) == 1;
  c.strided = any(0, 1) == 1 && c.key_heads == c.value_heads;
  return c;
}

// Runs tokens [0, cut) and [cut, T) of x with the state handed over, and compares with one run.
inline void expect_pieces_are_whole(const Mixer& mixer, const MixerCase& c, const MixerTensors& x,
                                    int64_t cut) {
  const auto [output, state] = mixer(x);
  MixerTensors y = x;
  at::Tensor outputs = at::empty_like(output);
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, cut}, {cut, c.time}}) {
    std::vector<int64_t> spans, rows;
    int64_t row = 0;
    for (int64_t i = 0; i < x.spans.size(0); ++i) {
      const int64_t from = x.spans[i][1].item<int64_t>(), to = x.spans[i][2].item<int64_t>();
      const int64_t first = std::max(from, begin), last = std::min(to, end);
      if (first < last) {
        for (const int64_t value : {x.spans[i][0].item<int64_t>(), first - begin, last - begin})
          spans.push_back(value);
        for (int64_t t = first; t < last; ++t) rows.push_back(row + t - from);
      }
      row += to - from;
    }
    const at::Tensor index = at::tensor(rows, at::kLong);
    y.spans = at::tensor(spans, at::kLong).view({-1, 3});
    y.query = x.query.index_select(0, index);
    y.key = x.key.narrow(1, begin, end - begin);
    y.value = x.value.narrow(1, begin, end - begin);
    y.log_decay = x.log_decay.narrow(1, begin, end - begin);
    y.step = x.step.narrow(1, begin, end - begin);
    const auto [piece, piece_state] = mixer(y);
    outputs.index_copy_(0, index, piece);
    y.initial_state = piece_state;
  }
  RC_ASSERT(relative_error(outputs, output) <= 1e-10);
  RC_ASSERT(relative_error(*y.initial_state, state) <= 1e-10);
}

// Every tensor that ATen leaves uninitialised, kernel scratch included, is filled with NaN (bytes 0xff).
// One thread is enough for tests this small, two on a busy machine wait for each other.
inline void prepare_process() {
  at::set_num_threads(1);
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
  at::globalContext().setDeterministicFillUninitializedMemory(true);
}

}  // namespace oryx::operators::testing
