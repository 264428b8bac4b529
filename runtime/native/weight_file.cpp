#include "weight_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace edge_kv {
namespace {

using executorch::aten::ScalarType;
using executorch::runtime::Error;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::Result;
using executorch::runtime::TensorLayout;

constexpr size_t kMaxRank = 8;

// A decimal number at the front of `text`, which then begins behind it.
bool take_number(std::string_view& text, uint64_t limit, uint64_t& out) {
  size_t digits = 0;
  for (out = 0; digits < text.size() && text[digits] >= '0' && text[digits] <= '9'; ++digits) {
    const uint64_t digit = uint64_t(text[digits] - '0');
    if (out > (limit - digit) / 10) return false;
    out = out * 10 + digit;
  }
  text.remove_prefix(digits);
  return digits > 0;
}

bool take(std::string_view& text, std::string_view what) {
  if (text.substr(0, what.size()) != what) return false;
  text.remove_prefix(what.size());
  return true;
}

}  // namespace

WeightFile::~WeightFile() {
  if (data_) munmap(data_, size_);
}

std::string WeightFile::map(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return path + " cannot be opened: " + strerror(errno);
  struct stat status;
  void* at = MAP_FAILED;
  if (fstat(file, &status) == 0 && S_ISREG(status.st_mode) && status.st_size > 0) {
    size_ = size_t(status.st_size);
    at = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0);
  }
  close(file);
  if (at == MAP_FAILED) return path + " cannot be mapped";
  data_ = static_cast<uint8_t*>(at);
  return "";
}

bool WeightFile::parse(std::string_view key, Region& out) const {
  size_t item;
  if (take(key, "f32[")) out.type = ScalarType::Float, item = 4;
  else if (take(key, "u8[")) out.type = ScalarType::Byte, item = 1;
  else if (take(key, "i64[")) out.type = ScalarType::Long, item = 8;
  else return false;
  uint64_t count = item;
  do {
    uint64_t size;
    if (out.sizes.size() == kMaxRank || !take_number(key, INT32_MAX, size)) return false;
    if (size && count > SIZE_MAX / 2 / size) return false;
    count *= size;
    out.order.push_back(uint8_t(out.sizes.size()));
    out.sizes.push_back(int32_t(size));
  } while (take(key, ","));
  uint64_t offset;
  if (!take(key, "]@") || !take_number(key, SIZE_MAX / 2, offset) || !key.empty()) return false;
  out.bytes = size_t(count);
  out.offset = size_t(offset);
  return out.offset % item == 0;
}

const WeightFile::Region* WeightFile::find(std::string_view key) const {
  const auto known = regions_.find(key);
  if (known != regions_.end()) return &known->second;
  Region region;
  if (!parse(key, region)) {
    fault_ = "it names a weight that cannot be read (" + std::string(key.substr(0, 80)) + ")";
    return nullptr;
  }
  if (region.offset > size_ || region.bytes > size_ - region.offset) {
    fault_ = "its weight " + std::string(key) + " lies outside the weight file of " +
             std::to_string(size_) + " bytes";
    return nullptr;
  }
  return &regions_.emplace(key, std::move(region)).first->second;
}

Result<const TensorLayout> WeightFile::get_tensor_layout(std::string_view key) const {
  const Region* region = find(key);
  if (!region) return Error::InvalidExternalData;
  return TensorLayout::create({region->sizes.data(), region->sizes.size()},
                              {region->order.data(), region->order.size()}, region->type);
}

Result<FreeableBuffer> WeightFile::get_data(std::string_view key) const {
  const Region* region = find(key);
  if (!region) return Error::InvalidExternalData;
  return FreeableBuffer(data_ + region->offset, region->bytes, nullptr);
}

Error WeightFile::load_data_into(std::string_view key, void* buffer, size_t size) const {
  const Region* region = find(key);
  if (!region || size > region->bytes) return Error::InvalidExternalData;
  memcpy(buffer, data_ + region->offset, size);
  return Error::Ok;
}

// No one lists the keys: they are in the program.
Result<uint32_t> WeightFile::get_num_keys() const { return uint32_t(0); }

Result<const char*> WeightFile::get_key(uint32_t) const { return Error::NotFound; }

}  // namespace edge_kv
