#include "formats/token_shards.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <functional>
#include <numeric>

#include "base/error.h"
#include "formats/file.h"
#include "formats/temporary_directory.h"

namespace oryx::formats {
namespace {

std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

void write(const std::filesystem::path& directory, const std::vector<std::vector<int32_t>>& documents,
           TokenShardOptions options) {
  TokenShardWriter writer(directory, std::move(options));
  for (const auto& document : documents) {
    writer.append(document);
    writer.end_document();
  }
  writer.finish();
}

TEST(TokenShards, AnyPiecesReadBackAsOneSequence) {
  EXPECT_TRUE(rc::check([] {
    TemporaryDirectory directory;
    const bool wide = *rc::gen::arbitrary<bool>();
    const int32_t vocabulary = wide ? 100000 : *rc::gen::element(300, 65536);
    const auto any_document =
        rc::gen::nonEmpty(rc::gen::container<std::vector<int32_t>>(rc::gen::inRange<int32_t>(0, vocabulary)));
    const auto documents =
        *rc::gen::nonEmpty(rc::gen::container<std::vector<std::vector<int32_t>>>(any_document));
    const int64_t shard = *rc::gen::inRange<int64_t>(20, 200);
    write(directory.path(), documents, {"bytes", vocabulary, shard});
    std::vector<int64_t> whole;
    for (const auto& document : documents) whole.insert(whole.end(), document.begin(), document.end());

    const TokenShards shards(directory.path());
    RC_ASSERT(shards.size() == static_cast<int64_t>(whole.size()));
    RC_ASSERT(shards.documents() == static_cast<int64_t>(documents.size()));
    RC_ASSERT(shards.vocabulary() == vocabulary);
    RC_ASSERT(shards.tokenizer() == "bytes");
    RC_ASSERT(directory.entries() == (whole.size() + shard - 1) / shard);
    shards.validate();
    const int64_t begin = *rc::gen::inRange<int64_t>(0, shards.size() + 1);
    const int64_t count = *rc::gen::inRange<int64_t>(0, shards.size() - begin + 1);
    std::vector<int64_t> piece(count);
    shards.copy(begin, count, piece.data());
    RC_ASSERT(std::equal(piece.begin(), piece.end(), whole.begin() + begin));
    RC_ASSERT_THROWS_AS(shards.copy(begin, shards.size() - begin + 1, nullptr), Error);
    const SafetensorsFile file(directory.file("tokens-00000.safetensors"));
    RC_ASSERT(file.info("tokens").dtype == (wide ? at::kUInt32 : at::kUInt16));
  }));
}

TEST(TokenShards, SeveralDirectoriesFollowEachOther) {
  TemporaryDirectory first, second;
  write(first.path(), {{1, 2, 3}}, {"bytes", 257});
  write(second.path(), {{4}, {5}}, {"bytes", 257});
  write_file_atomic(first.file("tokenizer.json"), "{}");
  const TokenShards shards({second.path().string(), first.path().string()});
  std::vector<int64_t> tokens(5);
  shards.copy(0, 5, tokens.data());
  EXPECT_EQ(tokens, (std::vector<int64_t>{4, 5, 1, 2, 3}));
  EXPECT_EQ(shards.documents(), 3);
  EXPECT_EQ(TokenShards(first.file("tokens-00000.safetensors")).size(), 3);
  EXPECT_THROW(shards.copy(-1, 1, tokens.data()), Error);
}

TEST(TokenShards, ErrorsNameTheShard) {
  TemporaryDirectory directory;
  EXPECT_NE(error_of([&] { TokenShards shards(directory.path()); }).find("holds no token shards"),
            std::string::npos);
  EXPECT_NE(error_of([&] { TokenShards shards(directory.file("no")); }).find("no such directory"),
            std::string::npos);
  EXPECT_NE(error_of([&] { TokenShards shards(std::vector<std::string>{}); }), "no error");

  const std::string path = directory.file("a.safetensors");
  const at::Tensor tokens = at::tensor({5, 70, 6}, at::kInt).to(at::kUInt16);
  const Metadata good = {{"tokenizer", "bytes"}, {"documents", "1"}, {"vocabulary", "70"}};
  const auto expect_error = [&](const at::Tensor& tensor, const Metadata& metadata, const char* part) {
    write_safetensors(path, {{"tokens", tensor}}, metadata);
    const std::string error = error_of([&] { TokenShards(directory.path()).validate(); });
    EXPECT_NE(error.find(part), std::string::npos) << error;
    EXPECT_NE(error.find(directory.path().string()), std::string::npos) << error;
  };
  expect_error(tokens, good, "token 70 at position 1 is not below the vocabulary 70");
  expect_error(tokens.slice(0, 0, 0), good, "holds no tokens");
  expect_error(at::zeros({3}, at::kLong), good, "uint16 or uint32");
  expect_error(tokens.reshape({1, 3}), good, "[n]");
  for (const char* key : {"tokenizer", "documents", "vocabulary"}) {
    Metadata lacking = good;
    lacking.erase(key);
    expect_error(tokens, lacking, key);
  }
  expect_error(tokens, {{"tokenizer", "bytes"}, {"documents", "x"}, {"vocabulary", "70"}},
               "expected a count");
  expect_error(tokens, {{"tokenizer", "bytes"}, {"documents", "1"}, {"vocabulary", "0"}},
               "expected a vocabulary");

  write_safetensors(directory.file("b.safetensors"), {{"tokens", tokens}},
                    {{"tokenizer", "other"}, {"documents", "1"}, {"vocabulary", "70"}});
  expect_error(tokens, good, "tokenizer other is not that of");
  write_safetensors(directory.file("b.safetensors"), {{"tokens", tokens}},
                    {{"tokenizer", "bytes"}, {"documents", "1"}, {"vocabulary", "71"}});
  expect_error(tokens, good, "vocabulary 71 is not that of");
}

TEST(TokenShardWriter, RefusesAndCleansUp) {
  TemporaryDirectory directory;
  {
    TokenShardWriter writer(directory.path(), {"bytes", 10, 2});
    const std::vector<int32_t> tokens = {1, 2, 3, 4, 5};
    writer.append(tokens);
    EXPECT_GT(directory.entries(), 1u);
    EXPECT_THROW(writer.append(std::vector<int32_t>{10}), Error);
    EXPECT_THROW(writer.append(std::vector<int32_t>{-1}), Error);
  }
  EXPECT_EQ(directory.entries(), 0u);
  {
    TokenShardWriter writer(directory.path(), {"bytes", 10});
    EXPECT_THROW(writer.end_document(), Error);
    EXPECT_NE(error_of([&] { writer.finish(); }).find("expected text"), std::string::npos);
  }
  EXPECT_EQ(directory.entries(), 0u);
  EXPECT_THROW(TokenShardWriter(directory.file("no"), {"bytes", 10}), Error);
  EXPECT_THROW(TokenShardWriter(directory.path(), {"bytes", 0}), Error);
  EXPECT_THROW(TokenShardWriter(directory.path(), {"bytes", 10, 0}), Error);
  EXPECT_THROW(
      TokenShardWriter(directory.path(), {std::string(600, 'x'), 10}).append(std::vector<int32_t>{1}), Error);
  write(directory.path(), {{1}}, {"bytes", 10});
  EXPECT_NE(error_of([&] {
              TokenShardWriter(directory.path(), {"bytes", 10});
            }).find("already"),
            std::string::npos);
}

}  // namespace
}  // namespace oryx::formats
