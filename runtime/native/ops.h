// The operators of a program over neutral views of memory.
//
// One list, which every engine's adapter registers, and one check of all that an engine hands over:
// a kernel checks types, shapes, attributes and indices before it touches memory, and what does not
// fit ends in a sentence that an adapter makes the error of its engine. Names, meaning and eager
// form: edge_kv/nets/ops.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "parallel.h"

namespace edge_kv {

// Of a tensor's elements; `none` is an optional input that is left out.
enum class Type { none, f32, f16, int8, uint8, int64, other };

size_t bytes_of(Type);  // of one element; 0 for `none` and `other`
const char* name_of(Type);

struct View {
  void* data = nullptr;
  Type type = Type::none;
  int rank = 0;
  const int64_t* shape = nullptr;

  explicit operator bool() const { return type != Type::none; }
  int64_t count() const;      // of elements
  std::string text() const;   // "f32 [2, 8]"
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// The value of an attribute, by the kind its operator gives it.
struct Attribute {
  double real = 0;
  int64_t whole = 0;
  const int64_t* list = nullptr;
  size_t length = 0;  // of the list
  std::string_view text;
};

// One call: what an adapter hands to a kernel.
class Call {
 public:
  const Kernels& kernels;
  const Pool& pool;
  const View* in;
  const Attribute* attributes;
  bool exact = false;  // products of activations as they are, which a parity gate asks for

  Call(const Kernels& of, const Pool& on, const View* inputs, const Attribute* values)
      : kernels(of), pool(on), in(inputs), attributes(values) {}

  // Memory for output `at`; once for each, after the checks.
  virtual View output(int at, Type, std::initializer_list<int64_t> shape) = 0;
  // Output `at` in the shape of `like`.
  virtual View output_like(int at, const View& like) = 0;

 protected:
  ~Call() = default;
};

enum class Kind { real, whole, list, text };

struct Input {
  const char* name;
  Type type;  // `other`: f32, f16 or int8, as a table holds it; `none`: what its kernel takes
  bool optional = false;
  bool written = false;  // in place; where an engine has no such thing, an output in input order
};

struct Parameter {
  const char* name;
  Kind kind;
  bool optional = false;  // 0 where a program does not give it; behind all that are not
};

constexpr int kMostInputs = 13, kMostParameters = 11;

// Inputs and parameters end at the first without a name. `result` is the type of output 0; `none`
// where the operator's outputs are the inputs that it writes.
struct Operator {
  const char* name;
  void (*kernel)(Call&);
  Type result;
  Input inputs[kMostInputs + 1];
  Parameter parameters[kMostParameters + 1];

  constexpr int input_count() const {
    int n = 0;
    while (inputs[n].name) ++n;
    return n;
  }
  constexpr int parameter_count() const {
    int n = 0;
    while (parameters[n].name) ++n;
    return n;
  }
};

constexpr size_t kOperatorCount = 11;
extern const Operator kOperators[kOperatorCount];

// Run a call: "" or why not, one sentence.
std::string invoke(const Operator&, Call&);

// What a kernel throws when a call does not fit; `invoke` catches it.
struct Refusal {
  std::string why;
};

template <class... Part>
[[noreturn]] void refuse(const Part&... parts);

// Positions and row indices lie below this, so that sums of a few of them do not overflow.
constexpr int64_t kMostRows = int64_t(1) << 48;

// The size of one axis in an int; heads and values of a row are few.
constexpr int64_t kMostOfAxis = 1 << 20;

std::string text_of(int64_t);
std::string text_of(double);
inline std::string text_of(const char* text) { return text; }
inline std::string text_of(const std::string& text) { return text; }
inline std::string text_of(std::string_view text) { return std::string(text); }
inline std::string text_of(int value) { return text_of(int64_t(value)); }
inline std::string text_of(const View& view) { return view.text(); }

template <class... Part>
[[noreturn]] void refuse(const Part&... parts) {
  std::string why;
  ((why += text_of(parts)), ...);
  throw Refusal{why};
}

// The one number of an index input, 0 … kMostRows.
int64_t index_of(const View&, const char* name);

// The kernels.
void put(Call&);
void attend(Call&);
void select(Call&);
void norm_rope(Call&);
void norm_add(Call&);
void sinkhorn(Call&);
void softcap(Call&);
void linear_q(Call&);
void embed_q(Call&);
void experts_q(Call&);
void glu_q(Call&);

}  // namespace edge_kv
