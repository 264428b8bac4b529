// The part of onnxruntime's C interface that our operators use: no wheel ships its headers.
//
// The interface is a table of functions that only ever grows, so a function is its place in the
// table (tests/test_onnx_native.py compares the places with the header of a release). Names and
// meaning: onnxruntime_c_api.h of version 1.17, which `kApi` asks for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge_kv::onnx {

constexpr uint32_t kApi = 17;

struct Status;          // null: no error
struct SessionOptions;
struct Domain;
struct Info;            // of a node, while its kernel is made
struct Context;         // of a node, while it runs
struct Value;
struct Shape;

enum Element : int { kAny = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kInt64 = 7, kHalf = 10 };
enum Code : int { kInvalidArgument = 2 };

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*version)();
};

// A function of the table: its place and its type.
template <size_t place, class F>
struct Entry {
  const void* const* table;
  template <class... A>
  auto operator()(A... a) const {
    return reinterpret_cast<F*>(const_cast<void*>(table[place]))(a...);
  }
};

struct Api {
  const void* const* table;

  Entry<0, Status*(int, const char*)> CreateStatus{table};
  Entry<26, Status*(const char*, Domain**)> CreateCustomOpDomain{table};
  Entry<27, Status*(Domain*, const struct Operator*)> CustomOpDomain_Add{table};
  Entry<28, Status*(SessionOptions*, Domain*)> AddCustomOpDomain{table};
  Entry<51, Status*(Value*, void**)> GetTensorMutableData{table};
  Entry<60, Status*(const Shape*, int*)> GetTensorElementType{table};
  Entry<61, Status*(const Shape*, size_t*)> GetDimensionsCount{table};
  Entry<62, Status*(const Shape*, int64_t*, size_t)> GetDimensions{table};
  Entry<65, Status*(const Value*, Shape**)> GetTensorTypeAndShape{table};
  Entry<85, Status*(const Info*, const char*, float*)> KernelInfoGetAttribute_float{table};
  Entry<86, Status*(const Info*, const char*, int64_t*)> KernelInfoGetAttribute_int64{table};
  Entry<87, Status*(const Info*, const char*, char*, size_t*)> KernelInfoGetAttribute_string{
      table};
  Entry<88, Status*(const Context*, size_t*)> KernelContext_GetInputCount{table};
  Entry<90, Status*(const Context*, size_t, const Value**)> KernelContext_GetInput{table};
  Entry<91, Status*(Context*, size_t, const int64_t*, size_t, Value**)>
      KernelContext_GetOutput{table};
  Entry<93, void(Status*)> ReleaseStatus{table};
  Entry<99, void(Shape*)> ReleaseTensorTypeAndShapeInfo{table};
  Entry<163, Status*(const Info*, const char*, int64_t*, size_t*)>
      KernelInfoGetAttributeArray_int64{table};
  Entry<237, Status*(const SessionOptions*, const char*, int*)> HasSessionConfigEntry{table};
  Entry<238, Status*(const SessionOptions*, const char*, char*, size_t*)>
      GetSessionConfigEntry{table};
  Entry<274, Status*(const Context*, void (*)(void*, size_t), size_t, size_t, void*)>
      KernelContext_ParallelFor{table};
};

// OrtCustomOp up to version 17: what onnxruntime asks of an operator.
struct Operator {
  uint32_t version = kApi;
  void* create_kernel = nullptr;  // of older versions
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*);
  int (*input_type)(const Operator*, size_t);
  size_t (*input_count)(const Operator*);
  int (*output_type)(const Operator*, size_t);
  size_t (*output_count)(const Operator*);
  void* compute = nullptr;  // of older versions
  void (*destroy)(void* kernel);
  int (*input_characteristic)(const Operator*, size_t);
  int (*output_characteristic)(const Operator*, size_t);
  int (*input_memory)(const Operator*, size_t);
  int (*variadic_input_arity)(const Operator*);
  int (*variadic_input_homogeneity)(const Operator*);
  int (*variadic_output_arity)(const Operator*);
  int (*variadic_output_homogeneity)(const Operator*);
  Status* (*create)(const Operator*, const void* const* api, const Info*, void** kernel);
  Status* (*run)(void* kernel, Context*);
  void* infer_shape = nullptr;
  int (*first_version)(const Operator*);
  int (*last_version)(const Operator*);
};

}  // namespace edge_kv::onnx
