#include "manifest.h"

#include <sys/stat.h>

#include <algorithm>
#include <fstream>

#include "sha256.h"

namespace edge_kv {
namespace {

constexpr int64_t kMost = (int64_t(1) << 31) - 1;         // of a count
constexpr int64_t kMostState = int64_t(1) << 42;          // bytes of state that no plan exceeds
constexpr int64_t kMostText = 8 << 20;                    // bytes of a manifest
constexpr int64_t kCheckedBytes = 64 << 20;               // of a program that is read at every start
constexpr int64_t kMostDrafts = 8;
constexpr size_t kMostTables = 65536, kMostName = 128, kMostPath = 256, kMostAxes = 8;

[[noreturn]] void refuse(const std::string& what) { throw JsonError(what); }

int64_t number(const Json& in, const char* name, int64_t least, int64_t most = kMost) {
  const int64_t value = in.at(name).integer();
  if (value < least || value > most)
    refuse(std::string(name) + " is " + std::to_string(value) + ", which is out of range");
  return value;
}

bool letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

const std::string& name_of(const Json& in, const char* key) {
  const std::string& name = in.at(key).string();
  const bool fits = !name.empty() && name.size() <= kMostName && letter(name[0]) &&
                    std::all_of(name.begin(), name.end(),
                                [](char c) { return letter(c) || c == '.' || c == '-'; });
  if (!fits) refuse(std::string(key) + " is no name");
  return name;
}

const std::string& digest_of(const Json& in, const char* key) {
  const std::string& digest = in.at(key).string();
  const auto hex = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
  if (digest.size() != 64 || !std::all_of(digest.begin(), digest.end(), hex))
    refuse(std::string(key) + " is no digest");
  return digest;
}

// A path that stays in the artifact.
const std::string& path_of(const Json& value) {
  const std::string& path = value.string();
  bool leaves = path.empty() || path.size() > kMostPath || path[0] == '/';
  for (const char c : path) leaves = leaves || c == '\\' || static_cast<unsigned char>(c) < ' ';
  for (size_t at = 0; !leaves && at != std::string::npos;) {
    const size_t end = path.find('/', at);
    leaves = path.substr(at, end == std::string::npos ? end : end - at) == "..";
    at = end == std::string::npos ? end : end + 1;
  }
  if (leaves) throw FileError("the manifest names " + path + ", a path outside the artifact; refused");
  return path;
}

Table read_table(const Json& in) {
  Table table;
  table.name = name_of(in, "name");
  const Json& row = in.at("row");
  if (row.kind != '[' || row.items.size() != 2) refuse("row is not two numbers");
  table.heads = row.items[0].integer();
  table.dim = row.items[1].integer();
  table.slots = number(in, "slots", 1);
  table.stride = number(in, "stride", 1);
  table.keep = number(in, "keep", 0);
  table.dtype = in.at("dtype").string();
  if (std::min(table.heads, table.dim) < 1 || std::max(table.heads, table.dim) > kMost ||
      table.heads > kMost / table.dim || (table.keep && table.stride > 1) ||
      (table.dtype != "f32" && table.dtype != "f16" && table.dtype != "int8"))
    refuse("table " + table.name + " is not one that this version reads");
  return table;
}

// Whether no query misses a row of a plan of `ctx` positions in steps of `chunk`.
bool long_enough(const Table& t, int64_t ctx, int64_t chunk) {
  if (t.keep) return t.slots >= std::min(ctx, t.keep + chunk - 1);
  return t.slots >= (t.stride == 1 ? ctx : (ctx + t.stride - 1) / t.stride + 1);
}

void read_plan(const Json& plan, Manifest& into) {
  into.ctx = number(plan, "ctx", 1);
  into.chunk = number(plan, "chunk", 1, into.ctx);
  if (plan.find("drafts"))
    into.drafts = number(plan, "drafts", 0, std::min(kMostDrafts, into.chunk - 1));
  const Json& tables = plan.at("tables");
  if (tables.kind != '[' || tables.items.size() > kMostTables) refuse("tables is no list of them");
  int64_t left = kMostState;
  for (const Json& entry : tables.items) {
    Table table = read_table(entry);
    if (!long_enough(table, into.ctx, into.chunk))
      refuse("table " + table.name + " is too short for its plan");
    if (table.slots > left / table.row_bytes()) refuse("the tables are more than any machine has");
    left -= table.bytes();
    const std::string type = table.dtype == "f32" ? "float" : table.dtype == "f16" ? "float16" : "int8";
    into.state.push_back("state " + table.attribute() + " " + type + " " +
                         std::to_string(table.slots) + " " + std::to_string(table.heads) + " " +
                         std::to_string(table.dim));
    into.tables.push_back(std::move(table));
  }
}

// The contract of a program; returns the layers of the per-layer rows that it takes.
int64_t read_program(const Json& program, const char* name, Manifest& into) {
  int64_t layers = 0;
  const int64_t most = std::string(name) == "decode" ? into.drafts + 1 : into.chunk;
  for (const char* what : {"inputs", "outputs"}) {
    const Json& tensors = program.at(what);
    if (tensors.kind != '[' || tensors.items.size() > kMostTables) refuse("a program has no " + std::string(what));
    for (const Json& tensor : tensors.items) {
      const std::string kind = std::string(what, std::string(what).size() - 1);
      std::string line = std::string(name) + " " + kind + " " + name_of(tensor, "dtype");
      const bool rows = name_of(tensor, "name") == "ple";
      const std::vector<Json>& shape = tensor.at("shape").items;
      if (shape.size() > kMostAxes || (rows && shape.size() != 3))
        refuse("a tensor has other axes than it should");
      for (const Json& axis : shape) {
        const int64_t size = axis.kind == '"' ? most : axis.integer();
        line += " " + std::to_string(size);
      }
      if (rows) layers = shape[1].integer();
      if (rows && (!into.token_rows || layers < 1 || layers > into.ple.layers ||
                   shape[2].integer() != into.ple.dim))
        refuse("a program takes other per-layer rows than there are");
      into.contract.push_back(line);
    }
  }
  if (into.token_rows && !layers) refuse("a program does not take the per-layer rows");
  return layers;
}

TokenRows read_token_rows(const Json& in) {
  TokenRows ple{path_of(in.at("file")), number(in, "rows", 1), number(in, "n_layers", 1),
                number(in, "dim", 1), number(in, "bits", 1, 32), number(in, "block", 0)};
  if (ple.layers > kMost / ple.dim || (ple.bits != 4 && ple.bits != 8 && ple.bits != 32) ||
      (ple.bits != 32 && (ple.block < 1 || ple.values() % ple.block)) || ple.values() % 2)
    refuse("its per-layer rows are stored in a way that this version does not read");
  return ple;
}

// SHA-256 of pieces spread over a file, or of all of a short one (edge_kv/artifact.py: sample_of).
std::string sample_hex(const std::string& path, int64_t bytes) {
  constexpr int64_t kPieces = 64, kPiece = 4096;
  const int64_t last = bytes - kPiece;
  if (last < kPieces * kPiece) return sha256_hex(text_of(path));
  std::ifstream file(path, std::ios::binary);
  std::string pieces(size_t(kPieces * kPiece), ' ');
  for (int64_t i = 0; i < kPieces; ++i) {
    file.seekg(last * i / (kPieces - 1));
    file.read(&pieces[size_t(i * kPiece)], kPiece);
  }
  if (!file) throw FileError(path + " cannot be read; copy the artifact again");
  return sha256_hex(pieces);
}

// Compare the size of a file, its digest if `whole` and pieces of it, where the manifest has them,
// with what the manifest says.
void check_file(const std::string& root, const Json& files, const std::string& name, bool whole) {
  const Json* entry = files.find(name);
  if (!entry) throw FileError("the manifest does not list " + name + "; export again");
  const std::string path = root + "/" + name;
  const int64_t said = number(*entry, "size", 0, int64_t(1) << 53);
  const std::string& digest = digest_of(*entry, "sha256");
  struct stat status;
  if (stat(path.c_str(), &status) || !S_ISREG(status.st_mode))
    throw FileError(path + " cannot be opened; copy the artifact again");
  if (int64_t(status.st_size) != said)
    throw FileError(path + " has " + std::to_string(status.st_size) + " bytes, the manifest says " +
                    std::to_string(said) + "; copy the artifact again");
  const Json* sample = entry->find("sample");
  const bool sampled = sample && sample->kind == '"';
  if ((whole && said <= kCheckedBytes && sha256_hex(text_of(path)) != digest) ||
      (sampled && sample_hex(path, said) != digest_of(*entry, "sample")))
    throw FileError(path + " is not the file that was exported (its digest differs); copy the "
                    "artifact again");
}

}  // namespace

int64_t Table::row_bytes() const {
  return heads * dim * (dtype == "f32" ? 4 : dtype == "f16" ? 2 : 1);
}

std::string Table::attribute() const {
  std::string out = "state." + name;
  std::replace(out.begin() + 6, out.end(), '.', '_');
  return out;
}

int64_t Table::oldest(int64_t written) const {
  return keep ? std::max<int64_t>(0, written - slots) : 0;
}

Held Table::held(int64_t pos, int64_t written) const {
  const int64_t stop = pos / stride;
  return {std::min(oldest(written), stop), stop};
}

bool Table::can_resume(int64_t to, int64_t written) const {
  const int64_t first = oldest(written);
  return first == 0 || to == 0 || to - keep + 1 >= first;
}

bool Manifest::can_rewind(int64_t pos, int64_t written) const {
  return 0 <= pos && pos <= written && written <= ctx &&
         std::all_of(tables.begin(), tables.end(),
                     [&](const Table& table) { return table.can_resume(pos, written); });
}

Manifest read_manifest(const std::string& root) {
  const std::string path = root + "/manifest.json";
  struct stat status;
  if (stat(path.c_str(), &status) == 0 && status.st_size > kMostText) refuse("it is too long");
  const Json json = parse_json(text_of(path));
  if (number(json, "schema_version", 0) != 2)
    refuse("it is of another version of edge-kv; export again");
  Manifest manifest{};
  manifest.vocab = number(json.at("tokens"), "vocab", 1);
  manifest.model = digest_of(json.at("identity"), "model");
  manifest.plan = digest_of(json.at("identity"), "plan");
  read_plan(json.at("plan"), manifest);
  const Json& ple = json.at("ple");
  manifest.token_rows = ple.kind == '{';
  if (manifest.token_rows) manifest.ple = read_token_rows(ple);
  const Json& backend = json.at("backends").at("executorch");
  const Json &programs = backend.at("programs"), &files = json.at("files");
  const Json &prefill = programs.at("prefill"), &decode = programs.at("decode");
  manifest.program = path_of(decode.at("file"));
  if (prefill.at("file").string() != manifest.program) refuse("its programs are two files");
  manifest.prefill_layers = read_program(prefill, "prefill", manifest);
  manifest.decode_layers = read_program(decode, "decode", manifest);
  check_file(root, files, manifest.program, true);
  if (const Json* weights = backend.at("details").find("weights")) {
    manifest.weights = path_of(*weights);
    check_file(root, files, manifest.weights, false);
  }
  if (manifest.token_rows) {
    check_file(root, files, manifest.ple.file, false);
    const Json& entry = files.at(manifest.ple.file);
    if (entry.at("size").integer() / manifest.ple.row_bytes() < manifest.ple.rows)
      throw FileError(root + "/" + manifest.ple.file + " holds fewer rows than the manifest says; "
                      "copy the artifact again");
  }
  return manifest;
}

}  // namespace edge_kv
