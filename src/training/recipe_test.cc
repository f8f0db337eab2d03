#include "training/recipe.h"

#include <gtest/gtest.h>

#include <fstream>

#include "base/error.h"
#include "formats/toml.h"
#include "schedule/schedule.h"

namespace oryx::training {
namespace {

constexpr const char* kRecipe = R"(
[model]
mixers = ["attention", "ssd"]
layers = 2
width = 64
heads = 2
mlp_width = 128
vocabulary = 300
[data]
train = ["somewhere"]
sequence_length = 64
[training]
steps = 10
batch_tokens = 256
[run]
directory = "run"
)";

Recipe read(const std::vector<std::string>& overrides = {}, const std::string& text = kRecipe) {
  Table root = formats::parse_toml(text, "recipe.toml");
  formats::apply_overrides(root, overrides);
  return read_recipe(root, "recipe.toml");
}

std::string error_of(const std::vector<std::string>& overrides) {
  try {
    read(overrides);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

testing::AssertionResult mentions(const std::string& text, const std::vector<std::string>& fragments) {
  for (const std::string& fragment : fragments) {
    if (text.find(fragment) == std::string::npos) {
      return testing::AssertionFailure() << '"' << text << "\" lacks \"" << fragment << '"';
    }
  }
  return testing::AssertionSuccess();
}

TEST(Recipe, DefaultsAreThePapersRecipe) {
  const Recipe recipe = read();
  EXPECT_EQ(recipe.schedule.attention_probability, 0.25);
  EXPECT_EQ(recipe.schedule.chunk, 128);
  EXPECT_EQ(recipe.training.beta1, 0.9);
  EXPECT_EQ(recipe.training.beta2, 0.95);
  EXPECT_EQ(recipe.training.weight_decay, 0.1);
  EXPECT_EQ(recipe.training.warmup_fraction, 0.1);
  EXPECT_EQ(recipe.training.minimum_learning_rate, 1e-5);
  EXPECT_EQ(recipe.training.clip, 1.0);
  EXPECT_EQ(recipe.data.order, "shuffled");
  EXPECT_EQ(recipe.training.micro_batch, 4);  // the whole batch is smaller than the usual 8192 tokens
}

TEST(Recipe, DurationIsStepsOrTokens) {
  EXPECT_EQ(read().steps(), 10);
  const std::string in_tokens = [] {
    std::string text = kRecipe;
    return text.replace(text.find("steps = 10"), 10, "tokens = 1000");
  }();
  EXPECT_EQ(read({}, in_tokens).steps(), 3);
  // The command line counts more than the recipe, either way round.
  EXPECT_EQ(read({"training.tokens=512"}).steps(), 2);
  EXPECT_EQ(read({"training.steps=7"}, in_tokens).steps(), 7);
  EXPECT_TRUE(mentions(error_of({"training.tokens=512", "training.steps=3"}), {"only one"}));
  EXPECT_TRUE(mentions(error_of({"training.tokens=255"}), {"training.tokens", "255", "256"}));
}

TEST(Recipe, ARecipeOverridesItsBasesDuration) {
  const std::string folder = testing::TempDir();
  std::ofstream(folder + "/base.toml") << kRecipe;
  std::ofstream(folder + "/derived.toml") << "base = \"base.toml\"\n[training]\ntokens = 1024\n";
  const std::string file = folder + "/derived.toml";
  EXPECT_EQ(read_recipe(formats::read_recipe(file), file).steps(), 4);
}

TEST(Recipe, ErrorsNameKeyValueAndExpectation) {
  const std::vector<std::pair<std::string, std::vector<std::string>>> cases = {
      {"training.batch_tokens=100", {"training.batch_tokens", "100", "64"}},
      {"training.warmup_fraction=1.5", {"training.warmup_fraction", "1.5", "0 … 1"}},
      {"training.beta2=1", {"training.beta2", "1"}},
      {"training.learning_rate=0", {"training.learning_rate", "0"}},
      {"training.clip=-1", {"training.clip", "-1"}},
      {"training.steps=-1", {"training.steps", "-1"}},
      {"training.checkpoints_to_keep=0", {"training.checkpoints_to_keep", "0"}},
      {"training.dtype=float16", {"training.dtype", "float16", "bfloat16"}},
      {"training.learning_rat=1", {"training.learning_rat", "training.learning_rate"}},
      {"data.order=random", {"data.order", "random", "sequential"}},
      {"data.train=[]", {"data.train"}},
      {"data.sequence_length=0", {"data.sequence_length", "0"}},
      {"schedule.attention_probability=2", {"schedule.attention_probability", "2"}},
      {"schedule.chunk=0", {"schedule.chunk", "0"}},
      {"schedule.fixed=linear,attention@9,linear@9", {"schedule.fixed", "9"}},
      {"run.directory=", {"run.directory"}},
      {"trainin.steps=3", {"trainin", "training"}},
  };
  for (const auto& [override, fragments] : cases) {
    if (override == "run.directory=") continue;  // the override itself is ill-formed
    EXPECT_TRUE(mentions(error_of({override}), fragments)) << override;
  }
}

TEST(Recipe, FixedScheduleMustSuitTheMixers) {
  EXPECT_TRUE(mentions(error_of({"model.mixers=[\"attention\"]", "schedule.fixed=attention,linear@8"}),
                       {"schedule.fixed", "linear", "attention"}));
  EXPECT_EQ(error_of({"model.mixers=[\"attention\"]", "schedule.fixed=attention"}), "no error");
}

TEST(Recipe, SpansOfATrainingSequence) {
  using schedule::Mode;
  const Recipe drawn = read({"schedule.chunk=16", "schedule.attention_probability=0.5"});
  bool differs = false;
  int64_t attention = 0;
  for (int64_t i = 0; i < 64; ++i) {
    const schedule::ModeSpans spans = drawn.training_spans(3, i);
    EXPECT_EQ(spans, drawn.training_spans(3, i));
    EXPECT_EQ(schedule::total_tokens(spans), 64);
    differs |= spans != drawn.training_spans(4, i);
    attention += schedule::attention_tokens(spans);
  }
  EXPECT_TRUE(differs);
  EXPECT_NEAR(attention / (64.0 * 64), 0.5, 0.1);

  const Recipe whole = read({"schedule.per=sequence", "schedule.attention_probability=0.5"});
  for (int64_t i = 0; i < 8; ++i) EXPECT_EQ(whole.training_spans(0, i).size(), 1u);

  const Recipe fixed = read({"schedule.fixed=linear,attention@-8"});
  EXPECT_EQ(fixed.training_spans(5, 5),
            (schedule::ModeSpans{{0, 56, Mode::linear}, {56, 64, Mode::attention}}));

  // A model of one mixer has one mode, whatever the draws say.
  const Recipe baseline = read({"model.mixers=[\"ssd\"]"});
  EXPECT_EQ(baseline.training_spans(0, 0), (schedule::ModeSpans{{0, 64, Mode::linear}}));
}

TEST(Recipe, DifferencesThatMatter) {
  const Table stored = read().to_table();
  const auto difference = [&](const std::vector<std::string>& overrides) {
    return first_difference(stored, read(overrides).to_table());
  };
  EXPECT_FALSE(difference({}));
  EXPECT_FALSE(
      difference({"training.validation_every=3", "training.checkpoint_every=9", "run.directory=other",
                  "run.device=cpu", "data.validation=[\"x\"]", "training.checkpoints_to_keep=5"}));
  EXPECT_FALSE(difference({"training.tokens=2560"}));  // as many steps as before
  const auto rate = difference({"training.learning_rate=0.001"});
  ASSERT_TRUE(rate);
  EXPECT_EQ(rate->key, "training.learning_rate");
  EXPECT_EQ(rate->stored, "0.003");
  EXPECT_EQ(rate->wanted, "0.001");
  EXPECT_EQ(difference({"training.steps=11"})->key, "training.steps");
  EXPECT_EQ(difference({"run.seed=1"})->key, "run.seed");
  EXPECT_EQ(difference({"model.attention.query_activation=silu"})->key, "model.attention.query_activation");
  EXPECT_EQ(difference({"training.micro_batch=1"})->key, "training.micro_batch");  // not bit for bit the same
}

}  // namespace
}  // namespace oryx::training
