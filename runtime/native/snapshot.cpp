#include "snapshot.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "json.h"
#include "sha256.h"

namespace edge_kv {
namespace {

constexpr char kMagic[] = "EDGEKVSN";
constexpr uint32_t kVersion = 1, kMaxHeader = 1 << 24;
constexpr int64_t kPrefix = 16, kDigest = 32;
constexpr size_t kBlock = 1 << 20;

struct Buffer {
  std::string name;
  bool ring;
  int64_t heads, slots, row;  // bytes of one head's row
  uint8_t* rows;
};

using Owner = std::vector<std::pair<std::string, std::string>>;  // key of the header, its value

struct Plan {
  int64_t ctx = 0, window = 0, ring_slots = 0;
  std::vector<Buffer> buffers;
};

struct Rows {
  int64_t first, count;  // positions a buffer holds of those before the snapshot's
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

// What edge_kv/artifact.py calls the model's fingerprint.
std::string fingerprint(const Json& manifest) {
  const Json &files = manifest.at("files"), &quant = manifest.at("quant");
  std::vector<std::pair<std::string, std::string>> digests;
  for (size_t i = 0; i < files.keys.size(); ++i)
    if (files.keys[i].rfind("verify", 0) != 0)
      digests.emplace_back(files.keys[i], files.items[i].at("sha256").string());
  std::sort(digests.begin(), digests.end());
  std::string parts = "[" + manifest.at("model").python() + ", " + quant.at("scheme").python();
  for (const auto& [name, digest] : digests) parts += ", [\"" + name + "\", \"" + digest + "\"]";
  return sha256_hex(parts + "]");
}

// What a buffer is called in the program (export/executorch_state.py).
std::string attribute(std::string name) {
  std::replace(name.begin(), name.end(), '.', '_');
  return "state." + name;
}

Plan read_plan(const Json& manifest, const FindBuffer& find) {
  const Json& stored = manifest.at("plan");
  Plan plan;
  plan.ctx = stored.at("ctx").integer();
  plan.window = std::min(plan.ctx, manifest.at("model").at("sliding_window").integer());
  for (const Json& b : stored.at("buffers").items) {
    const std::string& name = b.at("name").string();
    const std::vector<Json>& shape = b.at("shape").items;
    const int64_t bytes = b.at("bytes").integer();
    const int64_t heads = shape.size() > 1 ? shape[0].integer() : 0;
    const int64_t slots = shape.size() > 1 ? shape[1].integer() : 0;
    const bool ring = b.at("kind").string() == "ring";
    uint8_t* rows = find(attribute(name), bytes);
    if (!rows || heads < 1 || slots < 1 || slots > bytes || heads > bytes / slots ||
        bytes % (heads * slots) || (!ring && slots < plan.ctx))
      throw JsonError("its state is not that of the program");
    plan.buffers.push_back({name, ring, heads, slots, bytes / heads / slots, rows});
    if (ring && !plan.ring_slots) plan.ring_slots = slots;
  }
  return plan;
}

Rows held(const Buffer& buffer, int64_t pos, int64_t written) {
  const int64_t lost = buffer.ring ? std::max<int64_t>(0, written - buffer.slots) : 0;
  const int64_t first = std::min(lost, pos);
  return {first, pos - first};
}

bool can_go_on(const Plan& plan, int64_t pos, int64_t written) {
  if (pos < 0 || pos > written || written > plan.ctx) return false;
  const int64_t oldest = plan.ring_slots ? std::max<int64_t>(0, written - plan.ring_slots) : 0;
  return oldest == 0 || pos == 0 || pos - plan.window + 1 >= oldest;
}

// Whether the sections of a snapshot are the rows that its plan asks for, and all it holds.
bool fits(const Json& sections, const Plan& plan, int64_t pos, int64_t written, int64_t body) {
  if (sections.items.size() != plan.buffers.size() + 1) return false;
  for (size_t i = 0; i < sections.items.size(); ++i) {
    const Json& section = sections.items[i];
    std::string name = "tokens";
    int64_t rows = pos, bytes = 4 * pos;
    if (i > 0) {
      const Buffer& buffer = plan.buffers[i - 1];
      name = buffer.name;
      rows = held(buffer, pos, written).count;
      bytes = rows * buffer.heads * buffer.row;
    }
    if (section.at("name").string() != name || section.at("rows").integer() != rows ||
        section.at("bytes").integer() != bytes)
      return false;
    body -= bytes;
  }
  return body == 0;
}

void load(const File& file, const Plan& plan, int64_t pos, int64_t written) {
  for (const Buffer& buffer : plan.buffers) {
    const Rows rows = held(buffer, pos, written);
    const int64_t first = rows.first % buffer.slots;
    const int64_t before_wrap = std::min(rows.count, buffer.slots - first);
    for (int64_t head = 0; head < buffer.heads; ++head) {
      uint8_t* at = buffer.rows + head * buffer.slots * buffer.row;
      file.read(at + first * buffer.row, before_wrap * buffer.row);
      file.read(at, (rows.count - before_wrap) * buffer.row);
    }
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

int64_t restore(const std::string& path, const std::string& root, const FindBuffer& find) {
  const std::string named = root + "/manifest.json";
  Plan plan;
  Owner owner;
  try {
    const Json manifest = parse_json(text_of(named));
    plan = read_plan(manifest, find);
    owner = {{"engine", "executorch"},
             {"model", fingerprint(manifest)},
             {"plan", sha256_hex(manifest.at("plan").compact())}};
  } catch (const JsonError& e) {
    throw std::runtime_error(named + " cannot be read (" + e.what() + "); copy the artifact again");
  }
  const File file = open(path);
  const std::string text = verified_header(file);
  try {
    const Json header = parse_json(text);
    check_owner(file, header, owner);
    const int64_t pos = header.at("pos").integer(), written = header.at("written").integer();
    const int64_t sections = file.bytes - kPrefix - kDigest - int64_t(text.size());
    if (!can_go_on(plan, pos, written) ||
        !fits(header.at("sections"), plan, pos, written, sections))
      file.refuse(" does not hold the rows its plan asks for; take it again");
    file.seek(kPrefix + int64_t(text.size()) + 4 * pos);
    load(file, plan, pos, written);
    return pos;
  } catch (const JsonError& e) {
    file.refuse(std::string(" has a header that cannot be read (") + e.what() + "); take it again");
  }
}

}  // namespace edge_kv
