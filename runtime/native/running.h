// What the operators of a program run with, while a method of an engine runs on this thread.
#pragma once

#include "parallel.h"
#include "pool.h"

namespace edge_kv {

struct Running {
  Workers* workers;
  int threads;
  bool exact;  // products of float activations, as the parity gate wants them
};

// Of this thread; outside of an engine one thread and rounded activations.
const Running& running();

// The threads of the engine that runs on this thread.
Pool running_pool();

// Makes `engine` the one that runs on this thread, for as long as it lives.
class Turn {
 public:
  explicit Turn(const Running& engine);
  ~Turn();
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  const Running* before_;
};

}  // namespace edge_kv
