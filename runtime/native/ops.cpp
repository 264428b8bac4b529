#include "ops.h"

#include <cstdio>
#include <new>

namespace edge_kv {

constexpr Type kTable = Type::other, kAny = Type::none;
constexpr bool kOptional = true, kWritten = true;

const Operator kOperators[kOperatorCount] = {
    {"put", put, Type::none,
     {{"table", kTable, !kOptional, kWritten},
      {"scales", Type::f32, kOptional, kWritten},
      {"rows", Type::f32},
      {"start", Type::int64}},
     {}},
    {"attend", attend, Type::f32,
     {{"q", Type::f32},
      {"pos", Type::int64},
      {"sink", Type::f32, kOptional},
      {"keys1", kTable},
      {"key_scales1", Type::f32, kOptional},
      {"values1", kTable},
      {"value_scales1", Type::f32, kOptional},
      {"picked1", Type::int64, kOptional},
      {"keys2", kTable, kOptional},
      {"key_scales2", Type::f32, kOptional},
      {"values2", kTable, kOptional},
      {"value_scales2", Type::f32, kOptional},
      {"picked2", Type::int64, kOptional}},
     {{"scale", Kind::real}, {"strides", Kind::list}, {"keeps", Kind::list}}},
    {"select", select, Type::int64,
     {{"q", Type::f32},
      {"weight", Type::f32},
      {"pos", Type::int64},
      {"rows", kTable},
      {"scales", Type::f32, kOptional}},
     {{"k", Kind::whole}, {"stride", Kind::whole}}},
    {"norm_rope", norm_rope, Type::f32,
     {{"x", Type::f32},
      {"weight", Type::f32, kOptional},
      {"cos", Type::f32, kOptional},
      {"sin", Type::f32, kOptional}},
     {{"eps", Kind::real}, {"style", Kind::text}}},
    {"norm_add", norm_add, Type::f32,
     {{"x", Type::f32},
      {"weight", Type::f32},
      {"residual", Type::f32},
      {"scale", Type::f32, kOptional}},
     {{"eps", Kind::real}}},
    {"sinkhorn", sinkhorn, Type::f32, {{"x", Type::f32}},
     {{"iters", Kind::whole}, {"eps", Kind::real}}},
    {"softcap", softcap, Type::f32, {{"x", Type::f32}}, {{"cap", Kind::real}}},
    {"linear_q", linear_q, Type::f32,
     {{"x", Type::f32}, {"packed", Type::uint8}},
     {{"rows", Kind::whole},
      {"format", Kind::text},
      {"step", Kind::real},
      {"out_step", Kind::real, kOptional},
      {"cap", Kind::real, kOptional}}},
    {"embed_q", embed_q, Type::f32,
     {{"ids", Type::int64}, {"packed", Type::uint8}},
     {{"width", Kind::whole}, {"format", Kind::text}}},
    {"experts_q", experts_q, Type::f32,
     {{"x", Type::f32},
      {"index", Type::int64},
      {"weight", Type::f32},
      {"gate_up", kAny},
      {"down", kAny}},
     {{"width", Kind::whole},
      {"format", Kind::text},
      {"down_format", Kind::text},
      {"act", Kind::text},
      {"limit", Kind::real}}},
    {"glu_q", glu_q, Type::f32,
     {{"x", Type::f32},
      {"gate", Type::uint8},
      {"up", Type::uint8, kOptional},
      {"factor", Type::f32, kOptional},
      {"down", Type::uint8}},
     {{"width", Kind::whole},
      {"format", Kind::text},
      {"up_format", Kind::text},
      {"down_format", Kind::text},
      {"act", Kind::text},
      {"limit", Kind::real},
      {"step", Kind::real, kOptional},
      {"gate_step", Kind::real, kOptional},
      {"up_step", Kind::real, kOptional},
      {"down_step", Kind::real, kOptional},
      {"out_step", Kind::real, kOptional}}},
};

size_t bytes_of(Type type) {
  switch (type) {
    case Type::f32: return 4;
    case Type::f16: return 2;
    case Type::int8: case Type::uint8: return 1;
    case Type::int64: return 8;
    case Type::none: case Type::other: break;
  }
  return 0;
}

const char* name_of(Type type) {
  const char* const names[] = {"nothing", "f32", "f16", "int8", "uint8", "int64", "another type"};
  return names[int(type)];
}

int64_t View::count() const {
  int64_t n = 1;
  for (int i = 0; i < rank; ++i)
    if (shape[i] == 0) return 0;
  for (int i = 0; i < rank; ++i) n *= shape[i];
  return n;
}

std::string View::text() const {
  if (type == Type::none) return "nothing";
  std::string out = std::string(name_of(type)) + " [";
  for (int i = 0; i < rank; ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

std::string text_of(int64_t value) { return std::to_string(value); }

std::string text_of(double value) {
  char text[32];
  snprintf(text, sizeof text, "%g", value);
  return text;
}

int64_t index_of(const View& view, const char* name) {
  if (view.count() != 1) refuse(name, " is ", view, "; it must hold one number.");
  const int64_t value = *view.as<const int64_t>();
  if (value < 0 || value >= kMostRows)
    refuse(name, " is ", value, "; it must be 0 or more and below 2^48.");
  return value;
}

namespace {

bool fits(const Input& input, const View& view) {
  if (!view) return input.optional;
  if (input.type == kAny) return true;
  if (input.type != kTable) return view.type == input.type;
  return view.type == Type::f32 || view.type == Type::f16 || view.type == Type::int8;
}

}  // namespace

std::string invoke(const Operator& op, Call& call) {
  try {
    for (int i = 0; op.inputs[i].name; ++i) {
      const Input& input = op.inputs[i];
      const View& view = call.in[i];
      if (!fits(input, view))
        refuse(input.name, " is ", name_of(view.type), "; it must be ",
               input.type == kTable ? "f32, f16 or int8" : name_of(input.type), ".");
      for (int axis = 0; axis < view.rank; ++axis)
        if (view.shape[axis] <= 0) refuse(input.name, " is ", view, "; no axis may be empty.");
    }
    op.kernel(call);
    return "";
  } catch (const Refusal& refusal) {
    return std::string(op.name) + ": " + refusal.why;
  } catch (const std::bad_alloc&) {
    return std::string(op.name) + ": the step does not fit into memory.";
  }
}

}  // namespace edge_kv
