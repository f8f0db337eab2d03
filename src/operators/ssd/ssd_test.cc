#include "operators/ssd/ssd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <rapidcheck.h>

#include "base/error.h"
#include "operators/cpu/mixer_cases.h"

namespace oryx::operators::testing {
namespace {

[[maybe_unused]] const bool prepared = (prepare_process(), true);

Mixer chunked(int64_t chunk) {
  return [chunk](const MixerTensors& x) {
    return ssd(x.query, x.key, x.value, x.log_decay, x.step, x.skip, x.spans, x.initial_state, chunk);
  };
}
std::tuple<at::Tensor, at::Tensor> recurrent(const MixerTensors& x) {
  return ssd_recurrence(x.query, x.key, x.value, x.log_decay, x.step, x.skip, x.spans, x.initial_state);
}

TEST(Ssd, ChunkedIsTheRecurrenceInFloat64) {
  for (const MixerCase& c : mixer_cases()) {
    const MixerTensors x = draw(c, at::kDouble, 1, false);
    expect_near(
        evaluate(chunked(c.chunk), x, at::kDouble, true), evaluate(recurrent, x, at::kDouble, true),
        [](const std::string& name) { return name[1] == '_' ? 1e-9 : 1e-10; }, c.name());
  }
}

TEST(Ssd, ComposedChunksAreTheRecurrenceInFloat64) {
  for (const MixerCase& c : mixer_cases()) {
    const MixerTensors x = draw(c, at::kDouble, 1, false);
    const auto composed = [&](const MixerTensors& y) {
      return ssd_chunked(y.query, y.key, y.value, y.log_decay, y.step, y.skip, y.spans, y.initial_state,
                         c.chunk);
    };
    expect_near(
        evaluate(composed, x, at::kDouble, true), evaluate(recurrent, x, at::kDouble, true),
        [](const std::string&) { return 1e-10; }, c.name());
  }
}

// float32 rounds sums of about 64 terms (5e-6); bfloat16 rounds each output and gradient once (2^-9, 5e-3
// with room for sums that cancel).
TEST(Ssd, Float32AndBfloat16StayClose) {
  for (const MixerCase& c : mixer_cases()) {
    const MixerTensors x = draw(c, at::kBFloat16, 2, false);
    const auto expected = evaluate(recurrent, x, at::kDouble, true);
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
      expect_near(
          evaluate(chunked(c.chunk), x, type, true), expected,
          [&](const std::string&) { return type == at::kFloat ? 5e-6 : 5e-3; },
          c.name() + (type == at::kFloat ? " float32" : " bfloat16"));
    }
  }
}

// Along one random direction of all inputs, the gradient against central differences.
TEST(Ssd, GradientsMatchFiniteDifferences) {
  const MixerCase c{2, 90, 4, 1, 2, 16, 24, 32};
  const MixerTensors x = draw(c, at::kDouble, 3, false);
  EXPECT_LE(directional_error(chunked(c.chunk), x, true), 1e-6);
  EXPECT_LE(directional_error(recurrent, x, true), 1e-6);
}

TEST(Ssd, OneOfTheTwoGradientsMayBeMissing) {
  for (const bool from_output : {true, false}) {
    for (const MixerCase& c : {MixerCase{2, 90, 2, 2, 2, 16, 24, 32}, MixerCase{1, 8, 2, 1, 2, 16, 16, 64}}) {
      const MixerTensors x = draw(c, at::kDouble, 4, false);
      expect_near(
          evaluate(chunked(c.chunk), x, at::kDouble, true, from_output, !from_output),
          evaluate(recurrent, x, at::kDouble, true, from_output, !from_output),
          [](const std::string&) { return 1e-9; }, c.name());
    }
  }
}

TEST(Ssd, SkipIsOptional) {
  const MixerCase c{1, 70, 2, 2, 2, 16, 16, 64};
  const MixerTensors x = draw(c, at::kDouble, 5, false);
  const auto without = [](auto function) {
    return [function](const MixerTensors& y) {
      return function(y.query, y.key, y.value, y.log_decay, y.step, std::nullopt, y.spans, y.initial_state,
                      64);
    };
  };
  expect_near(
      evaluate(without(&ssd), x, at::kDouble, false),
      evaluate(without(&ssd_recurrence), x, at::kDouble, false), [](const std::string&) { return 1e-9; },
      c.name());
}

// Any cut with the state handed over gives the whole, for random shapes; short pieces take the step path.
TEST(Ssd, PiecesWithStateAreTheWhole) {
  EXPECT_TRUE(rc::check([] {
    const MixerCase c = any_case();
    const MixerTensors x = draw(c, at::kDouble, 6, false);
    expect_pieces_are_whole(chunked(c.chunk), c, x, *rc::gen::inRange<int64_t>(1, c.time + 1));
  }));
}

TEST(Ssd, RandomShapesMatchTheRecurrence) {
  EXPECT_TRUE(rc::check([] {
    const MixerCase c = any_case();
    const MixerTensors x = draw(c, at::kDouble, 7, false);
    expect_near(
        evaluate(chunked(c.chunk), x, at::kDouble, true), evaluate(recurrent, x, at::kDouble, true),
        [](const std::string&) { return 1e-9; }, c.name());
    RC_ASSERT(!::testing::Test::HasFailure());
  }));
}

TEST(Ssd, RepeatsBitForBitOnAnyNumberOfThreads) {
  const MixerCase c{4, 200, 4, 2, 4, 64, 64, 64};
  const MixerTensors x = draw(c, at::kFloat, 8, false);
  ASSERT_TRUE(at::empty({8}).isnan().all().item<bool>());  // fresh memory is poisoned
  const auto first = evaluate(chunked(c.chunk), x, at::kFloat, true);
  for (const int threads : {1, 2, 3}) {
    at::set_num_threads(threads);
    const auto again = evaluate(chunked(c.chunk), x, at::kFloat, true);
    for (size_t i = 0; i < first.size(); ++i)
      EXPECT_TRUE(first[i].value.equal(again[i].value)) << first[i].name;
  }
  at::set_num_threads(1);
}

TEST(Ssd, EmptySequencesKeepTheState) {
  const MixerCase c{2, 0, 2, 2, 2, 16, 16, 64, Decay::mild, Step::random, Spans::none};
  const MixerTensors x = draw(c, at::kDouble, 9, false);
  const auto [output, state] = chunked(64)(x);
  EXPECT_EQ(output.sizes(), (at::IntArrayRef{0, 2, 16}));
  EXPECT_TRUE(state.equal(*x.initial_state));
}

TEST(Ssd, IsRegisteredWithTheDispatcher) {
  const MixerTensors x = draw({1, 20, 2, 2, 2, 16, 16, 64}, at::kDouble, 10, false);
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("oryx::ssd", "").typed<decltype(ssd)>();
  const auto [output, state] =
      op.call(x.query, x.key, x.value, x.log_decay, x.step, x.skip, x.spans, x.initial_state, 64);
  const auto [expected, expected_state] = recurrent(x);
  EXPECT_LE(relative_error(output, expected), 1e-10);
  EXPECT_LE(relative_error(state, expected_state), 1e-10);
}

TEST(Ssd, RefusesWrongArguments) {
  const MixerTensors x =
      draw({1, 20, 2, 2, 2, 16, 16, 64, Decay::mild, Step::random, Spans::all}, at::kDouble, 11, false);
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
  refuses(y, "[ssd] expected query [-1, -1, 8], got");
  y = x, y.step = x.step.to(at::kFloat);
  refuses(y, "expected step of type Double, got Float");
  y = x, y.spans = at::tensor({0, 0, 21}, at::kLong).view({1, 3});
  refuses(y, "within 1 sequences of 20 tokens, got (0, 0, 21)");
  y = x, y.spans = at::tensor({0, 0, 3}, at::kLong).view({1, 3}), y.query = x.query.narrow(0, 0, 2);
  refuses(y, "a row for each of the 3 tokens");
  y = x, y.skip = x.skip.narrow(0, 0, 1);
  refuses(y, "expected skip [2], got [1]");
}

}  // namespace
}  // namespace oryx::operators::testing
