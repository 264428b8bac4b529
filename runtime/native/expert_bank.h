// Experts of a mixture that do not fit in memory: read from storage when a token chooses them.
//
// A weight file is mapped. Where its experts are more than memory, the system drops and reads again
// single pages, which takes two to three times as long as reading whole matrices past the page cache
// (benchmarks/expert_reads.py). A bank holds the matrices that were used last in anonymous memory,
// and threads of its own read the next ones while others are multiplied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace edge_kv {

class ExpertBank {
 public:
  // Bytes that the bank may hold; 0: none, and matrices are used where they are mapped.
  explicit ExpertBank(int64_t bytes);
  ~ExpertBank();

  // How many experts can be wanted at once, if each is two matrices of `bytes` in all.
  int64_t room(size_t bytes) const;

  // Begin to read `bytes` mapped at `data`, if they are in a file and not held yet. Whatever is
  // wanted is to be taken and released, and no more of it is to be wanted than there is room.
  void want(const char* data, size_t bytes);

  // The bytes wanted at `data`, when they have been read; `data` itself where they cannot be.
  const char* take(const char* data);
  void release(const char* data);

  struct Shelf;

 private:
  std::unique_ptr<Shelf> shelf_;
};

// The bank of this process, null without one. A caller keeps it for as long as it uses it.
std::shared_ptr<ExpertBank> expert_bank();

// Replace the bank of this process by an empty one of `bytes`. Whoever maps a weight file, or ends
// the mapping of one, calls this: a bank knows matrices by their addresses.
void keep_experts(int64_t bytes);

}  // namespace edge_kv

extern "C" __attribute__((visibility("default"))) void edge_kv_keep_experts(int64_t bytes);
