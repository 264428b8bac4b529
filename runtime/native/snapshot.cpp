#include "snapshot.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "sha256.h"

namespace edge_kv {
namespace {

constexpr char kMagic[] = "EDGEKVSN";
constexpr uint32_t kVersion = 2, kMaxHeader = 1 << 24;
constexpr int64_t kPrefix = 16, kDigest = 32;
constexpr size_t kBlock = 1 << 20;

using Owner = std::vector<std::pair<std::string, std::string>>;  // key of the header, its value

// A table and its memory in an engine.
struct Memory {
  const Table* table;
  uint8_t* rows;
};

struct File {
  std::unique_ptr<FILE, int (*)(FILE*)> stream;
  std::string path;
  int64_t bytes;

  [[noreturn]] void refuse(const std::string& why) const { throw std::runtime_error(path + why); }
  [[noreturn]] void damaged() const {
    refuse(" is cut off or changed (its digest differs); take it again");
  }
  void read(void* into, int64_t count) const {
    if (fread(into, 1, size_t(count), stream.get()) != size_t(count)) damaged();
  }
  void seek(int64_t to) const {
    if (fseeko(stream.get(), off_t(to), SEEK_SET)) damaged();
  }
};

File open(const std::string& path) {
  File file{{fopen(path.c_str(), "rb"), fclose}, path, 0};
  if (!file.stream || fseeko(file.stream.get(), 0, SEEK_END))
    throw std::runtime_error("Cannot open the snapshot " + path + ": " + strerror(errno));
  file.bytes = ftello(file.stream.get());
  file.seek(0);
  return file;
}

// Framing and digest of all of it; returns the header and leaves `file` at the first section.
std::string verified_header(const File& file) {
  uint8_t prefix[kPrefix];
  if (file.bytes >= kPrefix) file.read(prefix, kPrefix);
  if (file.bytes < kPrefix || memcmp(prefix, kMagic, 8) != 0)
    file.refuse(" is not an edge-kv snapshot; give a file `--snapshot` wrote");
  uint32_t version, length;
  memcpy(&version, prefix + 8, 4);
  memcpy(&length, prefix + 12, 4);
  if (version != kVersion)
    file.refuse(" is a snapshot of version " + std::to_string(version) + ", this one reads " +
                std::to_string(kVersion) + "; take it again");
  int64_t body = file.bytes - kPrefix - kDigest;
  if (length == 0 || length > kMaxHeader || length > body) file.damaged();
  Sha256 hash;
  hash.add(prefix, kPrefix);
  for (std::vector<uint8_t> block(kBlock); body > 0; body -= int64_t(block.size())) {
    block.resize(std::min(kBlock, size_t(body)));
    file.read(block.data(), int64_t(block.size()));
    hash.add(block.data(), block.size());
  }
  std::array<uint8_t, kDigest> digest;
  file.read(digest.data(), kDigest);
  if (digest != hash.digest()) file.damaged();
  std::string header(length, ' ');
  file.seek(kPrefix);
  file.read(&header[0], length);
  return header;
}

// Bytes of the rings as they were at earlier turns, which follow the rows; they are not taken up.
int64_t checkpoint_bytes(const Json& header) {
  int64_t bytes = 0;
  if (const Json* checkpoints = header.find("checkpoints"))
    for (const Json& checkpoint : checkpoints->items) {
      const int64_t own = checkpoint.at("bytes").integer();
      if (own < 0 || __builtin_add_overflow(bytes, own, &bytes)) return -1;
    }
  return bytes;
}

// Whether the sections of a snapshot are the rows that its plan asks for, and all it holds but for
// checkpoints, `body` bytes.
bool fits(const Json& sections, const Manifest& manifest, int64_t pos, int64_t written,
          int64_t body) {
  if (sections.items.size() != manifest.tables.size() + 1) return false;
  for (size_t i = 0; i < sections.items.size(); ++i) {
    const Json& section = sections.items[i];
    std::string name = "tokens";
    int64_t rows = pos, bytes = 4 * pos;
    if (i > 0) {
      const Table& table = manifest.tables[i - 1];
      name = table.name;
      rows = table.held(pos, written).count();
      bytes = rows * table.row_bytes();
    }
    if (section.at("name").string() != name || section.at("rows").integer() != rows ||
        section.at("bytes").integer() != bytes)
      return false;
    body -= bytes;
  }
  return body == 0;
}

void load(const File& file, const std::vector<Memory>& state, int64_t pos, int64_t written) {
  for (const auto& [table, memory] : state) {
    const Held held = table->held(pos, written);
    const int64_t first = held.begin % table->slots, row = table->row_bytes();
    const int64_t before_wrap = std::min(held.count(), table->slots - first);
    file.read(memory + first * row, before_wrap * row);
    file.read(memory, (held.count() - before_wrap) * row);
  }
}

void check_owner(const File& file, const Json& header, const Owner& owner) {
  for (const auto& [key, mine] : owner) {
    const std::string& theirs = header.at(key).string();
    if (theirs != mine)
      file.refuse(" belongs to another " + key + " (" + theirs.substr(0, 12) + ", this one is " +
                  mine.substr(0, 12) + "); restore it where it was taken, or prefill again");
  }
}

}  // namespace

int64_t restore(const std::string& path, const Manifest& manifest, const FindTable& find) {
  std::vector<Memory> state;
  for (const Table& table : manifest.tables) state.push_back({&table, find(table)});
  const Owner owner = {{"model", manifest.model}, {"plan", manifest.plan}};
  const File file = open(path);
  const std::string text = verified_header(file);
  try {
    const Json header = parse_json(text);
    check_owner(file, header, owner);
    const int64_t pos = header.at("pos").integer(), written = header.at("written").integer();
    const int64_t body = file.bytes - kPrefix - kDigest - int64_t(text.size());
    const int64_t checkpoints = checkpoint_bytes(header);
    if (!manifest.can_rewind(pos, written) || checkpoints < 0 || checkpoints > body ||
        !fits(header.at("sections"), manifest, pos, written, body - checkpoints))
      file.refuse(" does not hold the rows its plan asks for; take it again");
    file.seek(kPrefix + int64_t(text.size()) + 4 * pos);
    load(file, state, pos, written);
    return pos;
  } catch (const JsonError& e) {
    file.refuse(std::string(" has a header that cannot be read (") + e.what() + "); take it again");
  }
}

}  // namespace edge_kv
