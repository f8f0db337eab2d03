#include "formats/safetensors.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>

#include "base/error.h"
#include "base/random.h"
#include "formats/file.h"
#include "formats/temporary_directory.h"

namespace oryx::formats {
namespace {

// The tensors of safetensors_peer.py.
NamedTensors one_of_each_type() {
  const std::pair<const char*, at::ScalarType> types[] = {
      {"f64", at::kDouble}, {"f32", at::kFloat},  {"f16", at::kHalf},   {"bf16", at::kBFloat16},
      {"i64", at::kLong},   {"i32", at::kInt},    {"i16", at::kShort},  {"i8", at::kChar},
      {"u64", at::kUInt64}, {"u32", at::kUInt32}, {"u16", at::kUInt16}, {"u8", at::kByte},
      {"bool", at::kBool},
  };
  NamedTensors tensors;
  for (const auto& [name, type] : types) {
    at::Tensor values = at::arange(6, at::kLong).reshape({2, 3}) + static_cast<int64_t>(tensors.size());
    if (type == at::kBool) values = values.remainder(2);
    tensors.emplace_back(name, values.to(type));
  }
  tensors.emplace_back("empty", at::zeros({0, 4}));
  tensors.emplace_back("scalar", at::scalar_tensor(2.5, at::kFloat));
  return tensors;
}

const Metadata kMetadata = {{"format", "pt"}, {"note", "quotes \" and ünïcode"}};

bool same_bytes(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  return a.numel() == 0 ||
         std::memcmp(a.contiguous().const_data_ptr(), b.contiguous().const_data_ptr(), a.nbytes()) == 0;
}

void expect_holds(const SafetensorsFile& file, const NamedTensors& tensors) {
  EXPECT_EQ(file.names().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) EXPECT_TRUE(same_bytes(file.tensor(name), tensor)) << name;
}

std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

std::string file_bytes(const std::string& json, const std::string& data) {
  const uint64_t length = json.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes + json + data;
}

TEST(Safetensors, RoundTripOfEveryType) {
  TemporaryDirectory directory;
  const NamedTensors tensors = one_of_each_type();
  write_safetensors(directory.file("a"), tensors, kMetadata);
  const SafetensorsFile file(directory.file("a"));
  expect_holds(file, tensors);
  EXPECT_EQ(file.metadata(), kMetadata);
  EXPECT_EQ(file.names().front(), "f64");  // wide types first, so that all are aligned
  for (const std::string& name : file.names()) {
    const at::Tensor tensor = file.tensor(name);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size(), 0u);
  }
}

TEST(Safetensors, StridesAreResolvedAndTensorsOutliveTheFile) {
  TemporaryDirectory directory;
  const at::Tensor values = at::arange(12, at::kFloat).reshape({3, 4});
  write_safetensors(directory.file("a"), {{"t", values.t()}, {"s", values.slice(1, 1, 3)}});
  at::Tensor transposed;
  {
    const SafetensorsFile file(directory.file("a"));
    transposed = file.tensor("t");
    EXPECT_TRUE(same_bytes(file.tensor("s"), values.slice(1, 1, 3)));
    EXPECT_EQ(file.tensor("t").data_ptr(), transposed.data_ptr());  // no copy
  }
  EXPECT_TRUE(same_bytes(transposed, values.t()));
  transposed.fill_(7);
  EXPECT_TRUE(same_bytes(SafetensorsFile(directory.file("a")).tensor("t"), values.t()));
}

TEST(Safetensors, EmptyFileOfTensorsAndErrorsOfNames) {
  TemporaryDirectory directory;
  write_safetensors(directory.file("none"), {});
  EXPECT_TRUE(SafetensorsFile(directory.file("none")).names().empty());
  const at::Tensor one = at::ones({1});
  EXPECT_NE(error_of([&] {
              write_safetensors(directory.file("b"), {{"x", one}, {"x", one}});
            }).find("twice"),
            std::string::npos);
  EXPECT_NE(error_of([&] { write_safetensors(directory.file("b"), {{"x", at::Tensor()}}); }), "no error");
  EXPECT_NE(error_of([&] {
              write_safetensors(directory.file("b"), {{"x", one.to(at::kComplexFloat)}});
            }),
            "no error");
  EXPECT_EQ(directory.entries(), 1u);
  write_safetensors(directory.file("c"), {{"layers.0.key", one}});
  EXPECT_NE(error_of([&] {
              SafetensorsFile(directory.file("c")).tensor("layers.0.kye");
            }).find("nearest is layers.0.key"),
            std::string::npos);
}

TEST(Safetensors, LyingHeadersAreNamed) {
  TemporaryDirectory directory;
  const std::string path = directory.file("bad.safetensors");
  const auto tensor = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return "{\"x\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}}";
  };
  const std::string data(8, '\0');
  const std::pair<std::string, const char*> cases[] = {
      {"", "got 0 bytes"},
      {"1234567", "got 7 bytes"},
      {std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10), "header claims"},
      {std::string("\x03\0\0\0\0\0\0\0{}", 10), "header claims 3 bytes, but 2"},
      {file_bytes(" {}", ""), "does not start with {"},
      {file_bytes("{", ""), "malformed JSON"},
      {file_bytes("{}}", ""), "malformed JSON"},
      {file_bytes("{}", "x"), "take 0 bytes, but 1"},
      {file_bytes("{\"x\":3}", ""), "expected an object"},
      {file_bytes("{\"__metadata__\":{\"a\":1}}", ""), "expected a string for metadata"},
      {file_bytes("{\"x\":{\"dtype\":\"F32\",\"shape\":[2]}}", data), "has no data_offsets"},
      {file_bytes("{\"x\":{\"shape\":[2],\"data_offsets\":[0,8]}}", data), "has no dtype"},
      {file_bytes(tensor("F33", "[2]", "[0,8]"), data), "has dtype \"F33\""},
      {file_bytes(tensor("F32", "[2.0]", "[0,8]"), data), "has shape"},
      {file_bytes(tensor("F32", "[-2]", "[0,8]"), data), "has shape"},
      {file_bytes(tensor("F32", "2", "[0,8]"), data), "has shape"},
      {file_bytes(tensor("F32", "[3]", "[0,8]"), data), "ask for 12"},
      {file_bytes(tensor("F32", "[2]", "[8,0]"), data), "data_offsets"},
      {file_bytes(tensor("F32", "[2]", "[0,8,9]"), data), "data_offsets"},
      {file_bytes(tensor("F32", "[2]", "[0,8]"), "1234"), "truncated"},
      {file_bytes(tensor("F32", "[1]", "[4,8]"), data), "hole"},
      {file_bytes(tensor("F32", "[1]", "[0,4]"), data), "take 4 bytes, but 8"},
      {file_bytes(tensor("F32", "[4294967296,4294967296]", "[0,8]"), data), "overflows"},
      {file_bytes(tensor("F32", "[4611686018427387904]", "[0,0]"), ""), "overflows"},
      {file_bytes(tensor("F32", "[0,9223372036854775807,9223372036854775807]", "[0,0]"), ""), "overflows"},
      {file_bytes(tensor("F32", "[18446744073709551615]", "[0,8]"), data), "64 bits"},
      {file_bytes("{\"x\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]},"
                  "\"y\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,8]}}",
                  data),
       "overlap"},
      {file_bytes("{\"x\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]},"
                  "\"x\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]}}",
                  data),
       "given twice"},
      {file_bytes("{\"x\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8],\"z\":1}}", data),
       "other than"},
  };
  for (const auto& [bytes, part] : cases) {
    write_file_atomic(path, bytes);
    const std::string error = error_of([&] { SafetensorsFile file(path); });
    EXPECT_NE(error.find(part), std::string::npos) << part << ": " << error;
    EXPECT_TRUE(error.starts_with(path)) << error;
    EXPECT_EQ(error.find('\n'), std::string::npos);
  }
  write_file_atomic(path, file_bytes(tensor("BOOL", "[1]", "[0,1]"), "\x02"));
  EXPECT_NE(error_of([&] { SafetensorsFile(path).tensor("x"); }).find("BOOL"), std::string::npos);
}

TEST(Safetensors, UnalignedTensorsAreCopied) {
  TemporaryDirectory directory;
  const float value = 1.5;
  std::string data(5, '\x07');
  std::memcpy(data.data() + 1, &value, 4);
  write_file_atomic(directory.file("a"),
                    file_bytes("{\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
                               "\"f\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[1,5]}}  ",
                               data));
  EXPECT_EQ(SafetensorsFile(directory.file("a")).tensor("f").item<float>(), 1.5f);
}

// One to four random edits; every draw is a function of `seed`.
std::string mutated(std::string bytes, uint64_t seed) {
  uint64_t counter = 0;
  const auto below = [&](size_t limit) {
    return static_cast<size_t>(random_u64(seed, 0, counter++) % limit);
  };
  const size_t mutations = 1 + below(4);
  for (size_t i = 0; i < mutations && !bytes.empty(); ++i) {
    // Half of the edits hit the header's length and first bytes, where most of the meaning lies.
    const size_t at = below(below(2) ? bytes.size() : std::min<size_t>(bytes.size(), 60));
    constexpr std::string_view kMeaningful = "0123456789[]{}\",:-.eFBIU";
    switch (below(5)) {
      case 0:
        bytes[at] = static_cast<char>(below(256));
        break;
      case 1:
        bytes[at] = kMeaningful[below(kMeaningful.size())];
        break;
      case 2:
        bytes.resize(at);
        break;
      case 3:
        bytes.insert(at, bytes.substr(below(bytes.size()), 1 + below(40)));
        break;
      default:
        bytes.erase(at, 1 + below(9));
    }
  }
  // Often the length is put right again, so that what comes after it is reached.
  if (bytes.size() > 8 && below(2)) {
    const size_t end = bytes.rfind('}');
    const uint64_t length = end == std::string::npos || end < 8 ? bytes.size() - 8 : end - 7;
    std::memcpy(bytes.data(), &length, 8);
  }
  return bytes;
}

TEST(Safetensors, MutatedFilesReadOrThrowError) {
  TemporaryDirectory directory;
  write_safetensors(directory.file("good"),
                    {{"a", at::ones({2, 3})}, {"b", at::ones({2}, at::kBool)}, {"c", at::zeros({0})}},
                    {{"k", "v"}});
  const std::string good = read_file(directory.file("good"));
  const std::string path = directory.file("mutant");
  int read = 0, refused = 0;
  for (uint64_t seed = 0; seed < 10000; ++seed) {
    std::ofstream(path, std::ios::binary) << mutated(good, seed);
    try {
      const SafetensorsFile file(path);
      for (const std::string& name : file.names()) {
        (void)file.tensor(name).to(at::kDouble).sum().item<double>();
      }
      ++read;
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GT(read, 20);
  EXPECT_GT(refused, 1000);
}

TEST(Safetensors, ThePythonPackageReadsOursAndWeReadIts) {
  const char* python = std::getenv("ORYX_PYTHON");
  const char* peer = std::getenv("ORYX_SAFETENSORS_PEER");
  if (!python || !peer) GTEST_SKIP() << "ORYX_PYTHON and ORYX_SAFETENSORS_PEER are not set";
  TemporaryDirectory directory;
  write_safetensors(directory.file("ours"), one_of_each_type(), kMetadata);
  const std::string command =
      fmt::format("'{}' '{}' '{}' '{}'", python, peer, directory.file("ours"), directory.file("theirs"));
  ASSERT_EQ(std::system(command.c_str()), 0) << command;
  const SafetensorsFile theirs(directory.file("theirs"));
  expect_holds(theirs, one_of_each_type());
  EXPECT_EQ(theirs.metadata(), kMetadata);
}

TEST(Safetensors, AFileTooLargeLeavesTheOldOne) {
  TemporaryDirectory directory;
  const std::string path = directory.file("a");
  write_safetensors(path, {{"x", at::ones({3})}});
  const at::Tensor large = at::ones({1 << 20});
  const pid_t child = ::fork();
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{1 << 20, 1 << 20};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    const std::string error = error_of([&] { write_safetensors(path, {{"x", large}}); });
    ::_exit(error.starts_with("cannot write " + path + ": File too large") ? 0 : 1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(SafetensorsFile(path).tensor("x").numel(), 3);
  EXPECT_EQ(directory.entries(), 1u);
}

TEST(TensorFiles, SingleAndShardedReadAlike) {
  const NamedTensors tensors = {
      {"a", at::full({4}, 1.0)}, {"b", at::full({3}, 2.0)}, {"c", at::full({5}, 3.0)}};
  for (const uint64_t shard_bytes : {uint64_t{1}, uint64_t{29}, kDefaultShardBytes}) {
    TemporaryDirectory directory;
    write_tensor_files(directory.path(), tensors, {{"k", "v"}}, "model", shard_bytes);
    const size_t shards = shard_bytes == 1 ? 3 : 2;
    EXPECT_EQ(directory.entries(), shard_bytes == kDefaultShardBytes ? 1 : shards + 1);
    const TensorFiles files = TensorFiles::open(directory.path());
    ASSERT_EQ(files.names().size(), 3u);
    for (const auto& [name, tensor] : tensors) EXPECT_TRUE(same_bytes(files.tensor(name), tensor));
    EXPECT_FALSE(files.contains("d"));
    EXPECT_THROW(files.tensor("d"), Error);
  }
}

TEST(TensorFiles, ErrorsNameTheFile) {
  TemporaryDirectory directory;
  EXPECT_NE(error_of([&] { TensorFiles::open(directory.path()); }).find("neither model.safetensors"),
            std::string::npos);
  EXPECT_NE(error_of([&] { TensorFiles::open(directory.file("no")); }).find("no such"), std::string::npos);
  const NamedTensors tensors = {{"a", at::ones({4})}, {"b", at::ones({4})}};
  write_tensor_files(directory.path(), tensors, {}, "model", 16);
  EXPECT_NE(error_of([&] { write_tensor_files(directory.path(), tensors); }).find("already"),
            std::string::npos);
  std::filesystem::remove(directory.file("model-00002-of-00002.safetensors"));
  EXPECT_NE(error_of([&] { TensorFiles::open(directory.path()); }).find("model-00002-of-00002"),
            std::string::npos);
  const std::string index = directory.file("model.safetensors.index.json");
  const std::pair<const char*, const char*> cases[] = {
      {"[]", "object at the top"},
      {"{}", "weight_map"},
      {"{\"weight_map\":{\"a\":3}}", "file name"},
      {"{\"weight_map\":{\"a\":\"../x.safetensors\"}}", "file name"},
      {"{\"weight_map\":{\"a\":\"..\"}}", "file name"},
      {"{\"weight_map\":{\"z\":\"model-00001-of-00002.safetensors\"}}", "no tensor z"},
  };
  for (const auto& [text, part] : cases) {
    write_file_atomic(index, text);
    EXPECT_NE(error_of([&] { TensorFiles::open(directory.path()); }).find(part), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace oryx::formats
