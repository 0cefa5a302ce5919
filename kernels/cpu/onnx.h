// ONNX Runtime's C ABI, and what the ops of both providers share.
//
// The ABI is a table of functions that only grows. The few entries used here are declared by their
// places in it, so that building needs no headers of it and nothing is linked. Whatever a model
// says is checked: shapes, types, masks. No exception leaves a function that ONNX Runtime calls.
#pragma once
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <span>
#include <string>

namespace shadowc {

constexpr uint32_t kApiVersion = 17;  // the first with ParallelFor: ONNX Runtime 1.17
constexpr int64_t kAbi = 1;           // ABI in shadowc/onnx/export.py

// ---------------------------------------------------------------------------- ONNX Runtime

struct Status;
struct Value;
struct Shape;
struct Context;
struct Info;
struct Domain;
struct SessionOptions;

struct Api {
  void* entry[275];

  template <class R = Status*, class... A>
  R call(int place, A... arguments) const {
    return ((R(*)(A...))entry[place])(arguments...);
  }
};

struct ApiBase {
  const Api* (*api)(uint32_t version);
  const char* (*version)();
};

enum Entry : int {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorShapeElementCount = 64,
  kGetTensorTypeAndShape = 65,
  kGetAttributeFloat = 85,
  kGetAttributeInt = 86,
  kGetAttributeString = 87,
  kGetInput = 90,
  kGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorTypeAndShape = 99,
  kGetGpuComputeStream = 193,
  kGetConstantInput = 249,
  kParallelFor = 274,
};
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum Type : int {
  kAny = 0,
  kFloat = 1,
  kByte = 2,
  kInt32 = 6,
  kInt64 = 7,
  kBool = 9,
  kHalf = 10,
  kBf16 = 16
};

struct CustomOp {
  uint32_t version;
  void* create_kernel;
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*inputs)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*outputs)(const CustomOp*);
  void* compute;
  void (*destroy)(void* kernel);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  void* variadic[4];
  Status* (*create_kernel_v2)(const CustomOp*, const Api*, const Info*, void** kernel);
  Status* (*compute_v2)(void* kernel, Context*);
  void* rest[7];
};
static_assert(sizeof(CustomOp) == 208);

// An error of ours, by its text, or one that ONNX Runtime gave.
struct Failure {
  std::string text;
  Status* status = nullptr;
};

inline void check(Status* status) {
  if (status != nullptr) throw Failure{"", status};
}

inline void require(bool fits, const std::string& text) {
  if (!fits) throw Failure{text};
}

// Runs body and turns what it throws into a status.
template <class Body>
Status* guarded(const Api* api, const char* name, const Body& body) {
  std::string text;
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    if (failure.status != nullptr) return failure.status;
    text = failure.text;
  } catch (const std::exception& error) {
    text = error.what();
  }
  return api->call(kCreateStatus, (int)kInvalidArgument,
                   ("shadowc::" + std::string(name) + ": " + text).c_str());
}

// ---------------------------------------------------------------------------- one call of a node

struct Input {
  const char* name;
  int type;
  bool optional = false;
};

struct Node;
class Call;

struct Op : CustomOp {
  const char* title;
  const Input* input;
  size_t input_count;
  const int* output;
  size_t output_count;
  void (*run)(const Node&, Call&);
};

struct Tensor {
  void* data = nullptr;
  int type = 0;
  size_t rank = 0;
  int64_t dim[4] = {};
  template <class T>
  T* as() const {
    return (T*)data;
  }
};

class Call {
 public:
  Call(const Op* op, const Api* api, Context* context) : op_(op), api_(api), context_(context) {}

  // An input, checked against its declaration.
  Tensor input(size_t place) const {
    const Input& wanted = op_->input[place];
    const Api& api = *api_;
    const Value* value = nullptr;
    check(api.call(kGetInput, (const Context*)context_, place, &value));
    Tensor found;
    if (value == nullptr) {
      require(wanted.optional, std::string(wanted.name) + " is missing");
      return found;
    }
    Shape* shape = nullptr;
    check(api.call(kGetTensorTypeAndShape, value, &shape));
    check(api.call(kGetTensorElementType, (const Shape*)shape, &found.type));
    check(api.call(kGetDimensionsCount, (const Shape*)shape, &found.rank));
    if (found.rank <= 4)
      check(api.call(kGetDimensions, (const Shape*)shape, found.dim, found.rank));
    api.call<void>(kReleaseTensorTypeAndShape, shape);
    require(found.rank <= 4, std::string(wanted.name) + " has more than 4 dimensions");
    check(api.call(kGetTensorMutableData, (Value*)value, &found.data));
    return found;
  }

  // An input of that shape; -1 is any size.
  Tensor input(size_t place, std::span<const int64_t> dims) const {
    const Tensor found = input(place);
    if (found.data == nullptr && found.rank == 0) return found;
    bool fits = found.rank == dims.size();
    size_t i = 0;
    for (int64_t dim : dims) fits = fits && (dim < 0 || dim == found.dim[i]), ++i;
    if (!fits) {
      std::string text = std::string(op_->input[place].name) + " does not fit: expected [";
      for (int64_t dim : dims) text += (dim < 0 ? "any" : std::to_string(dim)) + " ";
      text += "], got [";
      for (size_t d = 0; d < found.rank; ++d) text += std::to_string(found.dim[d]) + " ";
      throw Failure{text + "]"};
    }
    return found;
  }
  Tensor input(size_t place, std::initializer_list<int64_t> dims) const {
    return input(place, std::span(dims.begin(), dims.size()));
  }

  void* output(size_t place, std::span<const int64_t> dims) const {
    Value* value = nullptr;
    void* data = nullptr;
    check(api_->call(kGetOutput, context_, place, dims.data(), dims.size(), &value));
    check(api_->call(kGetTensorMutableData, value, &data));
    return data;
  }
  void* output(size_t place, std::initializer_list<int64_t> dims) const {
    return output(place, std::span(dims.begin(), dims.size()));
  }

 protected:
  const Op* op_;
  const Api* api_;
  Context* context_;
};

// ---------------------------------------------------------------------------- making nodes

inline int64_t integer(const Api* api, const Info* info, const char* name) {
  int64_t value = 0;
  check(api->call(kGetAttributeInt, info, name, &value));
  return value;
}

// Refuses a node of another contract than this library's.
inline void check_abi(const Api* api, const Info* info) {
  int64_t abi = 0;
  Status* missing = api->call(kGetAttributeInt, info, "abi", &abi);
  if (missing != nullptr) api->call<void>(kReleaseStatus, missing);
  require(abi == kAbi, "the model was exported for ABI " + std::to_string(abi) +
                           " of the custom ops, this library has " + std::to_string(kAbi) +
                           "; export the model again, or use the library of its version");
}

// Makes an op of the CPU provider the one of the same name of the CUDA provider.
void move_to_cuda(Op& op);

}  // namespace shadowc
