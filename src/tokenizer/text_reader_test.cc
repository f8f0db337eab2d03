#include "tokenizer/text_reader.h"

#include <gtest/gtest.h>
#include <lzma.h>
#include <zlib.h>
#include <zstd.h>

#include "base/error.h"
#include "tokenizer/test_tokenizer.h"
#include "tokenizer/tokenizer.h"

namespace oryx::tokenizer {
namespace {

using Documents = std::vector<std::string>;

Documents read(const std::vector<std::string>& paths, size_t piece_bytes = SIZE_MAX,
               TextReader::Cut cut = {}) {
  TextReader reader(find_text_files(paths), piece_bytes, std::move(cut));
  Documents documents;
  bool open = false;
  for (TextPiece piece; reader.next(piece); open = !piece.ends_document) {
    if (!open) documents.emplace_back();
    documents.back() += piece.bytes;
  }
  EXPECT_FALSE(open);
  return documents;
}

std::string error_of(const std::vector<std::string>& paths) {
  try {
    read(paths);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

std::string gzip(const std::string& text) {
  z_stream stream{};
  deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY);
  std::string out(deflateBound(&stream, text.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  deflate(&stream, Z_FINISH);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

std::string xz(const std::string& text) {
  std::string out(lzma_stream_buffer_bound(text.size()), '\0');
  size_t size = 0;
  lzma_easy_buffer_encode(1, LZMA_CHECK_CRC64, nullptr, reinterpret_cast<const uint8_t*>(text.data()),
                          text.size(), reinterpret_cast<uint8_t*>(out.data()), &size, out.size());
  out.resize(size);
  return out;
}

std::string zstd(const std::string& text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  ZSTD_CCtx* context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);  // as the zstd program does
  out.resize(ZSTD_compress2(context, out.data(), out.size(), text.data(), text.size()));
  ZSTD_freeCCtx(context);
  return out;
}

TEST(TextReader, ALineThatIsExactlyTheMarkEndsADocument) {
  const TestFolder folder;
  const auto documents = [&](std::string_view content) { return read({folder.write("a.txt", content)}); };
  EXPECT_EQ(documents("one\ntwo\n<|endoftext|>\nthree"), (Documents{"one\ntwo\n", "three"}));
  EXPECT_EQ(documents("one\n<|endoftext|>\ntwo\n<|endoftext|>"), (Documents{"one\n", "two\n"}));
  EXPECT_EQ(documents("<|endoftext|>\n<|endoftext|>\n\n<|endoftext|>\n"), Documents{"\n"});
  EXPECT_EQ(documents(""), Documents{});
  EXPECT_EQ(documents("no mark"), Documents{"no mark"});
  for (const char* text :
       {"a <|endoftext|>\nb", "<|endoftext|> \nb", "<|endoftext|>\r\nb", "<|endoftext|><|endoftext|>\n",
        "a\r<|endoftext|>\nb", "<|endoftext", "\xEF\xBB\xBF<|endoftext|>\nb"}) {
    EXPECT_EQ(documents(text), Documents{text}) << "every byte of it is text";
  }
  // The end of one file ends a document, too.
  EXPECT_EQ(read({folder.write("a.txt", "a"), folder.write("b.txt", "b\n<|endoftext|>\nc")}),
            (Documents{"a", "b\n", "c"}));
}

// Split by hand: at line feeds, then compare lines.
Documents expected_documents(const std::string& content) {
  Documents documents;
  std::string document;
  for (size_t at = 0; at < content.size();) {
    const size_t end = std::min(content.find('\n', at), content.size() - 1) + 1;
    const std::string line = content.substr(at, end - at);
    if (line == "<|endoftext|>\n" || line == "<|endoftext|>") {
      if (!document.empty()) documents.push_back(document);
      document.clear();
    } else {
      document += line;
    }
    at = end;
  }
  if (!document.empty()) documents.push_back(document);
  return documents;
}

TEST(TextReader, AnyContentInPiecesOfAnySize) {
  const TestFolder folder;
  const auto bytes = Tokenizer::load("bytes");
  static const Documents parts = {"<|endoftext|>\n", "\n",    "<|endoftext|>", "\r\n",
                                  "some words ",     "<|end", "\xff"};
  EXPECT_TRUE(rc::check([&] {
    const auto picks = *rc::gen::container<std::vector<size_t>>(rc::gen::inRange<size_t>(0, parts.size()));
    const size_t piece_bytes = *rc::gen::inRange<size_t>(1, 40);
    std::string content;
    for (const size_t pick : picks) content += parts[pick];
    const std::string path = folder.write("a.txt", content);
    RC_ASSERT(read({path}) == expected_documents(content));
    RC_ASSERT(read({path}, piece_bytes, [&](std::string_view text) { return bytes->safe_cut(text); }) ==
              expected_documents(content));
  }));
}

TEST(TextReader, LongDocumentsComeInBoundedPieces) {
  const TestFolder folder;
  const auto tokenizer = Tokenizer::load(folder.write("tokenizer.json", test_tokenizer({{"a", "b"}}).dump()));
  std::string content;
  while (content.size() < 3 << 20) content += "ab ab, line\n";
  const std::string path = folder.write("a.txt", content);
  TextReader reader({path}, 1 << 20, [&](std::string_view text) { return tokenizer->safe_cut(text); });
  std::vector<int32_t> ids;
  size_t pieces = 0;
  for (TextPiece piece; reader.next(piece); ++pieces) {
    EXPECT_LT(piece.bytes.size(), 2u << 20);
    tokenizer->encode_to(piece.bytes, false, ids);
  }
  EXPECT_GE(pieces, 3u);
  EXPECT_EQ(ids, tokenizer->encode(content));
  EXPECT_EQ(reader.file_bytes(), content.size());
}

TEST(TextReader, CompressedFiles) {
  const TestFolder folder;
  std::string content;
  std::mt19937 random(1);
  while (content.size() < 700'000) content += "line " + std::to_string(random()) + "\n";
  content += std::string(5 << 20, 'x');  // expands far beyond any buffer
  const std::string more = "more\n";
  const std::vector<std::pair<std::string, std::function<std::string(const std::string&)>>> formats = {
      {"a.txt.gz", gzip}, {"a.txt.xz", xz}, {"a.txt.zst", zstd}};
  for (const auto& [name, compress] : formats) {
    const std::string whole = compress(content);
    EXPECT_EQ(read({folder.write(name, whole)}), Documents{content}) << name;
    EXPECT_EQ(read({folder.write(name, whole + compress(more))}), Documents{content + more}) << name;
    EXPECT_EQ(read({folder.write(name, compress(""))}), Documents{}) << name;
    const std::string path = folder.file(name);
    for (const size_t size : {size_t{0}, size_t{1}, size_t{9}, whole.size() / 2, whole.size() - 1}) {
      folder.write(name, whole.substr(0, size));
      const std::string message = error_of({path});
      EXPECT_EQ(message.find(path + ": the "), 0u) << message;
      EXPECT_NE(message.find("cut off"), std::string::npos) << size << " " << message;
    }
    std::string broken = whole;
    broken[broken.size() / 2] = static_cast<char>(broken[broken.size() / 2] ^ 0x55);
    folder.write(name, broken);
    EXPECT_NE(error_of({path}).find("is corrupt"), std::string::npos) << error_of({path});
    folder.write(name, "plain text of some length");
    EXPECT_NE(error_of({path}).find("is corrupt"), std::string::npos) << error_of({path});
  }
}

TEST(TextReader, JsonLines) {
  const TestFolder folder;
  const std::string path = folder.write(
      "a.jsonl",
      "{\"text\": \"one\\ntwo\", \"id\": 1}\r\n\n{\"text\": \"\"}\n{\"text\": \"<|endoftext|>\\n\\u00e9\"}");
  EXPECT_EQ(read({path}), (Documents{"one\ntwo", "<|endoftext|>\n\u00e9"}));
  for (const char* bad : {"{\"text\": 3}", "[1]", "{\"txt\": \"a\"}"}) {
    folder.write("a.jsonl", std::string("{\"text\": \"a\"}\n") + bad + "\n");
    EXPECT_EQ(error_of({path}), path + " line 2: expected an object with a string \"text\"");
  }
  for (const char* bad : {"{\"text\": \"a", "nonsense", "{\"text\": \"\xff\"}", "{\"text\": \"\\ud800\"}"}) {
    folder.write("a.jsonl", std::string("\n\n") + bad);
    EXPECT_EQ(error_of({path}).find(path + " line 3: malformed JSON"), 0u) << error_of({path});
  }
}

TEST(TextReader, PathsAreFilesAndDirectories) {
  const TestFolder folder;
  std::filesystem::create_directories(folder.file("d/b"));
  std::filesystem::create_directories(folder.file("empty"));
  folder.write("d/c.txt", "3");
  folder.write("d/a.txt", "1");
  folder.write("d/b/z.jsonl", "{\"text\": \"2\"}");
  folder.write("d/notes.md", "no");
  std::filesystem::create_directory_symlink(folder.file("d"), folder.file("d/loop"));
  EXPECT_EQ(read({folder.file("d")}), (Documents{"1", "2", "3"}));
  EXPECT_EQ(read({folder.file("d/c.txt"), folder.file("d/a.txt")}), (Documents{"3", "1"}));
  EXPECT_EQ(error_of({folder.file("missing")}), "no such file or directory: " + folder.file("missing"));
  EXPECT_NE(error_of({folder.file("empty")}).find("no text files in"), std::string::npos);
  EXPECT_NE(error_of({folder.file("d/notes.md")}).find("is no text file: expected .txt"), std::string::npos);
}

}  // namespace
}  // namespace oryx::tokenizer
