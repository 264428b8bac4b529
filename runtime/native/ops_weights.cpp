// linear_q, embed_q, experts_q and glu_q: stored matrices (weights.h) and their products.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "expert_bank.h"
#include "ops.h"
#include "weights.h"

namespace edge_kv {
namespace {

constexpr int64_t kMinValues = 1 << 16;  // worth a thread

const Format& format_of(std::string_view name, const char* attribute) {
  const Format* format = find_format(std::string(name).c_str());
  if (!format) refuse(attribute, " is \"", name, "\"; no weights are stored so.");
  return *format;
}

// A matrix [rows, cols] stored in `axes` [groups, bytes of a group].
Weights weights_of(const View& packed, const int64_t* axes, const char* name, const Format& format,
                   int64_t rows, int64_t cols) {
  if (rows < 1 || cols < 1 || rows >= kMostRows || cols >= kMostRows)
    refuse(name, " is to hold ", rows, " rows and ", cols, " columns, which is out of range.");
  const int64_t groups = (rows + kGroupRows - 1) / kGroupRows, bytes = group_bytes(format, cols);
  if (axes[0] != groups || axes[1] != bytes)
    refuse(name, " is ", packed, "; a matrix of ", rows, " rows and ", cols, " columns in ",
           format.name, " is [", groups, ", ", bytes, "].");
  if (reinterpret_cast<uintptr_t>(packed.data) % 4)
    refuse(name, " does not begin at a multiple of 4 bytes.");
  return {&format, packed.as<const uint8_t>(), rows, cols};
}

}  // namespace

namespace {

// A step that an attribute gives; 0: none.
float step_of(const Attribute& attribute, const char* name) {
  const float step = float(attribute.real);
  if (!(step >= 0 && step < 1e30f)) refuse(name, " is ", double(step), "; it must be 0 or more.");
  return step;
}

}  // namespace

void linear_q(Call& call) {
  const View &x = call.in[0], &packed = call.in[1];
  const int64_t rows = call.attributes[0].whole;
  const Format& format = format_of(call.attributes[1].text, "format");
  const float step = step_of(call.attributes[2], "step");
  const Finish finish{step_of(call.attributes[3], "out_step"), step_of(call.attributes[4], "cap")};
  if (x.rank != 2) refuse("x is ", x, "; it must be [tokens, values].");
  if (packed.rank != 2) refuse("packed is ", packed, "; it must be [groups, bytes].");
  const Weights weights = weights_of(packed, packed.shape, "packed", format, rows, x.shape[1]);
  const View out = call.output(0, Type::f32, {x.shape[0], rows});
  if (call.exact && step == 0)
    linear_exact(call.kernels, call.pool, x.as<const float>(), x.shape[0], weights,
                 out.as<float>(), finish);
  else
    linear_q(call.kernels, call.pool, x.as<const float>(), x.shape[0], weights, step,
             out.as<float>(), finish);
}

void embed_q(Call& call) {
  const View &ids = call.in[0], &packed = call.in[1];
  const int64_t width = call.attributes[0].whole;
  const Format& format = format_of(call.attributes[1].text, "format");
  if (ids.rank != 1) refuse("ids is ", ids, "; it must be [tokens].");
  if (packed.rank != 2) refuse("packed is ", packed, "; it must be [groups, bytes].");
  const int64_t rows = packed.shape[0] * kGroupRows;
  const Weights weights = weights_of(packed, packed.shape, "packed", format, rows, width);
  for (int64_t t = 0; t < ids.shape[0]; ++t)
    if (const int64_t id = ids.as<const int64_t>()[t]; id < 0 || id >= rows)
      refuse("ids holds ", id, "; there are ", rows, " rows.");
  const View out = call.output(0, Type::f32, {ids.shape[0], width});
  const Pool team{ids.shape[0] * width < kMinValues ? 1 : call.pool.threads, call.pool.run};
  parallel(team, ids.shape[0], [&](int64_t t) {
    embed_row(weights, ids.as<const int64_t>()[t], out.as<float>() + t * width);
  });
}

namespace {

// What experts_q and glu_q are told of the gated units between their products.
struct Unit {
  int64_t width;
  Activation activation;
  float limit;
};

// Of activations x [tokens, values].
Unit unit_of(const View& x, const Attribute& width, const Attribute& act, const Attribute& limit) {
  if (x.rank != 2 || x.shape[1] > kMostOfAxis) refuse("x is ", x, "; it must be [tokens, values].");
  if (width.whole < 1 || width.whole > kMostOfAxis)
    refuse("width is ", width.whole, "; it is out of range.");
  const bool silu = act.text == "silu";
  if (!silu && act.text != "gelu_tanh")
    refuse("act is \"", act.text, "\"; it must be \"silu\" or \"gelu_tanh\".");
  const float most = float(limit.real);
  if (!(most >= 0)) refuse("limit is ", double(most), "; it must be 0 (none) or more.");
  return {width.whole, silu ? Activation::silu : Activation::gelu_tanh, most};
}

// The matrices of all experts, one after the other: packed in a format, or f32 [E, rows, cols].
struct Stack {
  const Format* format;  // null: f32
  const char* data;
  int64_t experts, rows, cols;

  int64_t groups() const { return (rows + kGroupRows - 1) / kGroupRows; }
  // Of one matrix.
  int64_t bytes() const { return format ? weight_bytes(*format, rows, cols) : rows * cols * 4; }
  const char* of(int64_t expert) const { return data + expert * bytes(); }
};

Stack stack_of(const View& view, const char* name, std::string_view format, int64_t rows,
               int64_t cols) {
  if (view.rank != 3 || (view.type != Type::f32 && view.type != Type::uint8))
    refuse(name, " is ", view, "; it must be f32 or uint8 with three axes.");
  if (view.type == Type::f32) {
    if (view.shape[1] != rows || view.shape[2] != cols)
      refuse(name, " is ", view, "; it must be [experts, ", rows, ", ", cols, "].");
    return {nullptr, view.as<const char>(), view.shape[0], rows, cols};
  }
  const Format& stored = format_of(format, name);
  weights_of(view, view.shape + 1, name, stored, rows, cols);
  return {&stored, view.as<const char>(), view.shape[0], rows, cols};
}

// One expert that some tokens chose: these are the pairs begin … end - 1 of Chosen.
struct Expert {
  int64_t number, begin, end;
};

// (token, place of its choice) pairs in the order of their experts.
struct Chosen {
  std::vector<int64_t> pairs;  // token * k + place
  std::vector<Expert> experts;
};

Chosen choose(const View& index, int64_t experts) {
  const int64_t* of = index.as<const int64_t>();
  Chosen out;
  for (int64_t i = 0; i < index.count(); ++i)
    if (of[i] >= 0 && of[i] < experts) out.pairs.push_back(i);
  std::stable_sort(out.pairs.begin(), out.pairs.end(),
                   [&](int64_t a, int64_t b) { return of[a] < of[b]; });
  for (int64_t i = 0; i < int64_t(out.pairs.size()); ++i) {
    const int64_t expert = of[out.pairs[size_t(i)]];
    if (out.experts.empty() || out.experts.back().number != expert)
      out.experts.push_back({expert, i, i});
    out.experts.back().end = i + 1;
  }
  return out;
}

// Rows of activations, rounded where a stack is packed.
struct Rows {
  char* first;
  int64_t stride;  // bytes of a row

  char* row(int64_t i) const { return first + i * stride; }
};

bool rounds(const Call& call, const Stack& with) { return with.format && !call.exact; }

int64_t row_bytes(const Call& call, const Stack& with) {
  return rounds(call, with) ? rounded_stride(with.cols) : with.cols * 4;
}

void prepare(const Call& call, const Stack& with, const float* x, char* row) {
  if (rounds(call, with)) {
    call.kernels.round_row(x, with.cols, 0.0f, reinterpret_cast<uint8_t*>(row));
  } else {
    memcpy(row, x, size_t(with.cols) * 4);
  }
}

// Where some experts' matrices of a stack lie while they are used: in the bank, or mapped.
class Matrices {
 public:
  Matrices(ExpertBank* bank, const Stack& stack, const Expert* first, const Expert* last)
      : bank_(bank) {
    for (const Expert* expert = first; expert < last; ++expert)
      mapped_.push_back(stack.of(expert->number));
    if (bank)
      for (const char* matrix : mapped_) bank->want(matrix, size_t(stack.bytes()));
  }
  ~Matrices() {
    if (bank_)
      for (const char* matrix : mapped_) bank_->release(matrix);
  }
  Matrices(const Matrices&) = delete;
  Matrices& operator=(const Matrices&) = delete;

  int64_t size() const { return int64_t(mapped_.size()); }

  // Of the experts in their order, read by now.
  std::vector<const char*> take() const {
    std::vector<const char*> held = mapped_;
    if (bank_)
      for (const char*& matrix : held) matrix = bank_->take(matrix);
    return held;
  }

 private:
  ExpertBank* bank_;
  std::vector<const char*> mapped_;
};

// out [pairs, stride]: the experts' matrices times the rows of their pairs. An expert is cut into
// parts where there are fewer of them than threads.
void multiply_chosen(const Call& call, const Stack& stack, const Expert* experts,
                     const std::vector<const char*>& matrices, const Rows& rows, float* out,
                     int64_t stride) {
  const int64_t count = int64_t(matrices.size());
  const int64_t parts = std::min((call.pool.threads + count - 1) / count, stack.groups());
  parallel(call.pool, count * parts, [&](int64_t task) {
    const Expert& expert = experts[task / parts];
    const int64_t begin = stack.groups() * (task % parts) / parts;
    const int64_t end = stack.groups() * (task % parts + 1) / parts;
    const int64_t first = begin * kGroupRows, tokens = expert.end - expert.begin;
    const char* matrix = matrices[size_t(task / parts)];
    float* to = out + expert.begin * stride;
    if (rounds(call, stack)) {
      const int64_t bytes = group_bytes(*stack.format, stack.cols);
      call.kernels.multiply(*stack.format,
                            reinterpret_cast<const uint8_t*>(matrix) + begin * bytes, end - begin,
                            (stack.cols + kBlockValues - 1) / kBlockValues,
                            reinterpret_cast<const uint8_t*>(rows.row(expert.begin)), rows.stride,
                            tokens, to + first, stride, stack.rows - first);
      return;
    }
    std::vector<float> values(size_t(stack.format ? stack.cols : 0));
    for (int64_t r = first; r < std::min(stack.rows, end * kGroupRows); ++r) {
      const float* row = reinterpret_cast<const float*>(matrix) + r * stack.cols;
      if (stack.format) {
        const auto* packed = reinterpret_cast<const uint8_t*>(matrix);
        embed_row({stack.format, packed, stack.rows, stack.cols}, r, values.data());
        row = values.data();
      }
      for (int64_t t = 0; t < tokens; ++t)
        to[t * stride + r] =
            call.kernels.dot(reinterpret_cast<const float*>(rows.row(expert.begin + t)), row,
                             int(stack.cols));
    }
  });
}

}  // namespace

void experts_q(Call& call) {
  const View &x = call.in[0], &index = call.in[1], &weight = call.in[2];
  const Unit unit = unit_of(x, call.attributes[0], call.attributes[3], call.attributes[4]);
  const int64_t tokens = x.shape[0], dim = x.shape[1], width = unit.width;
  if (index.rank != 2 || index.shape[0] != tokens)
    refuse("index is ", index, "; it must be [", tokens, ", choices].");
  if (weight.rank != 2 || weight.shape[0] != tokens || weight.shape[1] != index.shape[1])
    refuse("weight is ", weight, " and index is ", index, "; they must have the same shape.");
  const Stack into = stack_of(call.in[3], "gate_up", call.attributes[1].text, 2 * width, dim);
  const Stack back = stack_of(call.in[4], "down", call.attributes[2].text, dim, width);
  if (into.experts != back.experts)
    refuse("gate_up is ", call.in[3], " and down is ", call.in[4],
           "; they must hold as many experts.");
  const View out = call.output_like(0, x);

  // All tokens of one expert meet it together; its two matrices are read once. With a bank, experts
  // come in parts: while one is multiplied the next is read.
  const Chosen chosen = choose(index, into.experts);
  const int64_t pairs = int64_t(chosen.pairs.size()), k = index.shape[1];
  std::fill_n(out.as<float>(), tokens * dim, 0.0f);
  if (pairs == 0) return;
  const Pool team{pairs * std::max(dim, width) < kMinValues ? 1 : call.pool.threads, call.pool.run};
  const auto token = [&](int64_t pair) { return chosen.pairs[size_t(pair)] / k; };
  const int64_t stride = std::max(2 * width, dim), floats = pairs * stride;
  const int64_t bytes = pairs * (row_bytes(call, into) + row_bytes(call, back));
  float* const products = scratch(size_t(floats + bytes / 4 + 1));
  const Rows given{reinterpret_cast<char*>(products + floats), row_bytes(call, into)};
  const Rows hidden{given.row(pairs), row_bytes(call, back)};
  parallel(team, pairs, [&](int64_t i) {
    prepare(call, into, x.as<const float>() + token(i) * dim, given.row(i));
  });
  const std::shared_ptr<ExpertBank> shared = expert_bank();
  const int64_t room = shared ? shared->room(size_t(into.bytes() + back.bytes())) : 0;
  ExpertBank* const bank = room ? shared.get() : nullptr;
  const int64_t count = int64_t(chosen.experts.size());
  const int64_t part = bank ? std::clamp<int64_t>(room / 2, 1, count) : count;
  const Expert* const experts = chosen.experts.data();
  struct Part {
    Matrices into, back;
  };
  const auto begin = [&](int64_t first) {
    const Expert* const from = experts + first;
    const Expert* const to = experts + std::min(first + part, count);
    return std::unique_ptr<Part>(new Part{{bank, into, from, to}, {bank, back, from, to}});
  };
  std::unique_ptr<Part> now = begin(0), next;
  for (int64_t first = 0; first < count; first += part) {
    const Expert* const from = experts + first;
    if (first + part < count && room > 1) next = begin(first + part);
    multiply_chosen(call, into, from, now->into.take(), given, products, stride);
    const int64_t start = from->begin;
    parallel(team, from[now->into.size() - 1].end - start, [&](int64_t i) {
      float* gate = products + (start + i) * stride;
      call.kernels.gated(gate, gate + width, width, unit.activation, unit.limit, gate);
      prepare(call, back, gate, hidden.row(start + i));
    });
    multiply_chosen(call, back, from, now->back.take(), hidden, products, stride);
    now = std::move(next);
    if (first + part < count && !now) now = begin(first + part);
  }
  std::vector<int64_t> where(size_t(tokens * k), -1);  // of a token's choice, its pair
  for (int64_t i = 0; i < pairs; ++i) where[size_t(chosen.pairs[size_t(i)])] = i;
  parallel(team, tokens, [&](int64_t t) {
    float* to = out.as<float>() + t * dim;
    for (int64_t choice = t * k; choice < (t + 1) * k; ++choice) {
      if (where[size_t(choice)] < 0) continue;
      const float share = weight.as<const float>()[choice];
      const float* from = products + where[size_t(choice)] * stride;
      for (int64_t d = 0; d < dim; ++d) to[d] += share * from[d];
    }
  });
}

namespace {

// What glu_q rounds to, where it is not 0: x, the results of gate and of up, what down is given and
// what it gives.
struct Steps {
  float given, gate, up, hidden, out;
};

// What glu_q computes, of activations as they are: slow, as `linear_exact`.
void glu_exact(const Call& call, const View& x, const Weights& gate, const Weights* up,
               const View& factor, const Weights& down, const Unit& unit, const Steps& steps,
               float* out) {
  const int64_t tokens = x.shape[0], count = tokens * gate.rows;
  std::vector<float> opened(static_cast<size_t>(count)), lifted(up ? size_t(count) : 0);
  const auto multiply = [&](const float* from, float step, const Weights& by, float* to,
                            float out_step) {
    if (step == 0.0f)
      linear_exact(call.kernels, call.pool, from, tokens, by, to, {out_step});
    else
      linear_q(call.kernels, call.pool, from, tokens, by, step, to, {out_step});
  };
  multiply(x.as<const float>(), steps.given, gate, opened.data(), steps.gate);
  if (up) multiply(x.as<const float>(), steps.given, *up, lifted.data(), steps.up);
  call.kernels.gated(opened.data(), up ? lifted.data() : factor.as<const float>(), count,
                     unit.activation, unit.limit, opened.data());
  multiply(opened.data(), steps.hidden, down, out, steps.out);
}

}  // namespace

// down(act(gate(x)) * up(x)): a task computes the same rows of gate and up and their product, so that
// threads meet twice.
void glu_q(Call& call) {
  const View &x = call.in[0], &factor = call.in[3];
  const Unit unit = unit_of(x, call.attributes[0], call.attributes[4], call.attributes[5]);
  const int64_t tokens = x.shape[0], dim = x.shape[1], width = unit.width;
  if (bool(call.in[2]) == bool(factor)) refuse("up or factor must be given, and not both.");
  if (factor && (factor.rank != 2 || factor.shape[0] != tokens || factor.shape[1] != width))
    refuse("factor is ", factor, "; it must be [", tokens, ", ", width, "].");
  const auto stored = [&](int at, int attribute, const char* name, int64_t rows, int64_t cols) {
    const View& packed = call.in[at];
    if (packed.rank != 2) refuse(name, " is ", packed, "; it must be [groups, bytes].");
    const Format& format = format_of(call.attributes[attribute].text, name);
    return weights_of(packed, packed.shape, name, format, rows, cols);
  };
  const Weights gate = stored(1, 1, "gate", width, dim), down = stored(4, 3, "down", dim, width);
  const Weights up = factor ? gate : stored(2, 2, "up", width, dim);
  const auto step = [&](int attribute, const char* name) {
    return step_of(call.attributes[attribute], name);
  };
  const Steps steps{step(6, "step"), step(7, "gate_step"), step(8, "up_step"),
                    step(9, "down_step"), step(10, "out_step")};
  const View out = call.output_like(0, x);

  if (call.exact)
    return glu_exact(call, x, gate, factor ? nullptr : &up, factor, down, unit, steps,
                     out.as<float>());
  const int64_t groups = (width + kGroupRows - 1) / kGroupRows, stride = groups * kGroupRows;
  const int64_t given_bytes = rounded_bytes(tokens, dim), between = rounded_bytes(tokens, width);
  float* const opened = scratch(size_t(2 * tokens * stride + (given_bytes + between) / 4 + 1));
  float* const lifted = opened + tokens * stride;
  auto* const memory = reinterpret_cast<uint8_t*>(lifted + tokens * stride);
  const Rounded given =
      round_activations(call.kernels, call.pool, x.as<const float>(), tokens, dim, steps.given, memory);
  const int64_t tasks = tasks_of(call.pool, gate, tokens);
  const auto multiply_groups = [&](const Weights& w, int64_t begin, int64_t end, float* to) {
    const int64_t bytes = group_bytes(*w.format, w.cols), row = begin * kGroupRows;
    call.kernels.multiply(*w.format, w.data + begin * bytes, end - begin,
                          (dim + kBlockValues - 1) / kBlockValues, given.data, rounded_stride(dim),
                          tokens, to + row, stride, width - row);
  };
  parallel(call.pool, tasks, [&](int64_t i) {
    const int64_t begin = groups * i / tasks, end = groups * (i + 1) / tasks;
    const int64_t row = begin * kGroupRows, rows = std::min(width, end * kGroupRows) - row;
    multiply_groups(gate, begin, end, opened);
    if (!factor) multiply_groups(up, begin, end, lifted);
    for (int64_t t = 0; t < tokens; ++t) {
      float *const to = opened + t * stride + row, *const by = lifted + t * stride + row;
      Finish{steps.gate}(call.kernels, to, rows);
      if (!factor) Finish{steps.up}(call.kernels, by, rows);
      call.kernels.gated(to, factor ? factor.as<const float>() + t * width + row : by, rows,
                         unit.activation, unit.limit, to);
    }
  });
  uint8_t* const hidden = memory + given_bytes;
  const Pool team{tokens * width < kMinValues ? 1 : call.pool.threads, call.pool.run};
  parallel(team, tokens, [&](int64_t t) {
    call.kernels.round_row(opened + t * stride, width, steps.hidden,
                           hidden + t * rounded_stride(width));
  });
  multiply(call.kernels, call.pool, {hidden, tokens, width}, down, out.as<float>(), dim,
           {steps.out});
}

}  // namespace edge_kv
