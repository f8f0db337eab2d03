// Lets Python compare this room with the `tokenizers` package (compare_with_package.py,
// benchmarks/tokenizer.py).
//
//   tokenizer_probe encode TOKENIZER allow|plain   documents on stdin -> ids on stdout
//   tokenizer_probe nfc                            documents on stdin -> documents on stdout
//   tokenizer_probe time TOKENIZER THREADS RUNS    documents on stdin -> "tokens seconds" of the best run
//
// Documents are a uint32 length and as many bytes each; ids are a uint32 count and as many int32 each.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "base/error.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/unicode.h"

namespace {

using oryx::tokenizer::Tokenizer;

std::vector<std::string_view> read_documents(const std::string& input) {
  std::vector<std::string_view> documents;
  for (size_t at = 0; at < input.size();) {
    uint32_t size = 0;
    std::memcpy(&size, input.data() + at, sizeof(size));
    documents.emplace_back(input.data() + at + sizeof(size), size);
    at += sizeof(size) + size;
  }
  return documents;
}

template <typename Items>
void write_items(const Items& items) {
  const uint32_t count = static_cast<uint32_t>(items.size());
  std::fwrite(&count, sizeof(count), 1, stdout);
  if (count > 0) std::fwrite(items.data(), sizeof(*items.data()), items.size(), stdout);
}

int run(const std::vector<std::string>& arguments) {
  const std::string input{std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
  const std::vector<std::string_view> documents = read_documents(input);
  const std::string& what = arguments.at(0);
  if (what == "nfc") {
    std::string storage;
    for (const std::string_view document : documents) {
      write_items(oryx::tokenizer::normalize_nfc(document, storage));
    }
    return 0;
  }
  const auto tokenizer = Tokenizer::load(arguments.at(1));
  if (what == "encode") {
    for (const std::string_view document : documents) {
      const std::vector<int32_t> ids = tokenizer->encode(document, arguments.at(2) == "allow");
      write_items(ids);
    }
    return 0;
  }
  const int threads = std::stoi(arguments.at(2)), runs = std::stoi(arguments.at(3));
  double best = 0;
  size_t tokens = 0;
  for (int i = 0; i < runs; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    const auto ids = tokenizer->encode_all(documents, false, threads);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    best = i == 0 ? seconds : std::min(best, seconds);
    tokens = 0;
    for (const auto& document : ids) tokens += document.size();
  }
  std::printf("%zu %.6f\n", tokens, best);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "tokenizer_probe: %s\n", error.what());
    return 1;
  }
}
