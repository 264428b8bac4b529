// Restores what a session of the Python runtime has kept (edge_kv/runtime/snapshot.py: the format).
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "manifest.h"

namespace edge_kv {

// The memory of a table in an engine.
using FindTable = std::function<uint8_t*(const Table&)>;

// Fill an engine's state with the rows of the snapshot at `path`; returns the position to go on at.
// The file is verified before anything is written, and refused where Python refuses it: cut off,
// changed, or of another model or plan than `manifest`.
// Throws std::runtime_error with one sentence.
int64_t restore(const std::string& path, const Manifest& manifest, const FindTable& find);

}  // namespace edge_kv
