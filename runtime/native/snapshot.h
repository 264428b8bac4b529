// Restores what a session of the Python runtime has kept (edge_kv/runtime/snapshot.py: the format).
#pragma once

#include <cstdint>
#include <string>

namespace edge_kv {

// Fill `state`, an engine's arena of `bytes`, with the rows of the snapshot at `path`; returns the
// position to go on at. The file is verified before anything is written, and refused where Python
// refuses it: cut off, changed, or of another engine, model or plan than the artifact at `root`.
// Throws std::runtime_error with one sentence.
int64_t restore(const std::string& path, const std::string& root, uint8_t* state, int64_t bytes);

}  // namespace edge_kv
