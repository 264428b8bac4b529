// Runs the kernels on requests from stdin: for tests of another CPU's build, emulated.
//
// Called with "dense": a Product, then x, packed rows and scales; the reply is an int64 status and
// the result. Otherwise attention: a request is a Request, then the arrays cos, sin, q_norm, k_norm, keys, key scales, values, value
// scales, q, k, v; the reply is an int64 status, then keys, key scales, values, value scales, out.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernel_interface.cpp"

namespace {

struct Request {
  char isa[16];
  int64_t storage, key_zero, kv_heads, slots, dim, position, tokens, q_heads, window;
  int64_t v_norm, threads, has_q, has_kv;
  double eps, scale;
};

struct Bytes {
  std::vector<char> data;
  explicit Bytes(int64_t size) : data(size_t(size)) {}
  void read() {
    if (fread(data.data(), 1, data.size(), stdin) != data.size()) exit(2);
  }
  void write() const { fwrite(data.data(), 1, data.size(), stdout); }
  float* floats() { return reinterpret_cast<float*>(data.data()); }
};

struct Product {
  char isa[16];
  int64_t tokens, n_out, n_in, bits, block;
};

void answer_products() {
  Product p;
  while (fread(&p, sizeof p, 1, stdin) == 1) {
    Bytes x(p.tokens * p.n_in * 4), packed(p.n_out * p.n_in * p.bits / 8);
    Bytes scales(p.n_out * p.n_in / p.block * 4), out(p.tokens * p.n_out * 4);
    for (Bytes* part : {&x, &packed, &scales}) part->read();
    const int64_t status = edge_kv_linear(
        p.isa, 1, true, x.floats(), p.tokens, reinterpret_cast<uint8_t*>(packed.data.data()),
        scales.floats(), p.n_out, p.n_in, int(p.bits), p.block, out.floats());
    fwrite(&status, sizeof status, 1, stdout);
    out.write();
    fflush(stdout);
  }
}

}  // namespace

int main(int count, char** words) {
  if (count > 1 && !strcmp(words[1], "dense")) {
    answer_products();
    return 0;
  }
  Request r;
  while (fread(&r, sizeof r, 1, stdin) == 1) {
    const int64_t width = r.storage == 0 ? 4 : r.storage == 1 ? 2 : 1;
    const int64_t rows = r.kv_heads * r.slots, scaled = r.storage == 2 ? rows * 4 : 0;
    const int64_t angles = r.tokens * r.dim / 2 * 4, norm = r.dim * 4;
    const int64_t queries = r.tokens * r.q_heads * r.dim * 4;
    const int64_t stored = r.tokens * r.kv_heads * r.dim * 4;
    Bytes cos(angles), sin(angles), q_norm(norm), k_norm(norm);
    Bytes keys(rows * r.dim * width), key_scales(scaled);
    Bytes values(rows * r.dim * width), value_scales(scaled);
    Bytes q(r.has_q ? queries : 0), k(r.has_kv ? stored : 0), v(r.has_kv ? stored : 0);
    for (Bytes* part : {&cos, &sin, &q_norm, &k_norm, &keys, &key_scales, &values, &value_scales,
                        &q, &k, &v})
      part->read();
    Bytes out(queries);
    const edge_kv_layer layer{keys.data.data(), scaled ? key_scales.floats() : nullptr,
                              values.data.data(), scaled ? value_scales.floats() : nullptr,
                              r.slots, int32_t(r.kv_heads), int32_t(r.dim), int32_t(r.storage),
                              int32_t(r.key_zero)};
    const edge_kv_step step{cos.floats(), sin.floats(), r.position, int32_t(r.tokens),
                            int32_t(r.q_heads), r.window, float(r.eps), float(r.scale),
                            int32_t(r.v_norm), int32_t(r.threads)};
    const int64_t status = edge_kv_attention(
        r.isa, &layer, &step, r.has_q ? q.floats() : nullptr, r.has_kv ? k.floats() : nullptr,
        r.has_kv ? v.floats() : nullptr, q_norm.floats(), k_norm.floats(), out.floats());
    fwrite(&status, sizeof status, 1, stdout);
    for (const Bytes* part : {&keys, &key_scales, &values, &value_scales, &out}) part->write();
    fflush(stdout);
  }
}
