// The CUDA kernels of gated_delta_rule against its composed form in float64, from the same rounded inputs.
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <map>

#include "operators/cpu/mixer_cases.h"
#include "operators/device/device_testing.h"
#include "operators/device/state_rows_testing.h"
#include "operators/gated_delta_rule/gated_delta_rule.h"
#include "operators/gated_delta_rule/gated_delta_rule_cuda.h"
#include "operators/gated_delta_rule/gated_delta_rule_kernels.h"
#ifdef ORYX_EMULATED
#include "operators/device/warpgroup.h"
#endif

namespace oryx::operators::testing {
namespace {

[[maybe_unused]] const bool prepared = (prepare_process(), true);

constexpr double kScale = 0.3;

// A form of the operator on the device whose tensors kernels serve, for tensors that lie on the CPU.
template <auto form>
std::tuple<at::Tensor, at::Tensor> on_device(const MixerTensors& x) {
  const auto place = [](const at::Tensor& t) { return t.to(kernel_device()); };
  const std::optional<at::Tensor> state =
      x.initial_state ? std::optional(place(*x.initial_state)) : std::nullopt;
  const auto [output, last] = form(place(x.query), place(x.key), place(x.value), place(x.log_decay),
                                   place(x.step), x.spans, state, kScale, 64);
  return {output.cpu(), last.cpu()};
}
const Mixer kernels = on_device<gated_delta_rule>, judge = on_device<gated_delta_rule_chunked>;

double tolerance(const std::string& name) {
  return name == "d_log_decay" ? 2e-2 : name == "d_step" ? 1.2e-2 : 8e-3;
}

std::vector<Named> evaluate_kernels(const MixerTensors& x, bool from_output = true, bool from_state = true) {
  std::vector<Named> named;
  with_kernels([&] {
    named = evaluate(kernels, x, at::kBFloat16, false, from_output, from_state);
    std::vector<at::Tensor> tensors;
    for (const Named& n : named) tensors.push_back(n.value);
    return tensors;
  });
  return named;
}

void expect_close(const MixerTensors& x, const std::string& name, bool from_output = true,
                  bool from_state = true) {
  expect_near(evaluate_kernels(x, from_output, from_state),
              evaluate(judge, x, at::kDouble, false, from_output, from_state), tolerance, name);
}

void expect_close(const MixerCase& c, uint64_t seed) {
  expect_close(draw(c, at::kBFloat16, seed, true), c.name());
}

// A product as the best kernel of bfloat16 makes it, forward and backward: operands rounded, summed in
// float32.
struct RoundedProduct : torch::autograd::Function<RoundedProduct> {
  static at::Tensor rounded(const at::Tensor& x) { return x.to(at::kBFloat16).to(at::kFloat); }
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& left,
                            const at::Tensor& right) {
    context->save_for_backward({left, right});
    return rounded(left).matmul(rounded(right));
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor gradient = rounded(gradients[0]);
    return {gradient.matmul(rounded(saved[1]).mT()), rounded(saved[0]).mT().matmul(gradient)};
  }
};

// The rule in chunks with nothing rounded to bfloat16 but the inputs, the operands of products and the
// outputs; for the tokens in their order, as many query as key and value heads.
std::tuple<at::Tensor, at::Tensor> ideal(const MixerTensors& x) {
  const int64_t time = x.key.size(1), chunk = 64;
  const auto product = [](const at::Tensor& left, const at::Tensor& right) {
    return RoundedProduct::apply(left, right);
  };
  const auto by_head = [](const at::Tensor& t) { return t.to(at::kFloat).transpose(1, 2); };
  const at::Tensor query = by_head(x.query.view_as(x.key)), key = by_head(x.key), value = by_head(x.value),
                   log_decay = by_head(x.log_decay), beta = by_head(x.step).unsqueeze(-1);
  at::Tensor state = x.initial_state->to(at::kFloat);
  std::vector<at::Tensor> outputs;
  for (int64_t begin = 0; begin < time; begin += chunk) {
    const int64_t size = std::min(chunk, time - begin);
    const auto part = [&](const at::Tensor& t) { return t.narrow(2, begin, size); };
    const at::Tensor q = part(query), k = part(key), log_gamma = part(log_decay).cumsum(-1).unsqueeze(-1);
    const at::Tensor between = (log_gamma - log_gamma.mT()).tril().exp().tril();
    const at::Tensor last = log_gamma.narrow(2, size - 1, 1), gamma = log_gamma.exp();
    const at::Tensor unit = at::eye(size, k.options());
    const at::Tensor lower = (part(beta) * product(k, k.mT()) * between).tril(-1) + unit;
    const at::Tensor inverse =
        at::linalg_solve_triangular(lower, unit.expand_as(lower), /*upper=*/false, true, true);
    const at::Tensor rows = product(inverse, part(beta) * (part(value) - gamma * product(k, state)));
    outputs.push_back(kScale * (gamma * product(q, state) + product(product(q, k.mT()) * between, rows)));
    state = last.exp() * state + product(k.mT(), (last - log_gamma).exp() * rows);
  }
  const at::Tensor output = at::cat(outputs, 2).transpose(1, 2).flatten(0, 1);
  return {output.to(x.value.scalar_type()), state};
}

// Pure reflections of keys that are alike keep every rounding error and add them up. What no kernel of
// bfloat16 avoids is given by the ideal one.
void expect_as_close_as_ideal(const MixerTensors& x, const std::string& name) {
  const auto expected = evaluate(judge, x, at::kDouble, false),
             best = evaluate(ideal, x, at::kBFloat16, false);
  std::map<std::string, double> bounds;
  for (size_t i = 0; i < best.size(); ++i) {
    bounds[best[i].name] =
        std::max(tolerance(best[i].name), 2 * relative_error(best[i].value, expected[i].value));
  }
  expect_near(
      evaluate_kernels(x), expected, [&](const std::string& tensor) { return bounds.at(tensor); }, name);
}

// x with other tokens selected.
MixerTensors select(const MixerTensors& x, const std::vector<int64_t>& spans) {
  MixerTensors y = x;
  y.spans = at::tensor(spans, at::kLong).view({-1, 3});
  const int64_t rows = (y.spans.select(1, 2) - y.spans.select(1, 1)).sum().item<int64_t>();
  at::Generator generator = at::detail::createCPUGenerator(17);
  y.query = at::randn({rows, x.query.size(1), x.query.size(2)}, generator, at::kDouble);
  y.query = (y.query / y.query.norm(2, -1, true)).to(at::kBFloat16).to(at::kDouble);
  return y;
}

TEST(GatedDeltaRuleKernels, Lengths) {
  for (const int64_t time : {1, 63, 64, 65, 129, 333}) {
    // One token's d_log_decay is one sum of terms that cancel: it takes several to say how precise it is.
    const int64_t batch = time == 1 ? 8 : 1;
    expect_close({batch, time, 1, 1, 1, 64, 64, 64, Decay::mild, Step::random, Spans::all}, 1);
  }
}

TEST(GatedDeltaRuleKernels, HeadDimensions) {
  for (const auto& [key_dim, value_dim] : {std::pair<int64_t, int64_t>{128, 128}, {64, 128}, {128, 64}})
    expect_close({1, 70, 1, 1, 1, key_dim, value_dim, 64}, 2);
}

// From many streams on, the serial passes hold wider parts of a state.
TEST(GatedDeltaRuleKernels, Widths) {
  for (const int64_t batch : {1, 2, 3}) expect_close({batch, 66, 1, 1, 1, 64, 128, 64}, 3);
  for (const int64_t batch : {2, 3}) expect_close({batch, 66, 1, 1, 1, 64, 64, 64}, 3);
  expect_close({3, 66, 1, 1, 1, 128, 128, 64}, 3);
}

struct ForcedSegments {
  explicit ForcedSegments(int count) { force_gated_delta_segments(count); }
  ~ForcedSegments() { force_gated_delta_segments(0); }
};

TEST(GatedDeltaRuleKernels, Segments) {
  for (const auto& [time, segments] :
       {std::pair<int64_t, int>{65, 2}, {127, 2}, {192, 2}, {257, 3}, {257, 5}}) {
    const ForcedSegments forced(segments);
    expect_close({1, time, 1, 1, 1, 64, 64, 64, Decay::mild, Step::random, Spans::all, time != 127}, 20);
  }
}

TEST(GatedDeltaRuleKernels, SegmentsOfOtherShapes) {
  const ForcedSegments forced(2);
  expect_close({1, 129, 1, 1, 1, 128, 128, 64, Decay::mild, Step::random, Spans::all}, 21);
  expect_close({1, 129, 1, 1, 1, 64, 128, 64}, 21);
  expect_close({3, 129, 1, 1, 1, 128, 64, 64, Decay::mixed, Step::random, Spans::random, false}, 21);
  expect_close({2, 129, 4, 1, 2, 64, 64, 64, Decay::none, Step::random, Spans::random, false}, 21);
}

TEST(GatedDeltaRuleKernels, SegmentsOfCorrelatedKeys) {
  const ForcedSegments forced(3);
  for (const Decay decay : {Decay::none, Decay::mild}) {
    const MixerCase c{1, 300, 1, 1, 1, 64, 64, 64, decay, Step::two, Spans::all, true, true};
    const MixerTensors x = draw(c, at::kBFloat16, 22, true);
    decay == Decay::none ? expect_as_close_as_ideal(x, c.name()) : expect_close(x, c.name());
  }
  expect_close({1, 300, 1, 1, 1, 64, 64, 64, Decay::none, Step::random, Spans::all, true, true}, 22);
}

TEST(GatedDeltaRuleKernels, SegmentsWhereOneOfTheTwoGradientsIsMissing) {
  const ForcedSegments forced(3);
  const MixerTensors x = draw({1, 170, 2, 1, 1, 64, 64, 64}, at::kBFloat16, 23, true);
  expect_close(x, "from output", true, false);
  expect_close(x, "from state", false, true);
}

TEST(GatedDeltaRuleKernels, SegmentsOfStreamsThatLeaveTheDeviceIdle) {
  cuda::GatedDeltaArguments a{};
  a.key_dim = a.value_dim = 128;
  a.multiprocessors = 132;
  const auto segments = [&](int batch, int heads, int tokens, bool differentiates) {
    a.batch = batch, a.state_heads = heads, a.chunks = (tokens + 63) / 64;
    return cuda::gated_delta_segments(a, differentiates);
  };
  for (const bool differentiates : {false, true}) {
    EXPECT_EQ(segments(8, 16, 2048, differentiates), 1);
    EXPECT_EQ(segments(1, 16, 64, differentiates), 1);
    EXPECT_EQ(segments(1, 16, 0, differentiates), 1);
    EXPECT_GE(segments(1, 16, 16384, differentiates), 5);
    EXPECT_LE(segments(1, 16, 16384, differentiates), 10);
    EXPECT_EQ(segments(1, 1, 100, differentiates), 1);
    EXPECT_GE(segments(1, 1, 65536, differentiates), 16);
  }
}

#ifdef ORYX_EMULATED
// As on a GPU without wgmma.
TEST(GatedDeltaRuleKernels, WithoutWarpgroupProducts) {
  const ForcedSegments forced(2);
  device::has_warpgroup_products = false;
  expect_close({1, 129, 2, 1, 1, 128, 128, 64}, 24);
  device::has_warpgroup_products = true;
}
#endif

TEST(GatedDeltaRuleKernels, HeadGroups) {
  expect_close({1, 70, 4, 1, 2, 64, 64, 64}, 4);
  expect_close({1, 130, 2, 1, 1, 64, 64, 64, Decay::mild, Step::random, Spans::all}, 4);
  expect_close({1, 70, 1, 2, 4, 64, 64, 64}, 4);
}

TEST(GatedDeltaRuleKernels, Decays) {
  for (const Decay decay : {Decay::none, Decay::strong, Decay::mixed})
    expect_close({1, 130, 1, 1, 1, 64, 64, 64, decay, Step::random, Spans::all}, 5);
}

TEST(GatedDeltaRuleKernels, StepsAndCorrelatedKeys) {
  for (const Step step : {Step::zero, Step::one, Step::two, Step::random}) {
    for (const Decay decay : {Decay::none, Decay::mild}) {
      const MixerCase c{1, 100, 1, 1, 1, 64, 64, 64, decay, step, Spans::all, true, true};
      const MixerTensors x = draw(c, at::kBFloat16, 6, true);
      if (step == Step::two && decay == Decay::none) {
        expect_as_close_as_ideal(x, c.name());
      } else {
        expect_close(x, c.name());
      }
    }
  }
}

TEST(GatedDeltaRuleKernels, SelectedTokens) {
  const MixerCase c{2, 200, 1, 1, 1, 64, 64, 64, Decay::mild, Step::random, Spans::none};
  const MixerTensors x = draw(c, at::kBFloat16, 7, true);
  expect_close(x, "none");
  expect_close(select(x, {0, 64, 128, 1, 0, 64}), "whole chunks");
  expect_close(select(x, {1, 199, 200, 0, 3, 4, 0, 60, 70}), "out of order");
  const MixerCase of_two_readers{2, 200, 4, 1, 2, 64, 64, 64, Decay::mild, Step::random, Spans::none};
  expect_close(select(draw(of_two_readers, at::kBFloat16, 7, true), {0, 64, 128, 1, 0, 64}), "two readers");
  expect_close({2, 150, 1, 1, 1, 64, 64, 64, Decay::mild, Step::random, Spans::random, false}, 7);
}

// Overlapping spans take the composed form, bfloat16 in and out.
TEST(GatedDeltaRuleKernels, TokensWithTwoRows) {
  const MixerTensors x = draw({1, 70, 1, 1, 1, 64, 64, 64}, at::kBFloat16, 8, true);
  expect_close(select(x, {0, 10, 30, 0, 20, 40}), "overlapping");
}

TEST(GatedDeltaRuleKernels, StridedInputs) {
  expect_close({2, 70, 2, 2, 2, 64, 64, 64, Decay::mild, Step::random, Spans::random, false, false, true}, 9);
}

TEST(GatedDeltaRuleKernels, OneOfTheTwoGradientsMayBeMissing) {
  const MixerTensors x = draw({1, 70, 2, 1, 1, 64, 64, 64}, at::kBFloat16, 10, true);
  expect_close(x, "from output", true, false);
  expect_close(x, "from state", false, true);
}

// A state that grows without its decay: the inverse must know the decay.
TEST(GatedDeltaRuleKernels, KeysNeedNotBeNormalised) {
  MixerTensors x = draw({1, 100, 1, 1, 1, 64, 64, 64, Decay::strong}, at::kBFloat16, 11, true);
  x.key = x.key * 2;
  expect_close(x, "long keys");
}

std::pair<at::Tensor, at::Tensor> forward(const MixerTensors& x, at::ScalarType type) {
  const at::NoGradGuard guard;
  const auto tensors = with_kernels([&] {
    const auto [output, state] = kernels(convert(x, type));
    return std::vector<at::Tensor>{output, state};
  });
  return {tensors[0], tensors[1]};
}

TEST(GatedDeltaRuleKernels, SingleSteps) {
  for (const at::ScalarType type : {at::kBFloat16, at::kFloat}) {
    for (const int64_t time : {1, 7, 15}) {
      for (const int64_t dim : {64, 128}) {
        const MixerCase c{
            2, time, 4, 1, 2, dim, 192 - dim, 64, Decay::mild, Step::random, Spans::random, time != 7};
        const MixerTensors x = draw(c, at::kBFloat16, 12, true);
        const auto [output, state] = forward(x, type);
        const auto [expected, expected_state] = judge(convert(x, at::kDouble));
        EXPECT_LE(relative_error(output.to(at::kDouble), expected), type == at::kFloat ? 1e-5 : 5e-3)
            << c.name();
        EXPECT_LE(relative_error(state.to(at::kDouble), expected_state), 1e-5) << c.name();
      }
    }
  }
}

TEST(GatedDeltaRuleKernels, GoesOnFromRowsOfStates) {
  expect_goes_on_from_rows(
      kernels, /*normalised_keys=*/true,
      [](const MixerTensors& x, const at::Tensor& states, const at::Tensor& rows, bool keeps_state) {
        return gated_delta_rule_inference(x.query, x.key, x.value, x.log_decay, x.step, x.spans, states, rows,
                                          kScale, keeps_state);
      });
}

// Two prompts' pieces, then single steps, with the state handed over.
TEST(GatedDeltaRuleKernels, PiecesWithStateAreTheWhole) {
  const MixerTensors x =
      draw({1, 150, 1, 1, 1, 64, 64, 64, Decay::mild, Step::random, Spans::all}, at::kBFloat16, 13, true);
  const auto [output, state] = forward(x, at::kBFloat16);
  MixerTensors y = x;
  std::vector<at::Tensor> outputs;
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 100}, {100, 147}, {147, 149}, {149, 150}}) {
    y.spans = at::tensor({int64_t{0}, int64_t{0}, end - begin}, at::kLong).view({1, 3});
    y.query = x.query.narrow(0, begin, end - begin);
    y.key = x.key.narrow(1, begin, end - begin);
    y.value = x.value.narrow(1, begin, end - begin);
    y.log_decay = x.log_decay.narrow(1, begin, end - begin);
    y.step = x.step.narrow(1, begin, end - begin);
    const auto [piece, last] = forward(y, at::kBFloat16);
    outputs.push_back(piece);
    y.initial_state = last.to(at::kDouble);
  }
  EXPECT_LE(relative_error(at::cat(outputs).to(at::kDouble), output.to(at::kDouble)), 8e-3);
  EXPECT_LE(relative_error(*y.initial_state, state.to(at::kDouble)), 8e-3);
}

TEST(GatedDeltaRuleKernels, EmptySequencesKeepTheState) {
  const MixerTensors x =
      draw({2, 0, 1, 1, 1, 64, 64, 64, Decay::mild, Step::random, Spans::none}, at::kBFloat16, 14, true);
  const auto [output, state] = forward(x, at::kBFloat16);
  EXPECT_EQ(output.sizes(), (at::IntArrayRef{0, 1, 64}));
  EXPECT_TRUE(state.to(at::kDouble).equal(*x.initial_state));
}

// Sizes of training; only a GPU has the time for them.
TEST(GatedDeltaRuleKernels, TrainingSizes) {
  if (wants_small_cases()) return;
  for (const MixerCase& c :
       {MixerCase{8, 2048, 16, 16, 16, 128, 128, 64},
        MixerCase{4, 1000, 8, 4, 8, 128, 128, 64, Decay::mixed, Step::two, Spans::all, true, true},
        MixerCase{16, 333, 16, 8, 8, 64, 64, 64, Decay::none, Step::random, Spans::all},
        MixerCase{1, 16384, 4, 4, 4, 128, 128, 64, Decay::mild, Step::random, Spans::all},
        MixerCase{1, 16384, 16, 16, 16, 128, 128, 64},
        MixerCase{1, 5055, 4, 4, 4, 128, 128, 64, Decay::none, Step::random, Spans::all, true, true}}) {
    expect_close(c, 15);
  }
}

TEST(GatedDeltaRuleKernels, RepeatsBitForBit) {
  if (wants_small_cases()) return;  // with_kernels() has repeated every case
  for (const MixerCase& c :
       {MixerCase{2, 333, 8, 8, 8, 128, 128, 64}, MixerCase{4, 128, 8, 8, 8, 128, 128, 64},
        MixerCase{1, 4000, 4, 4, 4, 128, 128, 64}}) {
    const MixerTensors x = draw(c, at::kBFloat16, 16, true);
    const auto first = evaluate(kernels, x, at::kBFloat16, false);
    for (int i = 0; i < 200; ++i) {
      const auto again = evaluate(kernels, x, at::kBFloat16, false);
      for (size_t j = 0; j < first.size(); ++j)
        ASSERT_TRUE(first[j].value.equal(again[j].value)) << first[j].name;
    }
  }
}

}  // namespace
}  // namespace oryx::operators::testing
