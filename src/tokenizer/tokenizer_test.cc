#include "tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <functional>
#include <map>

#include "base/error.h"
#include "tokenizer/sha256.h"
#include "tokenizer/test_tokenizer.h"

namespace oryx::tokenizer {
namespace {

using Ids = std::vector<int32_t>;
using nlohmann::json;

std::unique_ptr<const Tokenizer> load(const json& file) {
  const TestFolder folder;
  return Tokenizer::load(folder.write("tokenizer.json", file.dump()));
}

json llama3_form(json file) {
  const json split = {
      {"type", "Split"},
      {"behavior", "Isolated"},
      {"pattern",
       {{"Regex",
         R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|)"
         R"(\s*[\r\n]+|\s+(?!\S)|\s+)"}}}};
  const json byte_level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  file["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", json::array({split, byte_level})}};
  return file;
}

// Byte-pair encoding as it is defined: again and again the leftmost pair of lowest rank.
Ids slow_bpe(const json& file, const std::string& text) {
  std::map<std::pair<std::string, std::string>, size_t> ranks;
  const json& merges = file["model"]["merges"];
  for (size_t rank = 0; rank < merges.size(); ++rank) ranks[{merges[rank][0], merges[rank][1]}] = rank;
  std::vector<std::string> symbols;
  for (const char byte : text) symbols.push_back(byte_symbol(static_cast<uint8_t>(byte)));
  for (;;) {
    size_t best = SIZE_MAX, at = 0;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto found = ranks.find({symbols[i], symbols[i + 1]});
      if (found != ranks.end() && found->second < best) best = found->second, at = i;
    }
    if (best == SIZE_MAX) break;
    symbols[at] += symbols[at + 1];
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
  Ids ids;
  for (const std::string& symbol : symbols) ids.push_back(file["model"]["vocab"][symbol]);
  return ids;
}

TEST(Bpe, EqualsItsDefinitionAtAnyLength) {
  for (const uint32_t seed : {1u, 2u, 3u}) {
    const json file = test_tokenizer(random_merges(seed, 60, "abcd"));
    const auto tokenizer = load(file);
    std::mt19937 random(seed);
    for (int i = 0; i < 300; ++i) {
      std::string word;  // short enough for the cache, for the scan, and long enough for the heap
      const size_t size = 1 + random() % (i < 200 ? 30 : 300);
      while (word.size() < size) word += static_cast<char>('a' + random() % 4);
      ASSERT_EQ(tokenizer->encode(word), slow_bpe(file, word)) << word;
      ASSERT_EQ(tokenizer->encode(word), slow_bpe(file, word)) << word << " from the cache";
    }
  }
}

TEST(Bpe, AMegabyteWithoutSpaces) {
  const auto tokenizer = load(test_tokenizer(random_merges(1, 60, "ab")));
  std::mt19937 random(1);
  std::string word;
  while (word.size() < 1 << 20) word += static_cast<char>('a' + random() % 2);
  const Ids ids = tokenizer->encode(word);
  EXPECT_LT(ids.size(), word.size() * 3 / 4);
  EXPECT_EQ(tokenizer->decode(ids), word);
}

bool cuts_character(std::string_view text, size_t position) {
  for (size_t at = 0; at < position;) {
    at += decode_character(text.data() + at, text.data() + text.size()).size;
    if (at > position) return true;
  }
  return false;
}

TEST(Tokenizer, AnyBytesComeBackExactly) {
  const json file = test_tokenizer(random_merges(4, 200, "ab 'sl\n\xc3\xa9"));
  std::vector<std::unique_ptr<const Tokenizer>> tokenizers;
  tokenizers.push_back(load(file));
  tokenizers.push_back(load(llama3_form(file)));
  tokenizers.push_back(Tokenizer::load("bytes"));
  for (const auto& tokenizer : tokenizers) {
    EXPECT_TRUE(rc::check([&] {
      const std::string text = *rc::gen::oneOf(hard_text(), rc::gen::arbitrary<std::string>());
      for (const bool allow_special : {true, false}) {
        const Ids ids = tokenizer->encode(text, allow_special);
        RC_ASSERT(tokenizer->decode(ids) == text);
        StreamDecoder stream(*tokenizer);
        std::string streamed;
        for (const int32_t id : ids) {
          streamed += stream.push(id);
          RC_ASSERT(!cuts_character(text, streamed.size()));
        }
        RC_ASSERT(streamed + stream.finish() == text);
      }
    }));
  }
}

TEST(Tokenizer, CutsChangeNothing) {
  const json file = test_tokenizer(random_merges(4, 200, "ab 'sl\n\xc3\xa9"));
  std::vector<std::unique_ptr<const Tokenizer>> tokenizers;
  tokenizers.push_back(load(file));
  tokenizers.push_back(load(llama3_form(file)));
  tokenizers.push_back(Tokenizer::load("bytes"));
  json normalizing = llama3_form(file);
  normalizing["normalizer"] = {{"type", "NFC"}};
  tokenizers.push_back(load(normalizing));
  for (const auto& tokenizer : tokenizers) {
    size_t cuts = 0;
    EXPECT_TRUE(rc::check([&] {
      const std::string text = *hard_text(), rest = *hard_text();
      const size_t cut = tokenizer->safe_cut(text);
      RC_ASSERT(cut <= text.size());
      cuts += cut > 0;
      Ids ids = tokenizer->encode(text.substr(0, cut));
      tokenizer->encode_to(text.substr(cut) + rest, true, ids);
      RC_ASSERT(ids == tokenizer->encode(text + rest));
    }));
    // Neither property is empty: random texts have cuts (about a third of them do), and plain words always.
    EXPECT_GT(cuts, 0u);
    EXPECT_GT(tokenizer->safe_cut("some words here"), 0u);
  }
  json stripping = file;
  stripping["added_tokens"][0]["rstrip"] = true;
  EXPECT_EQ(load(stripping)->safe_cut("some words here"), 0u);
}

TEST(Tokenizer, SpecialTokens) {
  json file = test_tokenizer({{"h", "i"}});
  file["added_tokens"].push_back({{"id", 300}, {"content", "<l>"}, {"lstrip", true}});
  file["added_tokens"].push_back({{"id", 301}, {"content", "<l><r>"}, {"rstrip", true}});
  const auto tokenizer = load(file);
  EXPECT_EQ(tokenizer->vocabulary_size(), 302);
  EXPECT_EQ(tokenizer->end_of_text(), 257);
  EXPECT_TRUE(tokenizer->is_special(257));
  EXPECT_FALSE(tokenizer->is_special(300));
  EXPECT_EQ(tokenizer->encode("hi<|endoftext|>hi"), (Ids{256, 257, 256}));
  EXPECT_EQ(tokenizer->encode("hi<|endoftext|>hi", false).size(), 15u);
  EXPECT_EQ(tokenizer->encode("hi \u3000<l>hi<l><r>\n hi"), (Ids{256, 300, 256, 301, 256}));
  EXPECT_EQ(tokenizer->find("<|endoftext|>"), 257);
  EXPECT_EQ(tokenizer->find("hi"), 256);
  EXPECT_EQ(tokenizer->find("ho"), std::nullopt);
  EXPECT_EQ(tokenizer->token_bytes(256), "hi");
  EXPECT_THROW(tokenizer->token_bytes(299), Error);  // an id without a token
  EXPECT_THROW(tokenizer->decode(Ids{302}), Error);
  EXPECT_THROW(tokenizer->decode(Ids{-1}), Error);
}

TEST(Tokenizer, OptionsOfTheFile) {
  json file = test_tokenizer({{"a", "b"}, {"b", "c"}, {"ab", "c"}});
  EXPECT_EQ(load(file)->encode("abc"), Ids{258});
  file["model"]["merges"] = json::array({"a b", "b c"});
  EXPECT_EQ(load(file)->encode("abc"), (Ids{256, 'c'}));
  file["model"]["ignore_merges"] = true;
  EXPECT_EQ(load(file)->encode("abc"), Ids{258});
  file["pre_tokenizer"]["add_prefix_space"] = true;
  EXPECT_EQ(load(file)->encode("c"), (Ids{' ', 'c'}));
  EXPECT_EQ(load(file)->encode(" c"), (Ids{' ', 'c'}));
  file["normalizer"] = {{"type", "NFC"}};
  file["pre_tokenizer"]["add_prefix_space"] = false;
  EXPECT_EQ(load(file)->encode("e\u0301"), load(file)->encode("\u00e9"));
  file["pre_tokenizer"] = {{"type", "Sequence"},
                           {"pretokenizers",
                            {{{"type", "Split"}, {"behavior", "Isolated"}, {"pattern", {{"String", ".\\E"}}}},
                             {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"use_regex", false}}}}};
  EXPECT_EQ(load(file)->encode("b.\\Ec"), (Ids{' ', 'b', ' ', '.', '\\', 'E', ' ', 'c'}));
}

TEST(Tokenizer, ThreadsChangeNothing) {
  const auto tokenizer = load(test_tokenizer(random_merges(5, 300, "abcde ")));
  std::mt19937 random(5);
  std::vector<std::string> texts(200);
  for (std::string& text : texts) {
    while (random() % 100 != 0) text += "abcde \n"[random() % 7];
  }
  const std::vector<std::string_view> views(texts.begin(), texts.end());
  const auto ids = tokenizer->encode_all(views, true, 4);
  for (size_t i = 0; i < texts.size(); ++i) EXPECT_EQ(ids[i], tokenizer->encode(texts[i]));
}

TEST(Tokenizer, Bytes) {
  const auto tokenizer = Tokenizer::load("bytes");
  EXPECT_EQ(tokenizer->encode(std::string_view("\0a\xff", 3)), (Ids{0, 'a', 255}));
  EXPECT_EQ(tokenizer->encode("a<|endoftext|>"), (Ids{'a', 256}));
  EXPECT_EQ(tokenizer->encode("<|endoftext|>", false).size(), 13u);
  EXPECT_EQ(tokenizer->vocabulary_size(), 257);
  EXPECT_EQ(tokenizer->end_of_text(), 256);
  EXPECT_EQ(tokenizer->identity(), "bytes");
  EXPECT_EQ(tokenizer->find("a"), 'a');
  EXPECT_THROW(tokenizer->decode(Ids{257}), Error);
}

TEST(Tokenizer, IdentityIsTheHashOfTheFile) {
  EXPECT_EQ(sha256_hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sha256_hex(std::string(1'000'000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  const json file = test_tokenizer();
  EXPECT_EQ(load(file)->identity(), sha256_hex(file.dump()));
}

TEST(Tokenizer, BadFilesAreNamed) {
  const auto change = [](const std::function<void(json&)>& edit) {
    json file = test_tokenizer({{"h", "i"}});
    edit(file);
    return file.dump();
  };
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "malformed tokenizer.json"},
      {"{\"model\": ", "malformed tokenizer.json"},
      {"[]", "expected an object with a \"model\""},
      {"{}", "expected an object with a \"model\""},
      {R"({"model": 3})", "malformed tokenizer.json"},
      {change([](json& f) { f["model"]["type"] = "WordPiece"; }),
       "model type \"WordPiece\" is not supported"},
      {change([](json& f) { f["model"]["dropout"] = 0.1; }), "model.dropout 0.1 is not supported"},
      {change([](json& f) { f["model"]["end_of_word_suffix"] = "</w>"; }),
       "end_of_word_suffix is not supported"},
      {change([](json& f) { f["model"]["vocab"].erase("h"); }), "no token for byte 0x68"},
      {change([](json& f) { f["model"]["vocab"]["h"] = -1; }), "token 'h' has the id -1"},
      {change([](json& f) { f["model"]["vocab"]["h"] = 1e9; }), "token 'h' has the id"},
      {change([](json& f) { f["model"]["vocab"]["h"] = int64_t{1} << 40; }), "token 'h' has the id"},
      {change([](json& f) { f["model"]["vocab"]["h"] = "x"; }), "token 'h' has the id \"x\""},
      {change([](json& f) { f["model"]["vocab"]["h"] = int{'i'}; }), "have the same id 105"},
      {change([](json& f) { f["model"]["vocab"].erase("hi"); }), "no token 'hi'"},
      {change([](json& f) { f["model"]["merges"] = json::array({"a b c"}); }),
       "merge \"a b c\" is malformed"},
      {change([](json& f) {
         f["model"]["merges"] = json::array({json::array({"a", "b", "c"})});
       }),
       "is malformed: expected two strings"},
      {change([](json& f) {
         f["model"]["merges"] = json::array({json::array({"a", "\u4e2d"})});
       }),
       "is not of byte-level symbols"},
      {change([](json& f) {
         f["normalizer"] = {{"type", "Lowercase"}};
       }),
       "normalizer type 'Lowercase'"},
      {change([](json& f) {
         f["pre_tokenizer"] = {{"type", "Metaspace"}};
       }),
       "pre-tokenizer type 'Metaspace'"},
      {change([](json& f) { f["pre_tokenizer"] = nullptr; }), "there is no pre-tokenizer"},
      {change([](json& f) {
         f["decoder"] = {{"type", "Fuse"}};
       }),
       "decoder type 'Fuse'"},
      {change([](json& f) { f["added_tokens"][0]["single_word"] = true; }),
       "single_word, which is not supported"},
      {change([](json& f) { f["added_tokens"][0]["id"] = 3; }), "have the same id 3"},
      {change([](json& f) { f["added_tokens"][0]["content"] = "hi"; }), "token 'hi' has the ids"},
  };
  const TestFolder folder;
  for (const auto& [content, message] : cases) {
    const std::string path = folder.write("tokenizer.json", content);
    try {
      Tokenizer::load(path);
      ADD_FAILURE() << "expected an Error with: " << message;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(message), std::string::npos)
          << error.what() << "\nnot: " << message;
      EXPECT_EQ(std::string(error.what()).find(path), 0u) << error.what();
    }
  }
  EXPECT_THROW(Tokenizer::load(folder.file("missing.json")), Error);
  json no_end = test_tokenizer();
  no_end["added_tokens"] = json::array();
  EXPECT_THROW(load(no_end)->end_of_text(), Error);
}

}  // namespace
}  // namespace oryx::tokenizer
