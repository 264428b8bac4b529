#include "weights.h"

#include <algorithm>
#include <cstring>

namespace edge_kv {
namespace {

constexpr int64_t kTaskBytes = 2 << 20;     // weights of one task: smaller ones cost speed
constexpr int64_t kWorthThreads = 1 << 16;  // bytes of weights, times tokens, of a task

constexpr Format kFormats[] = {
    {"int4-s8", 4, Scale::s8, false},  {"int4-f16", 4, Scale::f16, false},
    {"code4-s8", 4, Scale::s8, true},  {"code4-f16", 4, Scale::f16, true},
    {"int8-s8", 8, Scale::s8, false},  {"int8-f16", 8, Scale::f16, false},
    {"int2-row", 2, Scale::row, false}, {"int4-row", 4, Scale::row, false},
    {"int8-row", 8, Scale::row, false},
};

int64_t blocks_of(int64_t cols) { return (cols + kBlockValues - 1) / kBlockValues; }

}  // namespace

const Format* find_format(const char* name) {
  for (const Format& format : kFormats)
    if (!strcmp(format.name, name)) return &format;
  return nullptr;
}

int64_t group_bytes(const Format& f, int64_t cols) {
  const int64_t blocks = blocks_of(cols), served = f.served();
  const int64_t scales = served ? (blocks + served - 1) / served : 0;
  return (f.head() + scales + blocks * f.bits) * kLineBytes;
}

int64_t weight_bytes(const Format& f, int64_t rows, int64_t cols) {
  return (rows + kGroupRows - 1) / kGroupRows * group_bytes(f, cols);
}

int64_t rounded_bytes(int64_t tokens, int64_t cols) { return tokens * rounded_stride(cols); }

Rounded round_activations(const Kernels& kernels, const Pool& pool, const float* x, int64_t tokens,
                          int64_t cols, float step, void* memory) {
  auto* to = static_cast<uint8_t*>(memory);
  const int64_t tasks = tokens * cols < kWorthThreads ? 1 : std::min<int64_t>(tokens, 4 * pool.threads);
  parallel(pool, tasks, [&](int64_t i) {
    for (int64_t t = tokens * i / tasks; t < tokens * (i + 1) / tasks; ++t)
      kernels.round_row(x + t * cols, cols, step, to + t * rounded_stride(cols));
  });
  return {to, tokens, cols};
}

int64_t tasks_of(const Pool& pool, const Weights& w, int64_t tokens) {
  const int64_t groups = (w.rows + kGroupRows - 1) / kGroupRows;
  const int64_t bytes = groups * group_bytes(*w.format, w.cols);
  const int64_t each = std::max<int64_t>(1, bytes / (kTaskBytes * pool.threads));
  const int64_t worth = std::max<int64_t>(1, bytes * tokens / kWorthThreads);
  return std::min({groups, each * pool.threads, worth});
}

void Finish::operator()(const Kernels& kernels, float* values, int64_t count) const {
  if (step != 0.0f) kernels.to_steps(values, count, step, values);
  if (cap != 0.0f) kernels.softcap(values, count, cap, values);
}

void multiply(const Kernels& kernels, const Pool& pool, const Rounded& x, const Weights& w,
              float* out, int64_t stride, Finish finish) {
  const int64_t groups = (w.rows + kGroupRows - 1) / kGroupRows, bytes = group_bytes(*w.format, w.cols);
  const int64_t tasks = tasks_of(pool, w, x.tokens);
  parallel(pool, tasks, [&](int64_t i) {
    const int64_t begin = groups * i / tasks, end = groups * (i + 1) / tasks;
    const int64_t first = begin * kGroupRows, rows = std::min(w.rows, end * kGroupRows) - first;
    kernels.multiply(*w.format, w.data + begin * bytes, end - begin, blocks_of(w.cols), x.data,
                     rounded_stride(w.cols), x.tokens, out + first, stride, w.rows - first);
    for (int64_t t = 0; t < x.tokens; ++t) finish(kernels, out + t * stride + first, rows);
  });
}

void linear_q(const Kernels& kernels, const Pool& pool, const float* x, int64_t tokens,
              const Weights& w, float step, float* out, Finish finish) {
  void* memory = scratch(size_t(rounded_bytes(tokens, w.cols)) / sizeof(float));
  multiply(kernels, pool, round_activations(kernels, pool, x, tokens, w.cols, step, memory), w, out,
           w.rows, finish);
}

void linear_exact(const Kernels& kernels, const Pool& pool, const float* x, int64_t tokens,
                  const Weights& w, float* out, Finish finish) {
  float* const values = scratch(size_t(pool.threads * w.cols));
  parallel(pool, pool.threads, [&](int64_t i) {
    for (int64_t row = w.rows * i / pool.threads; row < w.rows * (i + 1) / pool.threads; ++row) {
      embed_row(w, row, values + i * w.cols);
      for (int64_t t = 0; t < tokens; ++t)
        out[t * w.rows + row] = kernels.dot(x + t * w.cols, values + i * w.cols, int(w.cols));
    }
  });
  parallel(pool, tokens, [&](int64_t t) { finish(kernels, out + t * w.rows, w.rows); });
}

void embed_row(const Weights& w, int64_t row, float* out) {
  const Format& f = *w.format;
  const uint8_t* line = w.data + row / kGroupRows * group_bytes(f, w.cols);
  const int64_t lane = row % kGroupRows, parts = 8 / f.bits, served = f.served();
  const uint8_t mask = uint8_t((1 << f.bits) - 1);
  float row_scale = 1.0f;
  if (f.head()) {
    memcpy(&row_scale, line + lane * 4, sizeof(float));
    line += kLineBytes;
  }
  const uint8_t* scales = line;
  for (int64_t b = 0; b < blocks_of(w.cols); ++b) {
    float scale = 1.0f;
    if (served) {
      if (b % served == 0) scales = line, line += kLineBytes;
      const int64_t at = b % served * kGroupRows + lane;
      if (f.scale == Scale::s8) {
        scale = float(reinterpret_cast<const int8_t*>(scales)[at]);
      } else {
        uint16_t half;
        memcpy(&half, scales + at * 2, sizeof half);
        scale = half_to_float(half);
      }
    }
    scale *= row_scale;
    for (int64_t i = 0; i < kBlockValues && b * kBlockValues + i < w.cols; ++i) {
      const int64_t within = i % (4 * parts);
      const uint8_t byte = line[i / (4 * parts) * kLineBytes + lane * 4 + within % 4];
      const int stored = byte >> within / 4 * f.bits & mask;
      const int code = f.levels ? kLevels[stored] : stored - (1 << (f.bits - 1));
      out[b * kBlockValues + i] = float(code) * scale;
    }
    line += f.bits * kLineBytes;
  }
}

}  // namespace edge_kv
