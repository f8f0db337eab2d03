// Checkpoints: everything a run needs to go on as if it had never stopped.
//
//   RUN/checkpoints/step-00000100/   a model directory (config.json, model.safetensors, tokenizer.json) with
//     optimizer.safetensors          first_moment.NAME and second_moment.NAME of every parameter
//     training.json                  {"format_version": 1, "step": updates made, "data_position": sequences
//                                     seen, "data": {"tokens": n, "crc32c": …}, "recipe": {…}}
//   RUN/latest                       a symbolic link to the newest: checkpoints/step-00000100
//   RUN/lock                         held by the process that trains here
//
// A checkpoint is written aside as step-00000100.partial, synced, renamed, and only then does `latest`,
// itself replaced by a rename, point to it: whenever the process or the machine stops, `latest` names a
// complete one.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

#include "base/value.h"
#include "formats/safetensors.h"
#include "model/config.h"
#include "model/weights.h"

namespace oryx::training {

// What identifies training data wherever it lies: its length, and a checksum of sequences spread over it.
struct DataIdentity {
  int64_t tokens = 0;
  uint32_t crc32c = 0;
  bool operator==(const DataIdentity&) const = default;
};

struct TrainingState {
  int64_t step = 0;           // updates made
  int64_t data_position = 0;  // sequences seen
  DataIdentity data;
  Table recipe;  // resolved, all sections
};

// Exclusive use of a run directory. It is made where it is missing, and removed in the end where nothing was
// written into it.
class RunDirectory {
 public:
  // Throws Error when another process holds the directory.
  explicit RunDirectory(std::filesystem::path path);
  ~RunDirectory();
  RunDirectory(const RunDirectory&) = delete;
  RunDirectory& operator=(const RunDirectory&) = delete;

  const std::filesystem::path& path() const { return path_; }

  // The directory of the newest complete checkpoint, as `latest` names it; none in a fresh run.
  std::optional<std::filesystem::path> latest() const;

  // Writes a checkpoint, points `latest` to it, and removes all but the `keep` newest ones up to this step.
  // `moments` as Optimizer::moments() names them. On an Error (disk full) nothing has changed.
  // `tokenizer_file` may be empty.
  void save(const TrainingState& state, const model::ModelConfig& config, const model::Weights& weights,
            const formats::NamedTensors& moments, const std::filesystem::path& tokenizer_file,
            int64_t keep) const;

 private:
  std::filesystem::path checkpoint_path(int64_t step) const;
  void point_latest_to(const std::filesystem::path& checkpoint) const;
  void prune(int64_t step, int64_t keep) const;

  std::filesystem::path path_;
  int lock_ = -1;
};

// training.json of a checkpoint.
TrainingState load_state(const std::filesystem::path& checkpoint);

// Fills the named tensors from optimizer.safetensors. Throws Error where one is missing there or of another
// shape or type.
void load_moments(const std::filesystem::path& checkpoint, const formats::NamedTensors& moments);

}  // namespace oryx::training
