// Runs the kernels on requests from stdin: for tests of another CPU's build, emulated.
//
// Called with "weights": a StoredProduct, then x and the stored matrix; the reply is an int64 status
// and the result. Called with "ops": an OperatorCall, then each input as a TensorHead and its data,
// then each attribute as an AttributeValue; the reply is a status and the head of the result, the
// inputs as they were left, then the result's data or, with a status of 2, as many bytes of a
// sentence as `type` says.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernel_interface.cpp"

namespace {

struct Bytes {
  std::vector<char> data;
  explicit Bytes(int64_t size) : data(size_t(size)) {}
  void read() {
    if (fread(data.data(), 1, data.size(), stdin) != data.size()) exit(2);
  }
  void write() const { fwrite(data.data(), 1, data.size(), stdout); }
  float* floats() { return reinterpret_cast<float*>(data.data()); }
};

struct OperatorCall {
  char isa[16], name[16];
  int64_t threads, inputs, attributes;
};

struct TensorHead {
  int64_t type, rank, shape[8];
};

struct AttributeValue {
  double real;
  int64_t whole;
  char text[16];
  int64_t list[15], length;
};

int64_t bytes_of(const TensorHead& head) {
  const edge_kv::View view{nullptr, edge_kv::Type(head.type), int(head.rank), head.shape};
  // Of a type that no operator takes, the tests hand over float64.
  return view ? view.count() * (head.type == int64_t(edge_kv::Type::other)
                                    ? 8
                                    : int64_t(edge_kv::bytes_of(view.type)))
              : 0;
}

void answer_operators() {
  OperatorCall call;
  while (fread(&call, sizeof call, 1, stdin) == 1) {
    std::vector<edge_kv_tensor> inputs(edge_kv::kMostInputs);
    std::vector<Bytes> data;
    for (int64_t i = 0; i < call.inputs; ++i) {
      TensorHead head;
      if (fread(&head, sizeof head, 1, stdin) != 1) exit(2);
      data.emplace_back(bytes_of(head));
      data.back().read();
      inputs[size_t(i)] = {data.back().data.data(), int32_t(head.type), int32_t(head.rank), {}};
      memcpy(inputs[size_t(i)].shape, head.shape, sizeof head.shape);
    }
    std::vector<AttributeValue> given(static_cast<size_t>(call.attributes));
    std::vector<edge_kv_attribute> attributes(edge_kv::kMostParameters);
    for (size_t i = 0; i < given.size(); ++i) {
      AttributeValue& value = given[i];
      if (fread(&value, sizeof value, 1, stdin) != 1) exit(2);
      attributes[i] = {value.real, value.whole, value.list, value.length, value.text};
    }
    edge_kv_tensor outputs[2] = {};
    char why[1000] = "";
    const int64_t status =
        edge_kv_call(call.isa, int(call.threads), call.name, inputs.data(), attributes.data(),
                     outputs, why, sizeof why);
    TensorHead head{outputs[0].type, outputs[0].rank, {}};
    memcpy(head.shape, outputs[0].shape, sizeof head.shape);
    if (status) head = {int64_t(strlen(why)), 0, {}};
    fwrite(&status, sizeof status, 1, stdout);
    fwrite(&head, sizeof head, 1, stdout);
    for (const Bytes& part : data) part.write();
    if (status == 2) fwrite(why, 1, strlen(why), stdout);
    if (status == 0 && head.type) fwrite(outputs[0].data, 1, size_t(bytes_of(head)), stdout);
    free(outputs[0].data);
    fflush(stdout);
  }
}

struct StoredProduct {
  char isa[16], format[16];
  int64_t tokens, rows, cols;
  double step;
};

void answer_stored_products() {
  StoredProduct p;
  while (fread(&p, sizeof p, 1, stdin) == 1) {
    Bytes x(p.tokens * p.cols * 4), data(edge_kv_weight_bytes(p.format, p.rows, p.cols));
    Bytes out(p.tokens * p.rows * 4);
    for (Bytes* part : {&x, &data}) part->read();
    const int64_t status = edge_kv_linear_q(
        p.isa, 1, p.format, x.floats(), p.tokens, reinterpret_cast<uint8_t*>(data.data.data()),
        p.rows, p.cols, float(p.step), out.floats());
    fwrite(&status, sizeof status, 1, stdout);
    out.write();
    fflush(stdout);
  }
}

}  // namespace

int main(int count, char** words) {
  if (count > 1 && !strcmp(words[1], "ops")) {
    answer_operators();
    return 0;
  }
  if (count > 1 && !strcmp(words[1], "weights")) {
    answer_stored_products();
    return 0;
  }
  return 1;
}
