#include "operators/gated_delta_rule/gated_delta_rule.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <rapidcheck.h>

#include "base/error.h"
#include "operators/cpu/mixer_cases.h"

namespace oryx::operators::testing {
namespace {

[[maybe_unused]] const bool prepared = (prepare_process(), true);

Mixer chunked(int64_t chunk) {
  return [chunk](const MixerTensors& x) {
    return gated_delta_rule(x.query, x.key, x.value, x.log_decay, x.step, x.spans, x.initial_state, 0.3,
                            chunk);
  };
}
Mixer composed(int64_t chunk) {
  return [chunk](const MixerTensors& x) {
    return gated_delta_rule_chunked(x.query, x.key, x.value, x.log_decay, x.step, x.spans, x.initial_state,
                                    0.3, chunk);
  };
}
std::tuple<at::Tensor, at::Tensor> recurrent(const MixerTensors& x) {
  return gated_delta_rule_recurrence(x.query, x.key, x.value, x.log_decay, x.step, x.spans, x.initial_state,
                                     0.3);
}

TEST(GatedDeltaRule, ChunkedIsTheRecurrenceInFloat64) {
  for (const MixerCase& c : mixer_cases()) {
    const MixerTensors x = draw(c, at::kDouble, 1, true);
    expect_near(
        evaluate(chunked(c.chunk), x, at::kDouble, false), evaluate(recurrent, x, at::kDouble, false),
        [](const std::string& name) { return name[1] == '_' ? 1e-9 : 1e-10; }, c.name());
  }
}

// float32 rounds sums of about 64 terms; bfloat16 rounds each output and gradient once (2^-9), with room for
// sums that cancel.
TEST(GatedDeltaRule, Float32AndBfloat16StayClose) {
  for (const MixerCase& c : mixer_cases()) {
    const MixerTensors x = draw(c, at::kBFloat16, 2, true);
    const auto expected = evaluate(recurrent, x, at::kDouble, false);
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
      expect_near(
          evaluate(chunked(c.chunk), x, type, false), expected,
          [&](const std::string& name) {
            if (type == at::kFloat) return name == "d_log_decay" || name == "d_step" ? 1e-5 : 5e-6;
            return name == "d_log_decay" ? 2e-2 : name == "d_step" ? 1.2e-2 : 8e-3;
          },
          c.name() + (type == at::kFloat ? " float32" : " bfloat16"));
    }
  }
}

TEST(GatedDeltaRule, ComposedChunksAreTheRecurrenceInFloat64) {
  for (const MixerCase& c : mixer_cases()) {
    const MixerTensors x = draw(c, at::kDouble, 12, true);
    expect_near(
        evaluate(composed(c.chunk), x, at::kDouble, false), evaluate(recurrent, x, at::kDouble, false),
        [](const std::string& name) { return name[1] == '_' ? 1e-9 : 1e-10; }, c.name());
  }
}

// Along one random direction of all inputs, the gradient against central differences.
TEST(GatedDeltaRule, GradientsMatchFiniteDifferences) {
  const MixerCase c{2, 90, 4, 1, 2, 16, 24, 32};
  const MixerTensors x = draw(c, at::kDouble, 3, true);
  EXPECT_LE(directional_error(chunked(c.chunk), x, false), 1e-6);
  EXPECT_LE(directional_error(recurrent, x, false), 1e-6);
}

TEST(GatedDeltaRule, OneOfTheTwoGradientsMayBeMissing) {
  for (const bool from_output : {true, false}) {
    for (const MixerCase& c : {MixerCase{2, 90, 2, 2, 2, 16, 24, 32}, MixerCase{1, 8, 2, 1, 2, 16, 16, 64}}) {
      const MixerTensors x = draw(c, at::kDouble, 4, true);
      expect_near(
          evaluate(chunked(c.chunk), x, at::kDouble, false, from_output, !from_output),
          evaluate(recurrent, x, at::kDouble, false, from_output, !from_output),
          [](const std::string&) { return 1e-9; }, c.name());
    }
  }
}

// Keys that are not normalised: the state grows wherever beta ‖k‖² > 2, and the chunk must follow it.
TEST(GatedDeltaRule, KeysNeedNotBeNormalised) {
  for (const Decay decay : {Decay::mild, Decay::mixed, Decay::strong}) {
    const MixerCase c{1, 100, 2, 2, 2, 8, 8, 64, decay};
    MixerTensors x = draw(c, at::kDouble, 5, true);
    x.key = x.key * 2;
    x.step = x.step / 2;
    expect_near(
        evaluate(chunked(c.chunk), x, at::kDouble, false), evaluate(recurrent, x, at::kDouble, false),
        [](const std::string&) { return 1e-9; }, c.name());
  }
}

// Any cut with the state handed over gives the whole, for random shapes; short pieces take the step path.
TEST(GatedDeltaRule, PiecesWithStateAreTheWhole) {
  EXPECT_TRUE(rc::check([] {
    const MixerCase c = any_case();
    const MixerTensors x = draw(c, at::kDouble, 6, true);
    expect_pieces_are_whole(chunked(c.chunk), c, x, *rc::gen::inRange<int64_t>(1, c.time + 1));
  }));
}

TEST(GatedDeltaRule, RandomShapesMatchTheRecurrence) {
  EXPECT_TRUE(rc::check([] {
    const MixerCase c = any_case();
    const MixerTensors x = draw(c, at::kDouble, 7, true);
    expect_near(
        evaluate(chunked(c.chunk), x, at::kDouble, false), evaluate(recurrent, x, at::kDouble, false),
        [](const std::string&) { return 1e-9; }, c.name());
    RC_ASSERT(!::testing::Test::HasFailure());
  }));
}

TEST(GatedDeltaRule, RepeatsBitForBitOnAnyNumberOfThreads) {
  const MixerCase c{4, 200, 4, 2, 4, 64, 64, 64};
  const MixerTensors x = draw(c, at::kFloat, 8, true);
  ASSERT_TRUE(at::empty({8}).isnan().all().item<bool>());  // fresh memory is poisoned
  const auto first = evaluate(chunked(c.chunk), x, at::kFloat, false);
  for (const int threads : {1, 2, 3}) {
    at::set_num_threads(threads);
    const auto again = evaluate(chunked(c.chunk), x, at::kFloat, false);
    for (size_t i = 0; i < first.size(); ++i)
      EXPECT_TRUE(first[i].value.equal(again[i].value)) << first[i].name;
  }
  at::set_num_threads(1);
}

TEST(GatedDeltaRule, EmptySequencesKeepTheState) {
  const MixerCase c{2, 0, 2, 2, 2, 16, 16, 64, Decay::mild, Step::random, Spans::none};
  const MixerTensors x = draw(c, at::kDouble, 9, true);
  const auto [output, state] = chunked(64)(x);
  EXPECT_EQ(output.sizes(), (at::IntArrayRef{0, 2, 16}));
  EXPECT_TRUE(state.equal(*x.initial_state));
  const auto [composed_output, composed_state] = composed(64)(x);
  EXPECT_EQ(composed_output.sizes(), output.sizes());
  EXPECT_TRUE(composed_state.equal(*x.initial_state));
}

TEST(GatedDeltaRule, IsRegisteredWithTheDispatcher) {
  const MixerTensors x = draw({1, 20, 2, 2, 2, 16, 16, 64}, at::kDouble, 10, true);
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow("oryx::gated_delta_rule", "")
                      .typed<decltype(gated_delta_rule)>();
  const auto [output, state] =
      op.call(x.query, x.key, x.value, x.log_decay, x.step, x.spans, x.initial_state, 0.3, 64);
  const auto [expected, expected_state] = recurrent(x);
  EXPECT_LE(relative_error(output, expected), 1e-10);
  EXPECT_LE(relative_error(state, expected_state), 1e-10);
}

TEST(GatedDeltaRule, RefusesWrongArguments) {
  const MixerTensors x =
      draw({1, 20, 2, 2, 2, 16, 16, 64, Decay::mild, Step::random, Spans::all}, at::kDouble, 11, true);
  const auto refuses = [](const MixerTensors& y, const std::string& part) {
    try {
      chunked(64)(y);
      ADD_FAILURE() << "accepted, expected: " << part;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  MixerTensors y = x;
  y.key = x.key.narrow(3, 0, 8);
  refuses(y, "[gated_delta_rule] expected query [-1, -1, 8], got");
  y = x, y.step = x.step.to(at::kFloat);
  refuses(y, "expected beta of type Double, got Float");
  y = x, y.spans = at::tensor({0, 0, 21}, at::kLong).view({1, 3});
  refuses(y, "within 1 sequences of 20 tokens, got (0, 0, 21)");
  y = x, y.spans = at::tensor({0, 0, 3}, at::kLong).view({1, 3}), y.query = x.query.narrow(0, 0, 2);
  refuses(y, "a row for each of the 3 tokens");
}

}  // namespace
}  // namespace oryx::operators::testing
