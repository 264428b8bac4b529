// put, attend and select: what a decoder asks of its state.
//
// A table is [slots, heads, dim], its rows f32, f16 or int8; int8 rows have scales [slots, heads, 1].
// Row i lies in slot i % slots and stands for the positions i * stride … i * stride + stride - 1. A
// query at p sees a row once the row's last position is not later than p, and of a table that keeps
// W rows the W newest.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "ops.h"

namespace edge_kv {
namespace {

constexpr int kBlockRows = 64;  // query rows of one task: its sums stay in the L2 cache
// Multiplications that are worth a thread, some 20 microseconds of them; reading a row counts as
// two queries.
constexpr int64_t kMinWork = 1 << 20;
constexpr int kReading = 2;
constexpr int64_t kPickedRows = 128;  // picked rows that are gathered at a time

struct Table {
  char* rows;
  float* scales;  // null unless int8
  int64_t slots;
  int heads, dim;
  Storage storage;

  size_t row_bytes() const {  // of one head
    return size_t(dim) * (storage == Storage::f32 ? 4 : storage == Storage::f16 ? 2 : 1);
  }
  char* row(int64_t slot, int head) const { return rows + (slot * heads + head) * row_bytes(); }
  float* scale(int64_t slot, int head) const {
    return scales ? scales + slot * heads + head : nullptr;
  }
};

Table table_of(const View& rows, const View& scales, const char* name) {
  if (rows.rank != 3 || rows.shape[1] > kMostOfAxis || rows.shape[2] > kMostOfAxis)
    refuse(name, " is ", rows, "; it must be [slots, heads, dim].");
  const Storage storage = rows.type == Type::f32   ? Storage::f32
                          : rows.type == Type::f16 ? Storage::f16
                                                   : Storage::int8;
  if (bool(scales) != (storage == Storage::int8))
    refuse(name, " is ", rows, " and its scales are ", scales, "; int8 rows have scales, no others.");
  if (scales && (scales.rank != 3 || scales.shape[0] != rows.shape[0] ||
                 scales.shape[1] != rows.shape[1] || scales.shape[2] != 1))
    refuse("The scales of ", name, " are ", scales, "; the rows are ", rows,
           ", so they must be [", rows.shape[0], ", ", rows.shape[1], ", 1].");
  return {rows.as<char>(), scales.as<float>(), rows.shape[0],
          int(rows.shape[1]), int(rows.shape[2]), storage};
}

Cache cache_of(const Table& keys, const Table& values, int head) {
  return {keys.row(0, head), keys.scale(0, head), values.row(0, head), values.scale(0, head),
          keys.slots,        keys.dim,            int64_t(keys.heads) * keys.dim,
          keys.heads,        keys.storage};
}

}  // namespace

void put(Call& call) {
  const View &rows = call.in[2], &start = call.in[3];
  const Table table = table_of(call.in[0], call.in[1], "table");
  if (rows.rank != 3 || rows.shape[1] != table.heads || rows.shape[2] != table.dim ||
      rows.shape[0] > table.slots)
    refuse("rows is ", rows, "; table is ", call.in[0], ", so it must be [at most ", table.slots, ", ",
           table.heads, ", ", table.dim, "].");
  const int64_t first = index_of(start, "start"), count = rows.shape[0];
  const Pool few{count * table.heads * table.dim < kMinWork / 8 ? 1 : call.pool.threads,
                 call.pool.run};
  parallel(few, count, [&](int64_t i) {
    const int64_t slot = (first + i) % table.slots;
    for (int h = 0; h < table.heads; ++h)
      call.kernels.store(rows.as<const float>() + (i * table.heads + h) * table.dim, table.dim,
                         table.storage, table.row(slot, h), table.scale(slot, h));
  });
}

namespace {

// What one softmax reads of one table pair.
struct Read {
  Table keys, values;
  int64_t stride, keep;
  const int64_t* picked;  // [tokens, picks]; null: all rows in view
  int64_t picks;
  // Of the picked rows of token t, those in view, in order and each once: `lists` from `ends[t]` on.
  std::vector<int64_t> lists, ends;

  // Rows in view of the query at p, back from the newest: [oldest(p), end(p)).
  int64_t end(int64_t p) const { return (p + 1) / stride; }
  int64_t oldest(int64_t p) const { return keep ? std::max<int64_t>(0, p - keep + 1) : 0; }
};

struct Asked {
  const float* q;     // [tokens, heads, dim]
  const float* sink;  // [heads] or null
  int64_t tokens, position;
  int heads, kv_heads, dim;
  float scale;

  int group() const { return heads / kv_heads; }
};

// The read whose inputs begin at `at`.
Read read_of(const Call& call, int at, int64_t which, const Asked& step) {
  const char* const names[] = {"keys1", "values1", "picked1", "keys2", "values2", "picked2"};
  const View &k = call.in[at], &v = call.in[at + 2], &picked = call.in[at + 4];
  const char* const* name = names + 3 * which;
  if (!v) refuse(name[0], " is given without ", name[1], ".");
  Read read{table_of(k, call.in[at + 1], name[0]), table_of(v, call.in[at + 3], name[1]),
            call.attributes[1].list[which], call.attributes[2].list[which], nullptr, 0, {}, {}};
  if (k.type != v.type || !std::equal(k.shape, k.shape + 3, v.shape))
    refuse(name[0], " is ", k, " and ", name[1], " is ", v, "; they must be alike.");
  if (read.keys.dim != step.dim || read.keys.heads != step.kv_heads)
    refuse(name[0], " is ", k, "; the step reads ", step.kv_heads, " heads of ", step.dim, ".");
  if (read.stride < 1 || read.stride >= kMostRows || read.keep < 0 || read.keep >= kMostRows)
    refuse("The stride ", read.stride, " or the keep ", read.keep, " of ", name[0],
           " is out of range.");
  if (read.keep && read.stride != 1)
    refuse(name[0], " has a stride of ", read.stride, " and a keep of ", read.keep,
           "; only a stride of 1 has a keep.");
  const int64_t last = step.position + step.tokens - 1;
  const int64_t seen = read.end(last) - read.oldest(step.position);
  if (seen > read.keys.slots)
    refuse(name[0], " holds ", read.keys.slots, " rows; the step at ", step.position, " with ",
           step.tokens, " tokens looks at ", seen, ".");
  if (picked) {
    if (picked.rank != 2 || picked.shape[0] != step.tokens)
      refuse(name[2], " is ", picked, "; it must be [", step.tokens, ", picks].");
    read.picked = picked.as<const int64_t>();
    read.picks = picked.shape[1];
    for (int64_t i = 0; i < picked.count(); ++i)
      if (read.picked[i] < -1 || read.picked[i] >= kMostRows)
        refuse(name[2], " holds ", read.picked[i], "; a pick is a row, or -1 for none.");
  }
  return read;
}

// Put the picks of every token in order: rows in view, each once.
void order_picks(const Pool& pool, const Asked& step, Read& read) {
  read.lists.assign(read.picked, read.picked + step.tokens * read.picks);
  read.ends.resize(size_t(step.tokens));
  parallel(pool, step.tokens, [&](int64_t t) {
    int64_t* const from = read.lists.data() + t * read.picks;
    const int64_t p = step.position + t;
    int64_t* to = std::remove_if(from, from + read.picks, [&](int64_t row) {
      return row < read.oldest(p) || row >= read.end(p);
    });
    std::sort(from, to);
    read.ends[size_t(t)] = std::unique(from, to) - from;
  });
}

char* gathered(size_t bytes) {
  static thread_local std::vector<char> memory;
  if (memory.size() < bytes) memory.resize(bytes);
  return memory.data();
}

// Fold share `share` of `shares` of the picked rows of token t into `partial`, which is that
// token's: rows are gathered into a small cache that all its queries see.
void fold_picked(const Kernels& kernels, const Read& read, int head, int64_t t, int share,
                 int shares, const float* queries, int group, const Partial& partial) {
  const int64_t* const rows = read.lists.data() + t * read.picks;
  const int64_t count = read.ends[size_t(t)];
  const int64_t end = count * (share + 1) / shares;
  const size_t bytes = read.keys.row_bytes();
  const bool same = read.keys.rows == read.values.rows && read.keys.scales == read.values.scales;
  for (int64_t at = count * share / shares; at < end; at += kPickedRows) {
    const int64_t n = std::min(kPickedRows, end - at);
    char* const keys = gathered(2 * kPickedRows * (bytes + sizeof(float)));
    float* const key_scales = reinterpret_cast<float*>(keys);
    float* const value_scales = key_scales + kPickedRows;
    char* const key_rows = reinterpret_cast<char*>(value_scales + kPickedRows);
    char* const value_rows = same ? key_rows : key_rows + kPickedRows * bytes;
    const auto gather = [&](const Table& table, char* to, float* scales) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t slot = rows[at + i] % table.slots;
        memcpy(to + size_t(i) * bytes, table.row(slot, head), bytes);
        scales[i] = table.scales ? *table.scale(slot, head) : 1.0f;
      }
    };
    gather(read.keys, key_rows, key_scales);
    if (!same) gather(read.values, value_rows, value_scales);
    const bool scaled = read.keys.scales != nullptr;
    const Cache cache{key_rows,
                      scaled ? key_scales : nullptr,
                      value_rows,
                      scaled ? (same ? key_scales : value_scales) : nullptr,
                      n,
                      read.keys.dim,
                      read.keys.dim,
                      1,
                      read.keys.storage};
    const Queries all{queries, group, group, n, 0};
    kernels.attend(cache, all, 0, n, partial);
  }
}

// A block of tokens of a step, and one of the equal shares of the rows that it reads.
struct Share {
  int64_t first, count;
  int number, of;
};

// Fold a share of what its tokens read into the partials of the heads.
void fold(const Kernels& kernels, const Asked& step, const Read& read, const Share& share,
          const float* queries, const Partial& partial) {
  const int group = step.group();
  const auto queries_of = [&](int head) {
    return queries + (head * step.tokens + share.first) * group * step.dim;
  };
  const auto partial_of = [&](int head, int64_t row) {
    const int64_t at = head * partial.next;
    return Partial{partial.top + at + row, partial.sum + at + row,
                   partial.mix + at + row * step.dim};
  };
  if (read.picked) {
    for (int head = 0; head < step.kv_heads; ++head)
      for (int64_t t = 0; t < share.count; ++t) {
        const int64_t row = t * group;
        fold_picked(kernels, read, head, share.first + t, share.number, share.of,
                    queries_of(head) + row * step.dim, group, partial_of(head, row));
      }
    return;
  }
  const int64_t position = step.position + share.first;
  const int64_t oldest = read.oldest(position);
  const int64_t rows = read.end(position + share.count - 1) - oldest;
  const int64_t begin = oldest + rows * share.number / share.of;
  const int64_t end = oldest + rows * (share.number + 1) / share.of;
  const int64_t of_head = step.tokens * group * step.dim;
  const Queries mine{queries_of(0), int(share.count) * group, group, position, read.keep,
                     read.stride,   of_head};
  Cache cache = cache_of(read.keys, read.values, 0);
  cache.heads = step.kv_heads;
  kernels.attend(cache, mine, begin, end, partial);
}

// The result of one query row from its partials, `next` floats apart, and the logit of its sink.
void finish(const Partial& first, int64_t row, size_t next, int shares, const float* sink, int dim,
            float* out) {
  const auto at = [&](const float* of, int s) { return of + size_t(s) * next; };
  float top = sink ? *sink : kMasked;
  for (int s = 0; s < shares; ++s) top = std::max(top, at(first.top, s)[row]);
  float sum = sink ? std::exp(*sink - top) : 0.0f;
  std::fill_n(out, dim, 0.0f);
  for (int s = 0; s < shares; ++s) {
    if (at(first.top, s)[row] == kMasked) continue;  // nothing in view
    const float factor = std::exp(at(first.top, s)[row] - top);
    const float* mix = at(first.mix, s) + row * dim;
    sum += factor * at(first.sum, s)[row];
    for (int d = 0; d < dim; ++d) out[d] += factor * mix[d];
  }
  if (sum > 0.0f)
    for (int d = 0; d < dim; ++d) out[d] /= sum;
}

}  // namespace

void attend(Call& call) {
  const View &q = call.in[0], &sink = call.in[2], &keys = call.in[3];
  const Attribute &strides = call.attributes[1], &keeps = call.attributes[2];
  if (q.rank != 3 || q.shape[0] > kMostOfAxis || q.shape[1] > kMostOfAxis ||
      q.shape[2] > kMostOfAxis || keys.rank != 3 || q.shape[1] % keys.shape[1])
    refuse("q is ", q, " and keys1 is ", keys,
           "; q must be [tokens, heads, dim], its heads a multiple of those of keys1.");
  const int64_t reads = call.in[8] ? 2 : 1;
  if (int64_t(strides.length) != reads || int64_t(keeps.length) != reads)
    refuse("There are ", reads, " reads, ", int64_t(strides.length), " strides and ",
           int64_t(keeps.length), " keeps; each read has one of both.");
  for (int i = 9; i < 13; ++i)
    if (reads == 1 && call.in[i]) refuse("keys2 is missing where other inputs of the second read are not.");
  if (sink && (sink.rank != 1 || sink.shape[0] != q.shape[1]))
    refuse("sink is ", sink, "; there are ", q.shape[1], " query heads.");
  const Asked step{q.as<const float>(), sink.as<const float>(), q.shape[0],
                  index_of(call.in[1], "pos"), int(q.shape[1]), int(keys.shape[1]),
                  int(q.shape[2]), float(call.attributes[0].real)};
  std::vector<Read> from;
  for (int64_t r = 0; r < reads; ++r) from.push_back(read_of(call, r ? 8 : 3, r, step));
  const View out = call.output_like(0, q);

  // One task is a block of tokens, all as long as can be; few more tokens than a block takes are one
  // all the same, since each block reads the rows again. Where that leaves threads idle (decoding),
  // the rows are split too and the shares are merged at the end.
  const int dim = step.dim, group = step.group();
  const int64_t most = std::max(1, kBlockRows / group);
  const int64_t blocks = step.tokens <= most * 3 / 2 ? 1 : (step.tokens + most - 1) / most;
  const int64_t block = (step.tokens + blocks - 1) / blocks;
  double work = 0;
  for (const Read& read : from) {
    const int64_t last = step.position + step.tokens - 1;
    const int64_t rows = read.end(last) - read.oldest(step.position);
    const double met = read.picked ? double(std::min(read.picks, rows)) * double(step.tokens)
                                   : double(rows) * double(blocks);
    const int64_t queries = read.picked ? group : std::min(step.tokens, block) * group;
    work += 2.0 * met * dim * step.kv_heads * double(queries + kReading);
  }
  const Pool team{int(std::min<double>(call.pool.threads, std::max(1.0, work / kMinWork))),
                  call.pool.run};
  for (Read& read : from)
    if (read.picked) order_picks(team, step, read);
  const int shares = int((team.threads + blocks - 1) / blocks);
  const int64_t rows = std::min(step.tokens, block) * group;
  // Whole cache lines each, since threads write them side by side.
  const auto lines = [](size_t floats) { return (floats + 15) / 16 * 16; };
  const size_t row_floats = lines(size_t(rows));
  const size_t partial_floats = 2 * row_floats + lines(size_t(rows) * dim);
  const size_t task_floats = size_t(step.kv_heads) * partial_floats;
  const size_t query_floats = lines(size_t(step.tokens) * step.heads * dim);

  float* const queries = scratch(query_floats + size_t(blocks) * shares * task_floats);
  float* const partials = queries + query_floats;
  parallel(team, step.tokens, [&](int64_t t) {
    for (int h = 0; h < step.heads; ++h) {  // [kv_head, token, group, dim]: a block's rows adjoin
      const float* x = step.q + (t * step.heads + h) * dim;
      float* to = queries + ((int64_t(h / group) * step.tokens + t) * group + h % group) * dim;
      for (int d = 0; d < dim; ++d) to[d] = x[d] * step.scale;
    }
  });
  const auto partial_of = [&](int64_t task, int head) {
    float* at = partials + size_t(task) * task_floats + size_t(head) * partial_floats;
    return Partial{at, at + row_floats, at + 2 * row_floats, int64_t(partial_floats)};
  };
  parallel(team, blocks * shares, [&](int64_t task) {
    const int64_t first = task / shares * block;
    for (int head = 0; head < step.kv_heads; ++head) {
      const Partial partial = partial_of(task, head);
      std::fill_n(partial.top, rows, kMasked);
      std::fill_n(partial.sum, rows, 0.0f);
      std::fill_n(partial.mix, size_t(rows) * dim, 0.0f);
    }
    const Share share{first, std::min(block, step.tokens - first), int(task % shares), shares};
    for (const Read& read : from)
      fold(call.kernels, step, read, share, queries, partial_of(task, 0));
  });
  parallel(team, step.tokens, [&](int64_t t) {
    for (int h = 0; h < step.heads; ++h)
      finish(partial_of(t / block * shares, h / group), t % block * group + h % group, task_floats,
             shares, step.sink ? step.sink + h : nullptr, dim,
             out.as<float>() + (t * step.heads + h) * dim);
  });
}

namespace {

// The indices of the k largest of n scores, in no order, then -1. Scores that are no numbers come
// last.
void choose(float* scores, int64_t n, int64_t k, int64_t* out) {
  const float least = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; ++i)
    if (!(scores[i] > least)) scores[i] = least;
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t(0));
  const int64_t chosen = std::min(k, n);
  if (chosen < n)
    std::nth_element(order.begin(), order.begin() + chosen, order.end(), [&](int64_t a, int64_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    });
  std::copy_n(order.begin(), chosen, out);
  std::fill(out + chosen, out + k, int64_t(-1));
}

}  // namespace

void select(Call& call) {
  const View &q = call.in[0], &weight = call.in[1], &rows = call.in[3];
  const int64_t k = call.attributes[0].whole, stride = call.attributes[1].whole;
  const Table table = table_of(rows, call.in[4], "rows");
  if (table.heads != 1) refuse("rows is ", rows, "; only rows of one head are selected.");
  if (q.rank != 3 || q.shape[0] > kMostOfAxis || q.shape[1] > kMostOfAxis ||
      q.shape[2] != table.dim)
    refuse("q is ", q, " and rows is ", rows, "; q must be [tokens, heads, ", table.dim, "].");
  const int64_t tokens = q.shape[0], heads = q.shape[1];
  if (weight.rank != 2 || weight.shape[0] != tokens || weight.shape[1] != heads)
    refuse("weight is ", weight, "; it must be [", tokens, ", ", heads, "].");
  if (k < 1 || k > kMostOfAxis) refuse("k is ", k, "; it must be 1 … ", kMostOfAxis, ".");
  if (stride < 1 || stride >= kMostRows) refuse("stride is ", stride, "; it is out of range.");
  const int64_t position = index_of(call.in[2], "pos");
  const int64_t all = (position + tokens) / stride;
  if (all > table.slots)
    refuse("rows holds ", table.slots, " rows; the step at ", position, " looks at ", all, ".");
  int64_t* const out = call.output(0, Type::int64, {tokens, k}).as<int64_t>();

  const Cache cache = cache_of(table, table, 0);
  const auto score = [&](int64_t t, int64_t begin, int64_t end, float* scores) {
    call.kernels.relu_scores(cache, q.as<const float>() + t * heads * table.dim, int(heads),
                             weight.as<const float>() + t * heads, begin, end, scores);
  };
  if (tokens == 1) {
    const int64_t shares = std::max(1, call.pool.threads);
    float* const scores = scratch(size_t(all) + 1);
    parallel(call.pool, shares, [&](int64_t share) {
      const int64_t begin = all * share / shares, end = all * (share + 1) / shares;
      score(0, begin, end, scores + begin);
    });
    choose(scores, all, k, out);
    return;
  }
  parallel(call.pool, tokens, [&](int64_t t) {
    const int64_t end = (position + t + 1) / stride;
    auto* const scores = reinterpret_cast<float*>(gathered((size_t(end) + 1) * sizeof(float)));
    score(t, 0, end, scores);
    choose(scores, end, k, out + t * k);
  });
}

}  // namespace edge_kv
