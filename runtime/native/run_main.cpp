// edge-kv-run: token ids in, token ids out, without Python.
//
//   edge-kv-run ARTIFACT --ids 2,651,9029 [--max-new-tokens 64] [--threads N]
//               [--restore SNAPSHOT] [--logits FILE]
//
// Decodes greedily and streams each id as it is chosen; times and memory go to stderr. What it needs
// to know about the model is in the manifest, which is compared with the program.
#include <fcntl.h>
#include <malloc.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "engine.h"
#include "kernels.h"
#include "manifest.h"
#include "parallel.h"
#include "snapshot.h"

namespace {

using edge_kv::Manifest;

constexpr int kErrorBytes = 512;
constexpr char kHelp[] =
    "Usage: edge-kv-run ARTIFACT --ids 2,651,9029 [options]\n"
    "Feeds token ids to an artifact and prints those it chooses, each the likeliest.\n"
    "  --ids IDS             ids to feed, with commas between them\n"
    "  --max-new-tokens N    how many to choose (64)\n"
    "  --threads N           threads (one for every CPU, which is also the most)\n"
    "  --restore SNAPSHOT    go on where a session of the Python runtime was kept\n"
    "  --logits FILE         write the logits behind every chosen id, float32 of the vocabulary\n";

[[noreturn]] void stop(const std::string& sentence) {
  fprintf(stderr, "Error: %s\n", sentence.c_str());
  exit(1);
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The per-layer embedding file; its format is described in edge_kv/manifest.py (PleEntry).
class PleRows {
 public:
  PleRows(const std::string& root, const Manifest& manifest)
      : has_(manifest.token_rows), entry_(manifest.ple), path_(root + "/" + entry_.file) {
    if (!has_) return;
    row_.resize(size_t(entry_.row_bytes()));
    file_ = open(path_.c_str(), O_RDONLY);
    if (file_ < 0) stop("Cannot open " + path_ + ".");
    posix_fadvise(file_, 0, 0, POSIX_FADV_RANDOM);
  }
  ~PleRows() {
    if (file_ >= 0) close(file_);
  }
  PleRows(const PleRows&) = delete;
  PleRows& operator=(const PleRows&) = delete;

  // Rows of `count` ids for the first `layers` layers, null for a model without them.
  const float* read(const int64_t* ids, int64_t count, int64_t layers) {
    if (!has_) return nullptr;
    const int64_t width = layers * entry_.dim;
    out_.resize(size_t(count * width));
    for (int64_t t = 0; t < count; ++t) {
      const ssize_t bytes = ssize_t(row_.size());
      if (pread(file_, row_.data(), row_.size(), off_t(ids[t]) * bytes) != bytes)
        stop(path_ + " ends inside the row of token " + std::to_string(ids[t]) + "; it is cut off.");
      unpack(width, out_.data() + t * width);
    }
    return out_.data();
  }

 private:
  void unpack(int64_t width, float* out) const {
    if (entry_.bits == 32) {
      memcpy(out, row_.data(), size_t(width) * 4);
      return;
    }
    const uint8_t* data = row_.data();
    for (int64_t i = 0; i < width; ++i) {
      uint16_t half;
      memcpy(&half, data + entry_.data_bytes() + i / entry_.block * 2, 2);
      const int value = entry_.bits == 4 ? int(i % 2 ? data[i / 2] >> 4 : data[i / 2] & 15) - 8
                                         : int(int8_t(data[i]));
      out[i] = float(value) * edge_kv::half_to_float(half);
    }
  }

  const bool has_;
  const edge_kv::TokenRows entry_;
  const std::string path_;
  int file_ = -1;
  std::vector<uint8_t> row_;
  std::vector<float> out_;
};

std::vector<int64_t> parse_ids(const char* text, int64_t vocab) {
  std::vector<int64_t> ids;
  for (const char* at = text; *at;) {
    char* end;
    const long long id = strtoll(at, &end, 10);
    if (end == at || (*end && *end != ',') || id < 0 || id >= vocab)
      stop("--ids wants token ids below " + std::to_string(vocab) + " with commas between them.");
    ids.push_back(id);
    at = *end ? end + 1 : end;
  }
  if (ids.empty()) stop("--ids is empty; give at least one token id.");
  return ids;
}

int64_t taken_up(edge_kv_engine* engine, const std::string& path, const Manifest& manifest) {
  const auto find = [engine](const edge_kv::Table& table) {
    int64_t held = 0;
    return static_cast<uint8_t*>(edge_kv_buffer(engine, table.attribute().c_str(), &held));
  };
  try {
    return edge_kv::restore(path, manifest, find);
  } catch (const std::exception& e) {
    stop(std::string(e.what()) + ".");
  }
}

Manifest manifest_of(const std::string& root) {
  try {
    return edge_kv::read_manifest(root);
  } catch (const edge_kv::JsonError& e) {
    stop(root + "/manifest.json cannot be read (" + e.what() + "); copy the artifact again.");
  } catch (const std::exception& e) {
    stop(std::string(e.what()) + ".");
  }
}

// Compare what the loaded program takes, gives and holds with what the manifest says.
void check_contract(edge_kv_engine* engine, const std::string& program, const Manifest& manifest) {
  std::string text(size_t(edge_kv_describe(engine, nullptr, 0)), ' ');
  edge_kv_describe(engine, &text[0], int64_t(text.size()));
  std::istringstream lines(text);
  std::vector<std::string> real;
  std::set<std::string> held;
  for (std::string line; std::getline(lines, line);) {
    const size_t what = line.find(' ') + 1;
    if (line.compare(what, 6, "state ") == 0) held.insert(line.substr(what));
    else real.push_back(line);
  }
  const std::set<std::string> planned(manifest.state.begin(), manifest.state.end());
  std::vector<std::string> odd;
  const auto by_name = [](std::vector<std::string> of) {
    std::sort(of.begin(), of.end());
    return of;
  };
  if (real != manifest.contract) {
    const auto a = by_name(real), b = by_name(manifest.contract);
    std::set_symmetric_difference(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(odd));
    if (odd.empty()) odd = real;
  }
  std::set_symmetric_difference(held.begin(), held.end(), planned.begin(), planned.end(),
                                std::back_inserter(odd));
  if (!odd.empty())
    stop(program + " and the manifest disagree about '" + odd[0] + "'; copy the artifact again.");
}

// Gives back what a prompt was read in: a chunk of it works in far more than the tokens behind it.
void release_memory() {
  edge_kv_release_scratch();
#if defined(__GLIBC__)
  malloc_trim(0);
#elif defined(M_PURGE)
  mallopt(M_PURGE, 0);  // Android's allocator
#endif
}

void report_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    for (const char* key : {"VmHWM", "RssAnon", "RssFile"})
      if (line.rfind(key, 0) == 0) fprintf(stderr, "%s\n", line.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  const char* ids_text = nullptr;
  std::string root, snapshot, logits_path;
  int64_t wanted = 64;
  const int cpus = int(std::max(1u, std::thread::hardware_concurrency()));
  int threads = cpus;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name.rfind("--", 0) != 0) {
      root = name;
      continue;
    }
    if (name == "--help") {
      fputs(kHelp, stdout);
      return 0;
    }
    if (i + 1 == argc) stop(name + " wants a value.");
    const char* value = argv[++i];
    if (name == "--ids") ids_text = value;
    else if (name == "--max-new-tokens") wanted = atoll(value);
    else if (name == "--threads") threads = atoi(value);
    else if (name == "--restore") snapshot = value;
    else if (name == "--logits") logits_path = value;
    else stop("Unknown option " + name + "; see --help.");
  }
  if (root.empty() || !ids_text || threads < 1)
    stop("Usage: edge-kv-run ARTIFACT --ids 2,651,9029 [options]; see --help.");

  char error[kErrorBytes] = "";
  const double begin = now();
  if (threads > cpus)
    fprintf(stderr, "Warning: --threads %d is more than the %d CPUs; %d are used.\n", threads, cpus,
            cpus);
  const Manifest manifest = manifest_of(root);
  const std::string program = root + "/" + manifest.program;
  const std::string weights = manifest.weights.empty() ? "" : root + "/" + manifest.weights;
  const int64_t vocab = manifest.vocab, ctx = manifest.ctx, chunk = manifest.chunk;
  edge_kv_engine* engine = edge_kv_open(program.c_str(), weights.c_str(), std::min(threads, cpus), 0,
                                        error, kErrorBytes);
  if (!engine) stop("Cannot load " + program + ": " + error + ".");
  check_contract(engine, program, manifest);
  const std::vector<int64_t> ids = parse_ids(ids_text, vocab);
  const int64_t restored = snapshot.empty() ? 0 : taken_up(engine, snapshot, manifest);
  if (int64_t(ids.size()) > ctx - restored)
    stop(std::to_string(ids.size()) + " ids do not fit a context of " + std::to_string(ctx) +
         " at position " + std::to_string(restored) + ".");
  std::ofstream kept;
  if (!logits_path.empty()) {
    kept.open(logits_path, std::ios::binary);
    if (!kept) stop("Cannot write " + logits_path + ".");
  }
  PleRows ple(root, manifest);

  const double loaded = now();
  const int64_t prompt = int64_t(ids.size()) - 1;
  for (int64_t at = 0; at < prompt; at += chunk) {
    const int64_t count = std::min(chunk, prompt - at);
    const float* rows = ple.read(&ids[size_t(at)], count, manifest.prefill_layers);
    if (edge_kv_prefill(engine, &ids[size_t(at)], count, restored + at, rows, error, kErrorBytes))
      stop(std::string("Prefill failed: ") + error + ".");
  }
  if (prompt) release_memory();
  const double prefilled = now();
  std::vector<float> logits(static_cast<size_t>(vocab));
  int64_t id = ids.back(), pos = restored + prompt, made = 0;
  for (; made < wanted && pos < ctx; ++made, ++pos) {
    const float* rows = ple.read(&id, 1, manifest.decode_layers);
    if (edge_kv_decode(engine, &id, 1, pos, rows, logits.data(), vocab, error, kErrorBytes))
      stop(std::string("Decoding failed: ") + error + ".");
    if (kept.is_open())
      kept.write(reinterpret_cast<const char*>(logits.data()), vocab * int64_t(sizeof logits[0]));
    id = std::max_element(logits.begin(), logits.end()) - logits.begin();
    printf(made ? ",%lld" : "%lld", static_cast<long long>(id));
    fflush(stdout);
  }
  printf("\n");
  if (kept.is_open() && !kept.flush()) stop(logits_path + " is cut off; is the disk full?");
  const double done = now();
  fprintf(stderr, "load %.2f s, prefill %lld tokens %.2f s, decode %lld tokens %.2f s (%.1f tokens/s), %s\n",
          loaded - begin, static_cast<long long>(prompt), prefilled - loaded,
          static_cast<long long>(made), done - prefilled,
          done > prefilled ? double(made) / (done - prefilled) : 0.0, edge_kv_isa());
  report_memory();
  edge_kv_close(engine);
  return 0;
}
