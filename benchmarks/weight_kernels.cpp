// The products of one decoded token, timed beside a plain read of the same memory.
//
//   kernels  [passes]
//
// A set of matrices of a format, far larger than the caches, is multiplied in order with T tokens on
// a pool of threads; before and after every pass the same bytes are read and nothing else. Prints a
// line of JSON for each format and T.
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernel_interface.cpp"

namespace {

using edge_kv::Format;
using edge_kv::Weights;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

struct Product {
  int64_t rows, cols;
  int qat_bits;  // of the QAT mobile release
};

// The products of a token of Gemma 4 E2B in their order.
std::vector<Product> e2b() {
  std::vector<Product> p;
  for (int layer = 0; layer < 35; ++layer) {
    const int64_t head = layer % 5 == 4 ? 512 : 256, width = layer < 15 ? 6144 : 12288;
    p.push_back({8 * head, 1536, 4});
    if (layer < 15) p.push_back({head, 1536, 4}), p.push_back({head, 1536, 4});
    p.push_back({1536, 8 * head, 4});
    p.push_back({width, 1536, layer < 15 ? 4 : 2});
    p.push_back({width, 1536, layer < 15 ? 4 : 2});
    p.push_back({1536, width, layer < 15 ? 4 : 2});
    p.push_back({256, 1536, 8});
    p.push_back({1536, 256, 8});
  }
  p.push_back({8960, 1536, 4});
  for (int part = 0; part < 8; ++part) p.push_back({262144 / 8, 1536, 2});
  return p;
}

volatile uint64_t sink;

// Bytes a second of a plain read, each thread a stretch.
double plain_read(const edge_kv::Pool& pool, const uint8_t* data, int64_t bytes) {
  const double begin = now();
  edge_kv::parallel(pool, pool.threads, [&](int64_t i) {
    const int64_t words = bytes / 8, from = words * i / pool.threads / 64 * 64;
    const int64_t to = words * (i + 1) / pool.threads / 64 * 64;
    const auto* p = reinterpret_cast<const uint64_t*>(data);
    uint64_t sums[64] = {};
    for (int64_t at = from; at < to; at += 64) {
      for (int line = 0; line < 8; ++line) __builtin_prefetch(p + at + line * 8 + 768);
      for (int j = 0; j < 64; ++j) sums[j] += p[at + j];
    }
    uint64_t sum = 0;
    for (const uint64_t s : sums) sum += s;
    sink = sum;
  });
  return double(bytes) / (now() - begin);
}

}  // namespace

int main(int count, char** words) {
  const int passes = count > 1 ? atoi(words[1]) : 9;
  const int threads = count > 2 ? atoi(words[2]) : 2;
  const bool huge = count > 3 && !strcmp(words[3], "huge");
  wanted_threads = threads;
  const edge_kv::Pool pool{threads, run_on_threads};
  const edge_kv::Kernels& kernels = edge_kv::best_kernels();
  const std::vector<Product> products = e2b();
  const int64_t most = int64_t(1300) << 20;
  auto* memory = static_cast<uint8_t*>(mmap(nullptr, size_t(most) + (4 << 20), PROT_READ | PROT_WRITE,
                                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED) return 1;
  memory = reinterpret_cast<uint8_t*>((uintptr_t(memory) + (2 << 20) - 1) >> 21 << 21);
  madvise(memory, size_t(most), huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  uint64_t state = 88172645463325252ull;
  for (int64_t i = 0; i < most / 8; ++i) {  // bytes that are sane as scales of every kind
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    reinterpret_cast<uint64_t*>(memory)[i] = (state & 0x0f0f0f0f0f0f0f0full) | 0x3030303030303030ull;
  }
  std::vector<float> x(8 * 12288), out(8 * 262144);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(int(i * 7919 % 2001) - 1000) * 1e-3f;
  const char* names[] = {"int4-s8", "code4-s8", "int4-f16", "int8-f16", "int4-row", "qat"};
  for (const char* name : names) {
    double first = 0;
    for (const int64_t tokens : {1, 2, 3, 4, 6, 8}) {
      std::vector<Weights> all;
      int64_t bytes = 0, values = 0;
      for (const Product& p : products) {
        const char* of = p.qat_bits == 2 ? "int2-row" : p.qat_bits == 4 ? "int4-row" : "int8-row";
        const Format* format = edge_kv::find_format(strcmp(name, "qat") ? name : of);
        if (bytes % most + edge_kv::weight_bytes(*format, p.rows, p.cols) > most)
          bytes = (bytes + most - 1) / most * most;  // begin again at the front
        all.push_back({format, memory + bytes % most, p.rows, p.cols});
        bytes += edge_kv::weight_bytes(*format, p.rows, p.cols);
        values += p.rows * p.cols;
      }
      int64_t read = 0;
      for (const Weights& w : all) read += edge_kv::weight_bytes(*w.format, w.rows, w.cols);
      std::vector<double> times, fractions, plain;
      for (int pass = 0; pass <= passes; ++pass) {
        const double before = plain_read(pool, memory, std::min(read, most));
        const double begin = now();
        for (const Weights& w : all)
          edge_kv::linear_q(kernels, pool, x.data(), tokens, w, 0.0f, out.data());
        const double taken = now() - begin;
        const double after = plain_read(pool, memory, std::min(read, most));
        if (!pass) continue;
        times.push_back(taken);
        plain.push_back((before + after) / 2);
        fractions.push_back(double(read) / taken / plain.back());
      }
      if (tokens == 1) first = median(times);
      printf("{\"format\": \"%s\", \"kernels\": \"%s\", \"tokens\": %d, \"threads\": %d, \"huge_pages\": %s, "
             "\"bits\": %.3f, \"bytes\": %lld, \"ms\": %.2f, \"read_gbs\": %.1f, "
             "\"of_read\": %.3f, \"of_one_token\": %.2f}\n",
             name, kernels.name, int(tokens), threads, huge ? "true" : "false",
             double(read) * 8 / double(values), (long long)read, median(times) * 1e3,
             median(plain) * 1e-9, median(fractions), median(times) / first);
      fflush(stdout);
    }
  }
}
