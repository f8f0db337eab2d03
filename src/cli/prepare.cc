// oryx prepare: text files, or a synthetic task, to token shards.
#include <fmt/ranges.h>

#include <filesystem>
#include <future>
#include <memory>
#include <thread>

#include "base/error.h"
#include "base/progress.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/prepare_recall.h"
#include "formats/file.h"
#include "formats/json.h"
#include "formats/token_shards.h"
#include "tokenizer/text_reader.h"
#include "tokenizer/tokenizer.h"

namespace oryx::cli {

namespace {

namespace fs = std::filesystem;
using tokenizer::TextPiece;
using tokenizer::TextReader;
using tokenizer::Tokenizer;

// Text is read ahead by one batch while the one before is encoded: memory holds two batches and their ids.
constexpr size_t kPieceBytes = size_t{4} << 20;
constexpr size_t kBatchBytesPerThread = size_t{4} << 20;

struct Options {
  std::string tokenizer, output, task;
  RecallOptions recall;
  std::vector<std::string> files;
  int64_t shard_tokens = formats::TokenShardOptions{}.tokens_per_shard;
  int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  uint64_t seed = 0;
  bool json = false;
};

struct Totals {
  int64_t documents = 0, tokens = 0, bytes = 0, shards = 0;
};

void expect_free(const std::string& output) {
  std::error_code ignored;
  if (!fs::exists(fs::symlink_status(output, ignored))) return;
  expect(fs::is_directory(output), "output {} exists and is no directory", output);
  expect(fs::is_empty(output), "output directory {} is not empty: remove it or name another", output);
}

std::vector<TextPiece> read_batch(TextReader& reader, size_t bytes) {
  std::vector<TextPiece> batch;
  size_t size = 0;
  for (TextPiece piece; size < bytes && reader.next(piece);) {
    size += piece.bytes.size();
    batch.push_back(std::move(piece));
  }
  return batch;
}

// Sizes of the files, 0 when one is no regular file and the whole is not known.
int64_t total_size(const std::vector<std::string>& files) {
  int64_t total = 0;
  for (const std::string& file : files) {
    std::error_code error;
    if (!fs::is_regular_file(file, error)) return 0;
    total += static_cast<int64_t>(fs::file_size(file, error));
  }
  return total;
}

void encode_batch(const std::vector<TextPiece>& batch, const Tokenizer& tokenizer, int threads,
                  formats::TokenShardWriter& writer, Totals& totals) {
  std::vector<std::string_view> texts;
  for (const TextPiece& piece : batch) {
    texts.push_back(piece.bytes);
    totals.bytes += static_cast<int64_t>(piece.bytes.size());
  }
  // Inside a document the text of a special token is text: only a line of its own is a mark.
  const std::vector<std::vector<int32_t>> ids = tokenizer.encode_all(texts, /*allow_special=*/false, threads);
  const int32_t end_of_text = tokenizer.end_of_text();
  for (size_t i = 0; i < batch.size(); ++i) {
    writer.append(ids[i]);
    if (!batch[i].ends_document) continue;
    writer.append({&end_of_text, 1});
    writer.end_document();
  }
}

Totals write_shards(const Options& options, const std::vector<std::string>& files, const Tokenizer& tokenizer,
                    const fs::path& directory) {
  formats::TokenShardWriter writer(directory,
                                   {tokenizer.identity(), tokenizer.vocabulary_size(), options.shard_tokens});
  TextReader reader(files, kPieceBytes, [&](std::string_view text) { return tokenizer.safe_cut(text); });
  const auto read = [&, bytes = kBatchBytesPerThread * static_cast<size_t>(options.threads)] {
    return read_batch(reader, bytes);
  };
  ProgressBar bar(total_size(files), "prepare", ProgressOptions{.unit = "B"});
  Totals totals;
  std::vector<TextPiece> batch = read();
  while (!batch.empty()) {
    std::future<std::vector<TextPiece>> next = std::async(std::launch::async, read);
    encode_batch(batch, tokenizer, options.threads, writer, totals);
    bar.set(static_cast<int64_t>(reader.file_bytes()));
    batch = next.get();
    if (interrupted()) throw Interrupted{};
  }
  expect(totals.bytes > 0, "no text in {}", fmt::join(options.files, ", "));
  writer.finish();
  totals.documents = writer.documents();
  totals.tokens = writer.tokens();
  return totals;
}

void prepare(const Options& options) {
  if (options.shard_tokens < 1) fail_usage("shard-tokens is {}: expected at least 1", options.shard_tokens);
  if (options.threads < 1) fail_usage("threads is {}: expected at least 1", options.threads);
  const std::unique_ptr<const Tokenizer> tokenizer = Tokenizer::load(options.tokenizer);
  tokenizer->end_of_text();  // a tokenizer without one fails before any text is read
  if (options.task.empty() == options.files.empty()) {
    fail_usage("expected {}", options.task.empty() ? "text files, or --task" : "no text files beside --task");
  }
  const std::vector<std::string> files =
      options.files.empty() ? options.files : tokenizer::find_text_files(options.files);
  const fs::path output = fs::absolute(options.output).lexically_normal();
  const fs::path directory_name = output.has_filename() ? output : output.parent_path();
  std::error_code ignored;
  fs::create_directories(directory_name.parent_path(), ignored);
  expect_parent_directory(directory_name.string());
  expect_free(options.output);

  watch_for_interrupt();
  formats::AtomicDirectory directory(output);
  Totals totals;
  if (options.task.empty()) {
    totals = write_shards(options, files, *tokenizer, directory.path());
  } else {
    totals.documents = options.recall.sequences;
    totals.tokens =
        write_recall_shards(options.recall, *tokenizer, options.seed, options.shard_tokens, directory.path());
  }
  totals.shards = std::distance(fs::directory_iterator(directory.path()), fs::directory_iterator{});
  if (tokenizer->identity() != "bytes") {
    formats::write_file_atomic((directory.path() / "tokenizer.json").string(),
                               formats::read_file(options.tokenizer));
  }
  directory.publish();

  const double bytes_per_token = static_cast<double>(totals.bytes) / static_cast<double>(totals.tokens);
  if (options.json) {
    Table table;
    table.set("output", Value{options.output});
    table.set("documents", Value{totals.documents});
    table.set("tokens", Value{totals.tokens});
    table.set("bytes", Value{totals.bytes});
    table.set("bytes_per_token", Value{bytes_per_token});
    table.set("shards", Value{totals.shards});
    table.set("tokenizer", Value{tokenizer->identity()});
    table.set("vocabulary", Value{int64_t{tokenizer->vocabulary_size()}});
    fmt::print("{}\n", formats::to_json(table));
  } else {
    const std::string density =
        options.task.empty() ? fmt::format("{:.3f} bytes a token, ", bytes_per_token) : "";
    fmt::print("{}: {} documents, {} tokens, {}{} shard{}\n", options.output, totals.documents, totals.tokens,
               density, totals.shards, totals.shards == 1 ? "" : "s");
  }
}

}  // namespace

void add_prepare(CLI::App& app) {
  CLI::App* command = app.add_subcommand("prepare", "Text files to token shards");
  const auto options = std::make_shared<Options>();
  command->add_option("--tokenizer", options->tokenizer, "a tokenizer.json, or the word bytes")->required();
  command->add_option("--output", options->output, "directory for the shards and tokenizer.json")->required();
  command->add_option(
      "files", options->files,
      ".txt files (a line <|endoftext|> ends a document), .jsonl files (one \"text\" a line), plain or "
      "with .gz, .xz or .zst; directories of them; - for standard input");
  command->add_option("--task", options->task, "make the sequences of a task instead: mqar")
      ->check(CLI::IsMember({"mqar"}));
  command->add_option("--length", options->recall.length, "mqar: tokens of a sequence")
      ->capture_default_str();
  command->add_option("--pairs", options->recall.pairs, "mqar: pairs of keys and values, in turn")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--sequences", options->recall.sequences, "mqar: how many")->capture_default_str();
  command->add_option("--shard-tokens", options->shard_tokens, "tokens of a shard")->capture_default_str();
  command->add_option("--threads", options->threads, "threads that encode")->capture_default_str();
  command->add_option("--seed", options->seed, "of --task; nothing else is drawn");
  command->add_flag("--json", options->json, "machine-readable");
  command->callback([options] { prepare(*options); });
}

}  // namespace oryx::cli
