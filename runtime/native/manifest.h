// What the runner needs of an artifact's manifest.json, schema 2 (edge_kv/manifest.py): every field
// of its type and within bounds. Nothing is computed from it but the rows that a table holds.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "json.h"

namespace edge_kv {

// Row indices begin … end - 1 of a table.
struct Held {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// One table of the decode state (edge_kv/plan.py: Table).
struct Table {
  std::string name, dtype;
  int64_t heads, dim, slots, stride, keep;

  int64_t row_bytes() const;
  int64_t bytes() const { return slots * row_bytes(); }
  std::string attribute() const;  // what it is called in a program

  // The rows that a snapshot at `pos` keeps when positions below `written` were written.
  Held held(int64_t pos, int64_t written) const;
  // Whether a step may start at `to`: everything it looks back on is still there.
  bool can_resume(int64_t to, int64_t written) const;

 private:
  int64_t oldest(int64_t written) const;
};

// The file of per-layer rows (edge_kv/manifest.py: PleEntry).
struct TokenRows {
  std::string file;
  int64_t rows, layers, dim, bits, block;

  int64_t values() const { return layers * dim; }
  int64_t data_bytes() const { return values() * bits / 8; }
  int64_t row_bytes() const { return data_bytes() + (bits == 32 ? 0 : values() / block * 2); }
};

struct Manifest {
  int64_t vocab, ctx, chunk;
  int64_t drafts;  // most tokens that decode takes behind the first
  std::vector<Table> tables;
  std::string model, plan;        // digests that a snapshot repeats
  std::string program, weights;   // files; weights: "" where they are inside of the program
  bool token_rows;
  TokenRows ple;
  int64_t prefill_layers, decode_layers;  // whose per-layer rows a program takes; 0: it takes none
  // What the program takes and gives, and its tables, as `edge_kv_describe` says it.
  std::vector<std::string> contract, state;

  // Whether decoding may go on at `pos` when positions below `written` were written.
  bool can_rewind(int64_t pos, int64_t written) const;
};

// A file of the artifact is not there, or not the one that the manifest lists.
struct FileError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The manifest of the artifact at `root`, whose files for this runner are there, of the sizes, of the
// digests of their pieces and, up to 64 MB of a program, of all of it that it says.
// Throws JsonError: it is no manifest, or a field is not what it should be; FileError.
Manifest read_manifest(const std::string& root);

}  // namespace edge_kv
