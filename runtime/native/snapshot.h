// Restores what a session of the Python runtime has kept (edge_kv/runtime/snapshot.py: the format).
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace edge_kv {

// A state buffer of an engine by its name in the program: null unless it has just these bytes.
using FindBuffer = std::function<uint8_t*(const std::string& name, int64_t bytes)>;

// Fill an engine's state with the rows of the snapshot at `path`; returns the position to go on at.
// The file is verified before anything is written, and refused where Python refuses it: cut off,
// changed, or of another engine, model or plan than the artifact at `root`.
// Throws std::runtime_error with one sentence.
int64_t restore(const std::string& path, const std::string& root, const FindBuffer& find);

}  // namespace edge_kv
