#include "training/checkpoint.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <fmt/ranges.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "formats/file.h"
#include "formats/json.h"
#include "formats/safetensors.h"

namespace oryx::training {

namespace fs = std::filesystem;

namespace {

constexpr int64_t kFormatVersion = 1;
constexpr std::string_view kStepPrefix = "step-";
constexpr std::string_view kPartialSuffix = ".partial";  // of formats::AtomicDirectory

Value integer(int64_t number) { return {number, {}}; }

int64_t integer_at(const Table& table, std::string_view key, const std::string& file) {
  const Value* value = table.find(key);
  expect(value != nullptr && value->as<int64_t>() != nullptr, "{}: expected an integer {}", file, key);
  return *value->as<int64_t>();
}

// The step of a directory name, −1 for any other name.
int64_t step_of(const std::string& name) {
  if (!name.starts_with(kStepPrefix)) return -1;
  const std::string digits = name.substr(kStepPrefix.size());
  const bool numeric = !digits.empty() && digits.size() < 19 &&
                       std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; });
  return numeric ? std::stoll(digits) : -1;
}

void sync_directory(const fs::path& directory) {
  const int descriptor = open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  expect(descriptor >= 0, "cannot open {}: {}", directory.string(), std::strerror(errno));
  const bool synced = fsync(descriptor) == 0;
  const int reason = errno;
  close(descriptor);
  expect(synced, "cannot sync {}: {}", directory.string(), std::strerror(reason));
}

}  // namespace

RunDirectory::RunDirectory(fs::path path) : path_(std::move(path)) {
  std::error_code failure;
  fs::create_directories(path_ / "checkpoints", failure);
  expect(!failure, "cannot make the run directory {}: {}", path_.string(), failure.message());
  const fs::path lock = path_ / "lock";
  lock_ = open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  expect(lock_ >= 0, "cannot open {}: {}", lock.string(), std::strerror(errno));
  const bool locked = flock(lock_, LOCK_EX | LOCK_NB) == 0;
  const int reason = errno;
  // The file may have been removed, with a run that saved nothing, between open and flock.
  struct stat held, named;
  const bool same =
      fstat(lock_, &held) == 0 && stat(lock.c_str(), &named) == 0 && held.st_ino == named.st_ino;
  if (!locked || !same) {
    close(lock_);
    expect(!same || reason == EWOULDBLOCK, "cannot lock {}: {}", lock.string(), std::strerror(reason));
    fail("another process is training in {}", path_.string());
  }
  for (const fs::directory_entry& entry : fs::directory_iterator(path_ / "checkpoints")) {
    if (entry.path().filename().string().ends_with(kPartialSuffix)) fs::remove_all(entry.path());
  }
}

RunDirectory::~RunDirectory() {
  std::error_code ignored;
  if (fs::remove(path_ / "checkpoints", ignored)) {  // only when empty: nothing was ever saved
    fs::remove(path_ / "lock", ignored);
    fs::remove(path_, ignored);
  }
  close(lock_);
}

std::optional<fs::path> RunDirectory::latest() const {
  const fs::path link = path_ / "latest";
  if (!fs::is_symlink(fs::symlink_status(link))) return std::nullopt;
  const fs::path checkpoint = path_ / fs::read_symlink(link);
  expect(fs::is_directory(checkpoint), "{} points to {}, which does not exist", link.string(),
         checkpoint.string());
  return checkpoint;
}

fs::path RunDirectory::checkpoint_path(int64_t step) const {
  return path_ / "checkpoints" / fmt::format("{}{:08}", kStepPrefix, step);
}

void RunDirectory::save(const TrainingState& state, const model::ModelConfig& config,
                        const model::Weights& weights, const formats::NamedTensors& moments,
                        const fs::path& tokenizer_file, int64_t keep) const {
  const fs::path checkpoint = checkpoint_path(state.step);
  formats::AtomicDirectory directory(checkpoint);
  model::save_model(directory.path(), config, weights, tokenizer_file);

  formats::NamedTensors on_host;
  for (const auto& [name, tensor] : moments) on_host.emplace_back(name, tensor.cpu());
  formats::write_safetensors((directory.path() / "optimizer.safetensors").string(), on_host);

  Table data, root;
  data.set("tokens", integer(state.data.tokens));
  data.set("crc32c", integer(state.data.crc32c));
  root.set("format_version", integer(kFormatVersion));
  root.set("step", integer(state.step));
  root.set("data_position", integer(state.data_position));
  root.set("data", {data, {}});
  root.set("recipe", {state.recipe, {}});
  formats::write_file_atomic((directory.path() / "training.json").string(), formats::to_json(root, 2) + "\n");

  // A checkpoint of this step can be there already: complete, but killed before `latest` pointed to it.
  directory.publish(/*replace=*/true);
  point_latest_to(checkpoint);
  prune(state.step, keep);
}

void RunDirectory::point_latest_to(const fs::path& checkpoint) const {
  const fs::path link = path_ / "latest", aside = path_ / "latest.new";
  std::error_code failure;
  fs::remove(aside, failure);
  fs::create_directory_symlink(checkpoint.lexically_relative(path_), aside, failure);
  if (!failure) fs::rename(aside, link, failure);
  expect(!failure, "cannot make {}: {}", link.string(), failure.message());
  sync_directory(path_);
}

void RunDirectory::prune(int64_t step, int64_t keep) const {
  std::vector<std::pair<int64_t, fs::path>> older;
  for (const fs::directory_entry& entry : fs::directory_iterator(path_ / "checkpoints")) {
    const int64_t its_step = step_of(entry.path().filename().string());
    if (its_step >= 0 && its_step <= step) older.emplace_back(its_step, entry.path());
  }
  std::sort(older.rbegin(), older.rend());
  for (size_t i = static_cast<size_t>(keep); i < older.size(); ++i) {
    // Under the name of a leftover first: what a kill leaves of it is removed at the next start.
    fs::path doomed = older[i].second;
    doomed += kPartialSuffix;
    fs::rename(older[i].second, doomed);
    fs::remove_all(doomed);
  }
}

TrainingState load_state(const fs::path& checkpoint) {
  const std::string file = (checkpoint / "training.json").string();
  const Table root = formats::read_json(file);
  const int64_t version = integer_at(root, "format_version", file);
  expect(version == kFormatVersion, "{}: format_version {} is not known: this program reads {}", file,
         version, kFormatVersion);
  TrainingState state;
  state.step = integer_at(root, "step", file);
  state.data_position = integer_at(root, "data_position", file);
  state.data.tokens = integer_at(section(root, "data"), "tokens", file);
  state.data.crc32c = static_cast<uint32_t>(integer_at(section(root, "data"), "crc32c", file));
  state.recipe = section(root, "recipe");
  return state;
}

void load_moments(const fs::path& checkpoint, const formats::NamedTensors& moments) {
  const fs::path file = checkpoint / "optimizer.safetensors";
  const formats::TensorFiles stored = formats::TensorFiles::open(file.string());
  for (const auto& [name, tensor] : moments) {
    expect(stored.contains(name), "{}: tensor {} is missing", file.string(), name);
    const at::Tensor moment = stored.tensor(name);
    expect(moment.sizes() == tensor.sizes() && moment.scalar_type() == tensor.scalar_type(),
           "{}: expected {} [{}] {}, got [{}] {}", file.string(), name, fmt::join(tensor.sizes(), ", "),
           c10::toString(tensor.scalar_type()), fmt::join(moment.sizes(), ", "),
           c10::toString(moment.scalar_type()));
    tensor.copy_(moment);
  }
}

}  // namespace oryx::training
