#include "sha256.h"

#include <algorithm>
#include <cstring>

namespace edge_kv {
namespace {

// Fractions of the cube roots of the first 64 primes.
constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

uint32_t rotated(uint32_t x, int by) { return x >> by | x << (32 - by); }

}  // namespace

void Sha256::add(const void* data, size_t bytes) {
  auto* at = static_cast<const uint8_t*>(data);
  while (bytes) {
    const size_t held = bytes_ % 64;
    if (held == 0 && bytes >= 64) {
      block(at);
      at += 64, bytes -= 64, bytes_ += 64;
      continue;
    }
    const size_t taken = std::min(bytes, 64 - held);
    memcpy(rest_ + held, at, taken);
    at += taken, bytes -= taken, bytes_ += taken;
    if (held + taken == 64) block(rest_);
  }
}

std::array<uint8_t, 32> Sha256::digest() {
  uint8_t length[8];
  for (int i = 0; i < 8; ++i) length[i] = uint8_t(bytes_ * 8 >> (56 - 8 * i));
  static constexpr uint8_t kPadding[64] = {0x80};
  add(kPadding, 1 + (119 - bytes_ % 64) % 64);
  add(length, sizeof length);
  std::array<uint8_t, 32> out;
  for (size_t i = 0; i < out.size(); ++i) out[i] = uint8_t(state_[i / 4] >> (24 - 8 * (i % 4)));
  return out;
}

void Sha256::block(const uint8_t* data) {
  uint32_t w[64];
  for (int i = 0; i < 16; ++i)
    w[i] = uint32_t(data[4 * i]) << 24 | uint32_t(data[4 * i + 1]) << 16 |
           uint32_t(data[4 * i + 2]) << 8 | data[4 * i + 3];
  for (int i = 16; i < 64; ++i) {
    const uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + w[i - 7] + (rotated(a, 7) ^ rotated(a, 18) ^ a >> 3) +
           (rotated(b, 17) ^ rotated(b, 19) ^ b >> 10);
  }
  uint32_t s[8];
  memcpy(s, state_, sizeof s);
  for (int i = 0; i < 64; ++i) {
    const uint32_t choice = (s[4] & s[5]) ^ (~s[4] & s[6]);
    const uint32_t majority = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);
    const uint32_t first = s[7] + (rotated(s[4], 6) ^ rotated(s[4], 11) ^ rotated(s[4], 25)) +
                           choice + kRound[i] + w[i];
    const uint32_t second = (rotated(s[0], 2) ^ rotated(s[0], 13) ^ rotated(s[0], 22)) + majority;
    memmove(s + 1, s, 7 * sizeof *s);
    s[4] += first;
    s[0] = first + second;
  }
  for (int i = 0; i < 8; ++i) state_[i] += s[i];
}

std::string sha256_hex(const std::string& text) {
  Sha256 hash;
  hash.add(text.data(), text.size());
  std::string out;
  for (const uint8_t byte : hash.digest())
    for (const int nibble : {byte >> 4, byte & 15}) out += "0123456789abcdef"[nibble];
  return out;
}

}  // namespace edge_kv
