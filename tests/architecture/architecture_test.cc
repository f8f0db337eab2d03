// Holds src/ to the room table of docs/architecture.md: include lines, CMake targets, sizes of files.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>

namespace {

namespace fs = std::filesystem;
using Rooms = std::map<std::string, std::set<std::string>>;  // room → the rooms it may include

fs::path source_directory() {
  const char* path = std::getenv("ORYX_SOURCE_DIR");
  if (!path) throw std::runtime_error("ORYX_SOURCE_DIR is not set; ctest sets it");
  return path;
}

std::vector<std::string> lines_of(const fs::path& path) {
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

std::vector<std::string> words_of(const std::string& text) {
  static const std::regex kWord("[a-z_]+");
  return {std::sregex_token_iterator(text.begin(), text.end(), kWord), std::sregex_token_iterator()};
}

// The table: "| formats, schedule, operators | base |". The second column names rooms, or "all" of them.
Rooms read_table() {
  static const std::regex kRow(R"(\|([a-z_, ]+)\|([^|]+)\|)");
  Rooms rooms;
  bool inside = false;
  for (const std::string& line : lines_of(source_directory() / "docs" / "architecture.md")) {
    std::smatch row;
    if (!std::regex_match(line, row, kRow)) {
      inside = inside && line.starts_with("|---");
      continue;
    }
    if (line.find("may include") != std::string::npos) {
      inside = true;
      continue;
    }
    if (!inside) continue;
    for (const std::string& room : words_of(row[1])) {
      for (const std::string& other : words_of(row[2])) rooms[room].insert(other);
    }
  }
  for (auto& [room, others] : rooms) {
    const bool all = others.contains("all");
    std::erase_if(others, [&](const std::string& other) { return !rooms.contains(other); });
    for (const auto& [other, unused] : rooms) {
      if (all && other != room) others.insert(other);
    }
  }
  return rooms;
}

// Every C++ or CUDA file under src/<room>.
std::vector<fs::path> files_of(const std::string& room) {
  std::vector<fs::path> files;
  for (const fs::directory_entry& entry :
       fs::recursive_directory_iterator(source_directory() / "src" / room)) {
    const std::string extension = entry.path().extension();
    if (extension == ".h" || extension == ".cc" || extension == ".cu" || extension == ".cuh") {
      files.push_back(entry.path());
    }
  }
  return files;
}

std::vector<std::string> folders_of_src() {
  std::vector<std::string> folders;
  for (const fs::directory_entry& entry : fs::directory_iterator(source_directory() / "src")) {
    if (entry.is_directory() && fs::exists(entry.path() / "CMakeLists.txt"))
      folders.push_back(entry.path().filename());
  }
  return folders;
}

// The highest number of steps down to a room that includes none.
int level_of(const std::string& room, const Rooms& rooms, int depth = 0) {
  if (depth > static_cast<int>(rooms.size()))
    throw std::runtime_error("the rooms include each other in a circle");
  int level = 0;
  for (const std::string& other : rooms.at(room))
    level = std::max(level, 1 + level_of(other, rooms, depth + 1));
  return level;
}

TEST(Architecture, TheTableIsALadder) {
  const Rooms rooms = read_table();
  ASSERT_GE(rooms.size(), 10u);
  EXPECT_EQ(level_of("base", rooms), 0);
  for (const auto& [room, others] : rooms) {
    for (const std::string& other : others) {
      EXPECT_LT(level_of(other, rooms), level_of(room, rooms)) << room << " and " << other;
    }
  }
}

TEST(Architecture, EveryRoomStandsInTheTable) {
  const Rooms rooms = read_table();
  for (const std::string& folder : folders_of_src()) {
    EXPECT_TRUE(rooms.contains(folder)) << "src/" << folder << " is missing in docs/architecture.md";
  }
}

TEST(Architecture, IncludeLinesLeanOnlyOnRoomsOfTheTable) {
  static const std::regex kInclude(R"re(\s*#\s*include\s+"([^"]+)".*)re");
  const Rooms rooms = read_table();
  int includes = 0;
  for (const std::string& room : folders_of_src()) {
    for (const fs::path& file : files_of(room)) {
      for (const std::string& line : lines_of(file)) {
        std::smatch match;
        if (!std::regex_match(line, match, kInclude)) continue;
        ++includes;
        const std::string path = match[1], other = path.substr(0, path.find('/'));
        const bool allowed = other == room || (rooms.contains(room) && rooms.at(room).contains(other));
        EXPECT_TRUE(allowed) << file << " includes \"" << path << "\": " << room << " may not lean on "
                             << other;
        EXPECT_TRUE(fs::exists(source_directory() / "src" / path)) << file << " includes \"" << path << '"';
      }
    }
  }
  EXPECT_GT(includes, 50);
}

TEST(Architecture, TargetsLinkOnlyRoomsOfTheTable) {
  static const std::regex kRoom(R"(oryx_room\(([a-z_]+)([^)]*)\))");
  static const std::regex kRooms(R"(\sROOMS\s+([a-z_\s]+))");
  const Rooms rooms = read_table();
  for (const std::string& folder : folders_of_src()) {
    std::ostringstream text;
    text << std::ifstream(source_directory() / "src" / folder / "CMakeLists.txt").rdbuf();
    const std::string content = text.str();
    std::smatch room, linked;
    if (!std::regex_search(content, room, kRoom)) continue;  // cli makes an executable
    const std::string arguments = room[2];
    EXPECT_EQ(room[1], folder);
    if (!std::regex_search(arguments, linked, kRooms)) continue;
    for (const std::string& other : words_of(linked[1])) {
      EXPECT_TRUE(rooms.at(folder).contains(other)) << "oryx_" << folder << " links oryx_" << other;
    }
  }
}

TEST(Architecture, FilesStayShort) {
  constexpr size_t kLongest = 600;
  for (const std::string& room : folders_of_src()) {
    for (const fs::path& file : files_of(room)) {
      EXPECT_LE(lines_of(file).size(), kLongest) << file << ": split it by idea";
    }
  }
}

}  // namespace
