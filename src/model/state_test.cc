// The laws of the joint state, each as a property of random models, schedules and cuts.
#include "model/state.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <memory>

#include "base/error.h"
#include "model/testing.h"

namespace oryx::model {
namespace {

using schedule::Mode;
using schedule::ModeSpans;
using testing::random_config;
using testing::random_model;
using testing::random_spans;
using testing::random_tokens;
using testing::relative_error;
using testing::small_config;

struct Case {
  ModelConfig config;
  at::ScalarType dtype;
  std::shared_ptr<const LanguageModel> model;
  int64_t batch, time;
  at::Tensor tokens;
  std::vector<ModeSpans> spans;
};

Case random_case(bool wide, int64_t longest = 150) {
  const ModelConfig config = random_config();
  const at::ScalarType dtype = wide ? at::kDouble : at::kFloat;
  const uint64_t seed = *rc::gen::arbitrary<uint32_t>();
  const int64_t batch = *rc::gen::inRange<int64_t>(1, 4), time = *rc::gen::inRange<int64_t>(1, longest);
  std::vector<ModeSpans> spans;
  for (int64_t b = 0; b < batch; ++b) spans.push_back(random_spans(config, time));
  const auto model = std::make_shared<const LanguageModel>(random_model(config, dtype, seed));
  return {config, dtype, model, batch, time, random_tokens(config, batch, time, seed), spans};
}

double tolerance(at::ScalarType dtype) { return dtype == at::kDouble ? 1e-10 : 2e-3; }

at::Tensor whole(const Case& c) {
  return c.model->logits(c.model->hidden(c.tokens, c.spans)).view({c.batch, c.time, -1});
}

at::Tensor in_pieces(const Case& c, const std::vector<int64_t>& cuts, JointState& state) {
  std::vector<at::Tensor> pieces;
  int64_t begin = state.position();
  for (const int64_t end : cuts) {
    const at::Tensor tokens = c.tokens.narrow(1, begin, end - begin);
    pieces.push_back(
        c.model->logits(c.model->hidden(tokens, c.spans, &state)).view({c.batch, end - begin, -1}));
    begin = end;
  }
  return at::cat(pieces, 1);
}

std::vector<int64_t> random_cuts(int64_t time) {
  std::vector<int64_t> cuts;
  for (int64_t end = 0; end < time;)
    cuts.push_back(end = std::min(time, end + *rc::gen::inRange<int64_t>(1, 60)));
  return cuts;
}

void check_pieces(bool wide) {
  c10::NoGradGuard no_gradient;
  const Case c = random_case(wide);
  JointState state = c.model->empty_state(c.batch);
  RC_ASSERT(relative_error(in_pieces(c, random_cuts(c.time), state), whole(c)) <= tolerance(c.dtype));
  RC_ASSERT(state.position() == c.time);
  RC_ASSERT(state.modes() == c.spans);
}

RC_GTEST_PROP(JointState, PiecesEqualTheWholeInFloat64, ()) { check_pieces(true); }
RC_GTEST_PROP(JointState, PiecesEqualTheWholeInFloat32, ()) { check_pieces(false); }

RC_GTEST_PROP(JointState, TokenByTokenEqualsTheWhole, ()) {
  c10::NoGradGuard no_gradient;
  const Case c = random_case(true, 60);
  std::vector<int64_t> cuts;
  for (int64_t t = 1; t <= c.time; ++t) cuts.push_back(t);
  JointState state = c.model->empty_state(c.batch);
  RC_ASSERT(relative_error(in_pieces(c, cuts, state), whole(c)) <= tolerance(c.dtype));
}

RC_GTEST_PROP(JointState, OutputsIgnoreLaterTokensAndNeighbours, ()) {
  c10::NoGradGuard no_gradient;
  Case c = random_case(true);
  const at::Tensor before = whole(c);
  const int64_t cut = *rc::gen::inRange<int64_t>(0, c.time);
  const int64_t row = *rc::gen::inRange<int64_t>(0, c.batch);

  // Later tokens and their modes change.
  Case later = c;
  later.tokens = c.tokens.clone();
  later.tokens.narrow(1, cut, c.time - cut).copy_(random_tokens(c.config, c.batch, c.time - cut, 99));
  for (ModeSpans& spans : later.spans) {
    if (cut == 0) continue;
    ModeSpans changed = schedule::cut(spans, 0, cut);
    for (const schedule::ModeSpan& span : random_spans(c.config, c.time)) {
      if (span.end > cut) changed.push_back({std::max(cut, span.begin), span.end, span.mode});
    }
    spans = schedule::merge(changed);
  }
  if (cut > 0) RC_ASSERT(relative_error(whole(later).narrow(1, 0, cut), before.narrow(1, 0, cut)) <= 1e-10);

  // The sequence alone.
  Case alone = c;
  alone.batch = 1;
  alone.tokens = c.tokens.narrow(0, row, 1);
  alone.spans = {c.spans[row]};
  RC_ASSERT(relative_error(whole(alone)[0], before[row]) <= 1e-10);

  // The batch in reverse.
  Case reversed = c;
  reversed.tokens = c.tokens.flip(0);
  std::reverse(reversed.spans.begin(), reversed.spans.end());
  RC_ASSERT(relative_error(whole(reversed).flip(0), before) <= 1e-10);
}

RC_GTEST_PROP(JointState, CopiesAreIndependentAndRollBack, ()) {
  c10::NoGradGuard no_gradient;
  Case c = random_case(true);
  RC_PRE(c.time >= 3);
  const int64_t cut = *rc::gen::inRange<int64_t>(1, c.time - 1);
  JointState state = c.model->empty_state(c.batch);
  in_pieces(c, {cut}, state);
  const JointState snapshot = state.clone();

  // Draft other tokens on the state, then go back to the snapshot.
  Case draft = c;
  draft.tokens = random_tokens(c.config, c.batch, c.time, 7);
  in_pieces(draft, {c.time}, state);
  JointState restored = snapshot.clone();
  const at::Tensor expected = whole(c).narrow(1, cut, c.time - cut);
  RC_ASSERT(relative_error(in_pieces(c, {c.time}, restored), expected) <= 1e-10);
  RC_ASSERT(snapshot.position() == cut);

  // One sequence of it alone, and twice.
  const int64_t row = *rc::gen::inRange<int64_t>(0, c.batch);
  JointState twice = snapshot.select(at::tensor({row, row}, at::kLong));
  Case pair = c;
  pair.batch = 2;
  pair.tokens = c.tokens.narrow(0, row, 1).expand({2, c.time});
  pair.spans = {c.spans[row], c.spans[row]};
  const at::Tensor both = in_pieces(pair, {c.time}, twice);
  RC_ASSERT(relative_error(both[0], expected[row]) <= 1e-10);
  RC_ASSERT(relative_error(both[1], expected[row]) <= 1e-10);
}

std::filesystem::path temporary(const std::string& name) {
  return std::filesystem::temp_directory_path() / fmt::format("oryx_state_test_{}_{}", getpid(), name);
}

// Sequences of several lengths in one piece, then the rest of each from its own position.
RC_GTEST_PROP(JointState, PaddingEntersNoState, ()) {
  c10::NoGradGuard no_gradient;
  const Case c = random_case(true, 60);
  RC_PRE(c.time >= 2);
  std::vector<int64_t> first, rest;
  for (int64_t b = 0; b < c.batch; ++b) {
    first.push_back(*rc::gen::inRange<int64_t>(1, c.time));
    rest.push_back(*rc::gen::inRange<int64_t>(1, c.time - first[b] + 1));
  }
  const auto width = [](const std::vector<int64_t>& lengths) {
    return *std::max_element(lengths.begin(), lengths.end());
  };
  at::Tensor later = random_tokens(c.config, c.batch, width(rest), 11);  // padding is any token
  for (int64_t b = 0; b < c.batch; ++b) {
    later[b].narrow(0, 0, rest[b]).copy_(c.tokens[b].narrow(0, first[b], rest[b]));
  }
  JointState state = c.model->empty_state(c.batch);
  c.model->hidden(c.tokens.narrow(1, 0, width(first)), c.spans, &state, first);
  RC_ASSERT(state.positions() == first);

  const bool is_last = *rc::gen::arbitrary<bool>();
  const at::Tensor rows = at::arange(c.batch);
  JointState copy = state.select(rows, *rc::gen::inRange<int64_t>(0, 2) * width(rest));
  const at::Tensor hidden = is_last ? c.model->last_hidden(later, c.spans, copy, rest)
                                    : c.model->hidden(later, c.spans, &copy, rest);
  const at::Tensor got = c.model->logits(hidden).view({c.batch, width(rest), -1}), wanted = whole(c);
  for (int64_t b = 0; b < c.batch; ++b) {
    RC_ASSERT(relative_error(got[b].narrow(0, 0, rest[b]), wanted[b].narrow(0, first[b], rest[b])) <= 1e-10);
    RC_ASSERT(copy.positions()[b] == first[b] + (is_last ? 0 : rest[b]));
    if (!is_last) RC_ASSERT(copy.modes()[b] == schedule::cut(c.spans[b], 0, first[b] + rest[b]));
  }

  // Each sequence alone goes on from its state as from one without padding.
  const int64_t row = *rc::gen::inRange<int64_t>(0, c.batch);
  Case alone = c;
  alone.batch = 1;
  alone.tokens = c.tokens.narrow(0, row, 1);
  alone.spans = {c.spans[row]};
  JointState own = state.select(at::tensor({row}, at::kLong));
  const at::Tensor expected = wanted.narrow(0, row, 1).narrow(1, first[row], c.time - first[row]);
  RC_ASSERT(relative_error(in_pieces(alone, {c.time}, own), expected) <= 1e-10);
}

// A state for one mode goes on with it as a whole one does, and says so where it cannot.
RC_GTEST_PROP(JointState, KeepsWhatTheNextModesRead, ()) {
  c10::NoGradGuard no_gradient;
  Case c = random_case(true, 60);
  RC_PRE(c.time >= 2);
  const int64_t cut = *rc::gen::inRange<int64_t>(1, c.time);
  const Mode mode =
      c.config.has_mode(Mode::attention) && (!c.config.has_mode(Mode::linear) || *rc::gen::arbitrary<bool>())
          ? Mode::attention
          : Mode::linear;
  for (ModeSpans& spans : c.spans) {
    spans = schedule::cut(spans, 0, cut);
    spans.push_back({cut, c.time, mode});
    spans = schedule::merge(spans);
  }
  const NextModes next{.attention = mode == Mode::attention, .linear = mode == Mode::linear};
  JointState state = c.model->empty_state(c.batch, next), all = c.model->empty_state(c.batch);
  RC_ASSERT(relative_error(in_pieces(c, {cut, c.time}, state), whole(c)) <= 1e-10);
  in_pieces(c, {cut, c.time}, all);
  RC_ASSERT((state.bytes() < all.bytes()) == c.config.is_switchable());

  if (!c.config.is_switchable()) return;
  const ModeSpans other = {{0, c.time + 1, mode == Mode::attention ? Mode::linear : Mode::attention}};
  RC_ASSERT_THROWS_AS(c.model->hidden(c.tokens.narrow(1, 0, 1), {other}, &state), Error);
  RC_ASSERT_THROWS_AS(state.save(temporary("part.safetensors"), c.config), Error);
}

RC_GTEST_PROP(JointState, SavedStatesContinue, ()) {
  c10::NoGradGuard no_gradient;
  const Case c = random_case(*rc::gen::arbitrary<bool>());
  RC_PRE(c.time >= 2);
  const int64_t cut = *rc::gen::inRange<int64_t>(1, c.time);
  JointState state = c.model->empty_state(c.batch);
  in_pieces(c, {cut}, state);
  const std::filesystem::path file = temporary("saved.safetensors");
  state.save(file, c.config);
  JointState loaded = JointState::load(file, c.config, c.dtype, at::kCPU);
  std::filesystem::remove(file);
  RC_ASSERT(loaded.position() == cut);
  RC_ASSERT(loaded.modes() == state.modes());
  RC_ASSERT(in_pieces(c, {c.time}, loaded).equal(in_pieces(c, {c.time}, state)));
}

TEST(JointState, KeysOfUpperLayersDependOnTheModesOfEarlierTokens) {
  c10::NoGradGuard no_gradient;
  ModelConfig config = small_config("ssd", 2);
  const LanguageModel model = random_model(config, at::kDouble, 3);
  const at::Tensor tokens = random_tokens(config, 1, 12, 5);
  JointState attention = model.empty_state(1), linear = model.empty_state(1);
  model.hidden(tokens, {{{0, 12, Mode::attention}}}, &attention);
  model.hidden(tokens, {{{0, 6, Mode::linear}, {6, 12, Mode::attention}}}, &linear);
  EXPECT_TRUE(attention.layers()[0].key_cache.equal(linear.layers()[0].key_cache));
  EXPECT_FALSE(attention.layers()[1].key_cache.allclose(linear.layers()[1].key_cache));
  EXPECT_NE(attention.modes(), linear.modes());
}

TEST(JointState, RecurrentStateIsFloat32AtLeastInMemoryAndInFiles) {
  c10::NoGradGuard no_gradient;
  for (const std::string linear : {"ssd", "gated_delta"}) {
    ModelConfig config = small_config(linear, 1);
    for (const auto& [dtype, wide] : {std::pair(at::kBFloat16, at::kFloat), std::pair(at::kFloat, at::kFloat),
                                      std::pair(at::kDouble, at::kDouble)}) {
      const LanguageModel model(config, initial_weights(config, 1, at::kFloat), dtype);
      const LanguageModel wide_model(config, initial_weights(config, 1, at::kDouble), dtype);
      const LanguageModel& used = dtype == at::kDouble ? wide_model : model;
      JointState state = used.empty_state(1);
      used.hidden(random_tokens(config, 1, 5, 1), {{{0, 5, Mode::linear}}}, &state);
      EXPECT_EQ(state.layers()[0].recurrent.scalar_type(), wide);
      EXPECT_EQ(state.layers()[0].key_cache.scalar_type(), dtype);
      const std::filesystem::path file = temporary("dtype.safetensors");
      state.save(file, config);
      const JointState loaded = JointState::load(file, config, dtype, at::kCPU);
      std::filesystem::remove(file);
      EXPECT_TRUE(loaded.layers()[0].recurrent.equal(state.layers()[0].recurrent));
    }
  }
}

TEST(JointState, RejectsAFileOfAnotherModel) {
  ModelConfig config = small_config("ssd", 1);
  const JointState state = JointState::empty(config, 1, at::kFloat, at::kCPU);
  const std::filesystem::path file = temporary("other.safetensors");
  state.save(file, config);
  ModelConfig other = config;
  other.layers = 2;
  EXPECT_THROW(JointState::load(file, other, at::kFloat, at::kCPU), Error);
  other = config;
  other.head_dim = other.value_dim = 4;
  EXPECT_THROW(JointState::load(file, other, at::kFloat, at::kCPU), Error);
  std::filesystem::remove(file);
}

}  // namespace
}  // namespace oryx::model
