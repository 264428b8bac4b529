// The weight file of an artifact, mapped: where the constants of a program lie that are not in it.
#pragma once

#include <executorch/runtime/core/named_data_map.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace edge_kv {

// A program names each of its weights by type, shape and place, "u8[1536,48,16]@8192" (written by
// export/executorch_native.py): the program says which bytes it reads, and they are looked for in
// the file that its own engine was given. A place outside the file is refused.
class WeightFile : public executorch::runtime::NamedDataMap {
 public:
  WeightFile() = default;
  ~WeightFile() override;
  WeightFile(const WeightFile&) = delete;
  WeightFile& operator=(const WeightFile&) = delete;

  // Map `path`; returns why it cannot be mapped, or "".
  std::string map(const std::string& path);

  int64_t bytes() const { return int64_t(size_); }
  // Why the last weight was refused, or "".
  const std::string& fault() const { return fault_; }

  executorch::runtime::Result<const executorch::runtime::TensorLayout> get_tensor_layout(
      std::string_view key) const override;
  executorch::runtime::Result<executorch::runtime::FreeableBuffer> get_data(
      std::string_view key) const override;
  executorch::runtime::Error load_data_into(std::string_view key, void* buffer,
                                            size_t size) const override;
  executorch::runtime::Result<uint32_t> get_num_keys() const override;
  executorch::runtime::Result<const char*> get_key(uint32_t index) const override;

 private:
  struct Region {
    executorch::aten::ScalarType type;
    std::vector<int32_t> sizes;
    std::vector<uint8_t> order;
    size_t offset, bytes;
  };

  // The region of a key, null where the key cannot be read or the file does not hold it.
  const Region* find(std::string_view key) const;
  bool parse(std::string_view key, Region& out) const;

  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  // A layout refers to its sizes, so they stay where they are.
  mutable std::map<std::string, Region, std::less<>> regions_;
  mutable std::string fault_;
};

}  // namespace edge_kv
