#include "training/checkpoint.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "formats/file.h"
#include "model/weights.h"
#include "training/optimizer.h"

namespace oryx::training {
namespace {

namespace fs = std::filesystem;

class CheckpointTest : public testing::Test {
 protected:
  CheckpointTest()
      : path_(fs::path(testing::TempDir()) / "checkpoint_test" / "run"),
        config_(make_config()),
        weights_(model::initial_weights(config_, 1, at::kFloat)),
        optimizer_(weights_, {}) {
    fs::remove_all(path_.parent_path());
    for (auto& [name, moment] : optimizer_.moments()) moment.uniform_();
  }
  ~CheckpointTest() override { fs::remove_all(path_.parent_path()); }

  static model::ModelConfig make_config() {
    model::ModelConfig config = model::ModelConfig::with_mixers({"attention", "ssd"});
    config.layers = 1;
    config.width = config.head_dim = config.value_dim = 8;
    config.heads = config.kv_heads = config.value_heads = 1;
    config.mlp_width = 8;
    config.vocabulary = 257;
    return config;
  }

  TrainingState state(int64_t step) const {
    TrainingState state;
    state.step = step;
    state.data_position = 4 * step;
    state.data = {1000, 0xFFFFFFFFu};
    Table training;
    training.set("learning_rate", {0.1, {}});
    state.recipe.set("training", {training, {}});
    return state;
  }
  void save(const RunDirectory& run, int64_t step, int64_t keep = 2) {
    run.save(state(step), config_, weights_, optimizer_.moments(), {}, keep);
  }
  std::vector<std::string> checkpoints() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(path_ / "checkpoints"))
      names.push_back(entry.path().filename());
    std::sort(names.begin(), names.end());
    return names;
  }

  const fs::path path_;
  const model::ModelConfig config_;
  model::Weights weights_;
  Optimizer optimizer_;
};

TEST_F(CheckpointTest, HoldsEverything) {
  const RunDirectory run(path_);
  EXPECT_FALSE(run.latest());
  save(run, 3);
  const fs::path checkpoint = *run.latest();
  EXPECT_EQ(fs::read_symlink(path_ / "latest"), "checkpoints/step-00000003");

  const TrainingState loaded = load_state(checkpoint);
  EXPECT_EQ(loaded.step, 3);
  EXPECT_EQ(loaded.data_position, 12);
  EXPECT_EQ(loaded.data, state(3).data);
  EXPECT_EQ(section(loaded.recipe, "training").find("learning_rate")->text(), "0.1");

  const model::Weights weights = model::load_weights(checkpoint, model::load_config(checkpoint), at::kFloat);
  for (const auto& [name, tensor] : weights.entries()) EXPECT_TRUE(tensor.equal(weights_.at(name))) << name;
  Optimizer other(weights_, {});
  load_moments(checkpoint, other.moments());
  for (size_t i = 0; i < other.moments().size(); ++i) {
    EXPECT_TRUE(other.moments()[i].second.equal(optimizer_.moments()[i].second)) << other.moments()[i].first;
  }
}

TEST_F(CheckpointTest, KeepsTheNewest) {
  const RunDirectory run(path_);
  for (const int64_t step : {2, 4, 6, 100'000'000}) save(run, step);
  EXPECT_EQ(checkpoints(), (std::vector<std::string>{"step-00000006", "step-100000000"}));
  EXPECT_EQ(load_state(*run.latest()).step, 100'000'000);
}

TEST_F(CheckpointTest, ReplacesOneThatWasNeverNamedLatest) {
  {
    const RunDirectory run(path_);
    save(run, 2);
    fs::create_directories(path_ / "checkpoints/step-00000004");
    std::ofstream(path_ / "checkpoints/step-00000004/junk") << "x";
    save(run, 4);
    EXPECT_FALSE(fs::exists(*run.latest() / "junk"));
  }
  EXPECT_EQ(checkpoints(), (std::vector<std::string>{"step-00000002", "step-00000004"}));
}

TEST_F(CheckpointTest, AFailedWriteChangesNothing) {
  const RunDirectory run(path_);
  save(run, 2);
  EXPECT_THROW(run.save(state(4), config_, weights_, optimizer_.moments(), "/nowhere/tokenizer.json", 1),
               std::exception);
  EXPECT_EQ(checkpoints(), (std::vector<std::string>{"step-00000002"}));
  EXPECT_EQ(load_state(*run.latest()).step, 2);
}

TEST_F(CheckpointTest, LeftoversGoAtTheNextStart) {
  { save(RunDirectory(path_), 2); }
  fs::create_directories(path_ / "checkpoints/step-00000004.partial");
  const RunDirectory run(path_);
  EXPECT_EQ(checkpoints(), (std::vector<std::string>{"step-00000002"}));
}

TEST_F(CheckpointTest, OneHolderAtATimeAndNoTraceOfAnEmptyRun) {
  {
    const RunDirectory run(path_);
    EXPECT_THROW(RunDirectory{path_}, Error);
  }
  EXPECT_FALSE(fs::exists(path_));
  RunDirectory again(path_);
}

TEST_F(CheckpointTest, MomentsOfAnotherModelAreRefused) {
  const RunDirectory run(path_);
  save(run, 2);
  model::ModelConfig config = config_;
  config.mlp_width = 16;
  model::Weights weights = model::initial_weights(config, 1, at::kFloat);
  Optimizer other(weights, {});
  EXPECT_THROW(load_moments(*run.latest(), other.moments()), Error);
}

}  // namespace
}  // namespace oryx::training
