// Whole runs by a process group of one rank: what several ranks do, beside what a process on its own does.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "formats/safetensors.h"
#include "formats/toml.h"
#include "training/ranks_testing.h"
#include "training/trainer.h"

namespace oryx::training {
namespace {

namespace fs = std::filesystem;

constexpr const char* kRecipe = R"(
[model]
mixers = ["attention", "gated_delta"]
layers = 2
width = 32
heads = 2
mlp_width = 64
vocabulary = 257
[data]
train = ["data"]
validation = ["data"]
sequence_length = 64
[schedule]
chunk = 16
[training]
steps = 6
batch_tokens = 256
micro_batch = 2
validation_every = 3
checkpoint_every = 2
[run]
directory = "run"
)";

class TrainerRanks : public testing::TestWithParam<c10::Device> {
 protected:
  TrainerRanks() : path_(fs::path(testing::TempDir()) / "trainer_ranks_test") {
    fs::remove_all(path_);
    fs::create_directories(path_ / "data");
    const at::Tensor tokens = (at::arange(3000).pow(2) % 97).to(at::kUInt16);
    formats::write_safetensors((path_ / "data" / "shard-00000.safetensors").string(), {{"tokens", tokens}},
                               {{"tokenizer", "bytes"}, {"documents", "1"}, {"vocabulary", "257"}});
    std::ofstream(path_ / "recipe.toml") << kRecipe;
  }
  ~TrainerRanks() override { fs::remove_all(path_); }

  Recipe recipe(const std::string& directory, const std::string& dtype, bool sharded) const {
    const std::string file = (path_ / "recipe.toml").string();
    Recipe recipe = read_recipe(formats::read_recipe(file), file);
    recipe.data.train = recipe.data.validation = {(path_ / "data").string()};
    recipe.run.directory = (path_ / directory).string();
    recipe.training.dtype = dtype;
    recipe.training.shard_optimizer = sharded;
    return recipe;
  }

  const fs::path path_;
  const std::atomic<bool> stop_{false};
};

TEST_P(TrainerRanks, AGroupOfOneTrainsAsAProcessOnItsOwn) {
  const c10::Device device = GetParam();
  if (device.is_cuda() && !at::hasCUDA()) GTEST_SKIP() << "no GPU here";
  for (const std::string dtype : {"float32", "bfloat16"}) {
    const Outcome alone = train(recipe("alone-" + dtype, dtype, false), device, stop_);
    for (const bool sharded : {false, true}) {
      const Recipe chosen = recipe((sharded ? "sharded-" : "group-") + dtype, dtype, sharded);
      Outcome outcome;
      // Stopped after the first step and gone on with, so that weights and moments go to a file and back.
      const std::atomic<bool> stop_at_once{true};
      Recipe beginning = chosen;
      beginning.data.validation.clear();  // or it would stop in the validation before
      testing_with_ranks(
          1, device, [&](ProcessGroup& group) { outcome = train(beginning, device, stop_at_once, &group); });
      EXPECT_EQ(outcome.steps, 1);
      testing_with_ranks(1, device,
                         [&](ProcessGroup& group) { outcome = train(chosen, device, stop_, &group); });
      EXPECT_EQ(outcome.steps, 6);
      for (const char* file : {"model.safetensors", "optimizer.safetensors"}) {
        const auto ours = formats::TensorFiles::open((outcome.model / file).string());
        const auto theirs = formats::TensorFiles::open((alone.model / file).string());
        ASSERT_EQ(ours.names(), theirs.names());
        for (const std::string& name : theirs.names()) {
          const at::Tensor a = ours.tensor(name), b = theirs.tensor(name);
          EXPECT_EQ(a.scalar_type(), at::kFloat) << name;
          if (device.is_cpu()) {
            EXPECT_TRUE(a.equal(b)) << dtype << ' ' << file << ": " << name;
          } else {
            EXPECT_LE((a - b).norm().item<double>(), 1e-3 * b.norm().item<double>() + 1e-9) << name;
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Gloo, TrainerRanks, testing::Values(c10::Device(c10::kCPU)));
INSTANTIATE_TEST_SUITE_P(Nccl, TrainerRanks, testing::Values(c10::Device(c10::kCUDA, 0)));

}  // namespace
}  // namespace oryx::training
