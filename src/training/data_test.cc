#include "training/data.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <numeric>
#include <set>

#include "base/error.h"

namespace oryx::training {
namespace {

namespace fs = std::filesystem;

class DataTest : public testing::Test {
 protected:
  DataTest() : root_(fs::path(testing::TempDir()) / "data_test") { fs::remove_all(root_); }
  ~DataTest() override { fs::remove_all(root_); }

  // Tokens first, first + 1, … in shards of five.
  std::string shards(const std::string& name, int32_t first, int32_t count, int64_t vocabulary = 100,
                     const std::string& tokenizer = "bytes") {
    fs::create_directories(root_ / name);
    formats::TokenShardWriter writer(root_ / name, {tokenizer, vocabulary, 5});
    std::vector<int32_t> tokens(count);
    std::iota(tokens.begin(), tokens.end(), first);
    writer.append(tokens);
    writer.end_document();
    writer.finish();
    return (root_ / name).string();
  }

  template <class Action>
  std::string error_of(const Action& action) {
    try {
      action();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }

  fs::path root_;
};

std::vector<int64_t> values(const at::Tensor& tensor) {
  const at::Tensor flat = tensor.contiguous();
  return {flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel()};
}

TEST_F(DataTest, SequencesShareTheirBorderTokens) {
  const SequenceSource source({shards("a", 0, 13), shards("b", 13, 5)}, 4, 100, "data.train");
  EXPECT_EQ(source.tokens(), 18);
  EXPECT_EQ(source.count(), 4);  // the tail of one token is not used
  EXPECT_EQ(values(source.read({0, 3})), (std::vector<int64_t>{0, 1, 2, 3, 4, 12, 13, 14, 15, 16}));
  EXPECT_EQ(SequenceSource({root_ / "b"}, 4, 100, "data.train").count(), 1);
}

TEST_F(DataTest, Refusals) {
  const std::string data = shards("a", 0, 8);
  const auto make = [&](const std::vector<std::string>& paths, int64_t length, int64_t vocabulary) {
    return error_of([&] { SequenceSource(paths, length, vocabulary, "data.train"); });
  };
  EXPECT_NE(make({data}, 8, 100).find("data.train holds 8 tokens: expected at least 9"), std::string::npos);
  EXPECT_NE(make({data}, 4, 99).find("model.vocabulary = 99"), std::string::npos);
  EXPECT_NE(make({"/nowhere"}, 4, 99).find("/nowhere"), std::string::npos);
  EXPECT_EQ(make({data}, 7, 100), "no error");
}

TEST_F(DataTest, TokenizerFileLiesBesideTheShards) {
  EXPECT_EQ(SequenceSource({shards("a", 0, 8)}, 4, 100, "data.train").tokenizer_file(), fs::path());
  const SequenceSource source({shards("b", 0, 8, 100, "0123abcd")}, 4, 100, "data.train");
  EXPECT_NE(error_of([&] { source.tokenizer_file(); }).find("tokenizer.json"), std::string::npos);
  fs::copy_file(root_ / "a" / "tokens-00000.safetensors", root_ / "b" / "tokenizer.json");
  EXPECT_EQ(source.tokenizer_file(), root_ / "b" / "tokenizer.json");
}

TEST_F(DataTest, IdentityKnowsTheTokensNotThePlace) {
  const auto identity = [](const std::string& path) {
    return SequenceSource({path}, 4, 100, "data.train").identity();
  };
  EXPECT_EQ(identity(shards("a", 0, 13)), identity(shards("b", 0, 13)));
  EXPECT_NE(identity(root_ / "a"), identity(shards("c", 1, 13)));
  EXPECT_NE(identity(root_ / "a"), identity(shards("d", 0, 14)));
}

TEST(DataOrder, SequentialStartsAgain) {
  EXPECT_EQ(sequence_at(10, 11, false, 1), 10);
  EXPECT_EQ(sequence_at(11, 11, false, 1), 0);
}

TEST(DataOrder, EveryPassIsAnotherPermutation) {
  constexpr int64_t kCount = 37;
  std::vector<std::vector<int64_t>> passes(3);
  for (int64_t pass = 0; pass < 3; ++pass) {
    for (int64_t i = 0; i < kCount; ++i)
      passes[pass].push_back(sequence_at(pass * kCount + i, kCount, true, 5));
    EXPECT_EQ(std::set(passes[pass].begin(), passes[pass].end()).size(), size_t{kCount});
    EXPECT_EQ(*std::max_element(passes[pass].begin(), passes[pass].end()), kCount - 1);
  }
  EXPECT_NE(passes[0], passes[1]);
  EXPECT_NE(passes[1], passes[2]);
  EXPECT_NE(sequence_at(0, kCount, true, 5) + kCount * sequence_at(1, kCount, true, 5),
            sequence_at(0, kCount, true, 6) + kCount * sequence_at(1, kCount, true, 6));
}

TEST_F(DataTest, LoaderReadsBatchesInOrderFromAnyStart) {
  const SequenceSource source({shards("a", 0, 45)}, 4, 100, "data.train");
  for (const bool shuffled : {false, true}) {
    for (const int64_t first : {0, 3}) {
      BatchLoader loader(source, 2, {0, 2}, shuffled, 9, first, 12);
      for (int64_t batch = first; batch < 12; ++batch) {
        const std::vector<int64_t> expected = {sequence_at(2 * batch, 11, shuffled, 9),
                                               sequence_at(2 * batch + 1, 11, shuffled, 9)};
        EXPECT_EQ(values(loader.next()), values(source.read(expected)));
      }
      EXPECT_THROW(loader.next(), Error);
    }
  }
}

TEST_F(DataTest, LoaderCanBeLeftEarly) {
  const SequenceSource source({shards("a", 0, 45)}, 4, 100, "data.train");
  BatchLoader loader(source, 2, {0, 2}, true, 9, 0, 1'000'000'000);
  loader.next();
}

TEST_F(DataTest, LoaderPassesOnWhatTheThreadThrew) {
  // A shard that lies about its vocabulary: token 7 is not below 5.
  fs::create_directories(root_ / "lying");
  const at::Tensor tokens = at::tensor({0, 1, 2, 3, 4, 0, 7, 0, 1}, at::kInt).to(at::kUInt16);
  formats::write_safetensors((root_ / "lying" / "x.safetensors").string(), {{"tokens", tokens}},
                             {{"tokenizer", "bytes"}, {"documents", "1"}, {"vocabulary", "5"}});
  const SequenceSource source({root_ / "lying"}, 4, 100, "data.train");
  BatchLoader loader(source, 1, {0, 1}, false, 0, 0, 2);
  EXPECT_EQ(values(loader.next()), (std::vector<int64_t>{0, 1, 2, 3, 4}));
  const std::string message = error_of([&] { loader.next(); });
  EXPECT_NE(message.find("x.safetensors: token 7 at position 6"), std::string::npos) << message;
}

}  // namespace
}  // namespace oryx::training
