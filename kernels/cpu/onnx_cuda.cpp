// The ops for ONNX Runtime's CUDA provider: what shadowc/onnx/plan.py wrote down, launched through
// the CUDA driver on the session's stream.
//
// A model brings its kernels as a tensor: machine code for some GPUs and, for each node, a plan,
// the launches that make its outputs. So nothing here knows what an op means, but for the cache of
// SparseAttention. The driver is looked for when a session with such nodes is made, and nothing of
// CUDA is needed to build.
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "onnx.h"

namespace shadowc {
namespace {

// ---------------------------------------------------------------------------- the CUDA driver

using Address = uint64_t;

struct Copy2D {  // CUDA_MEMCPY2D
  struct Side {
    size_t x = 0, y = 0;
    int memory = 2;  // of the device
    void* host = nullptr;
    Address device = 0;
    void* array = nullptr;
    size_t pitch = 0;
  } from, to;
  size_t width = 0, height = 0;
};
static_assert(sizeof(Copy2D) == 128);

struct Driver {
  void* library = nullptr;
  int (*error_string)(int, const char**);
  int (*current)(void** context);
  int (*device)(int*);
  int (*attribute)(int*, int, int device);
  int (*load)(void** module, const void*);
  int (*function)(void** function, void* module, const char*);
  int (*set)(void* function, int, int);
  int (*launch)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                unsigned shared, void* stream, void** parameters, void** extra);
  int (*allocate)(Address*, size_t);
  int (*fill)(Address, unsigned char, size_t, void* stream);
  int (*copy)(const Copy2D*, void* stream);

  Driver() {
    library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
      throw Failure{"the CUDA driver cannot be loaded: " + std::string(dlerror())};
    const auto find = [&](auto& entry, const char* name) {
      entry = (std::remove_reference_t<decltype(entry)>)dlsym(library, name);
      require(entry != nullptr, "the CUDA driver has no " + std::string(name));
    };
    find(error_string, "cuGetErrorString");
    find(current, "cuCtxGetCurrent");
    find(device, "cuCtxGetDevice");
    find(attribute, "cuDeviceGetAttribute");
    find(load, "cuModuleLoadData");
    find(function, "cuModuleGetFunction");
    find(set, "cuFuncSetAttribute");
    find(launch, "cuLaunchKernel");
    find(allocate, "cuMemAlloc_v2");
    find(fill, "cuMemsetD8Async");
    find(copy, "cuMemcpy2DAsync_v2");
  }

  void ask(int code, const char* what) const {
    if (code == 0) return;
    const char* text = nullptr;
    error_string(code, &text);
    throw Failure{std::string(what) + " failed: " + (text == nullptr ? "an unknown error" : text)};
  }
};

const Driver& driver() {
  static const Driver found;  // made again by the next session if this one is refused
  return found;
}

enum Attribute : int { kMajor = 75, kMinor = 76 };
constexpr int kDynamicSharedMemory = 8;
constexpr int64_t kStaticSharedMemory = 48 << 10;
// More than any GPU has, for what a model says of its launches.
constexpr int64_t kMostSharedMemory = 1 << 20, kMostThreads = 1024;
constexpr int64_t kMostScratch = (int64_t)1 << 40, kMostRank = 4;

// ---------------------------------------------------------------------------- plans

// What a plan says in place of a size or number that is known when a node runs.
enum Dynamic : int64_t { kSlots = -1, kTotal = -2 };
// Where a parameter comes from; see shadowc/onnx/plan.py.
enum Source : int64_t {
  kFromInput,
  kFromOutput,
  kFromScratch,
  kFromZeros,
  kNumber,
  kSlotsNow,
  kFilledNow
};

struct Parameter {
  int64_t source, value;
};
struct Launch {
  int64_t image, grid[3];
  std::vector<Parameter> parameters;
};
struct Argument {
  int64_t type;  // 0: the node does not have it
  std::vector<int64_t> dims;
};
struct Plan {
  std::string op;
  std::vector<Argument> inputs, outputs;
  std::vector<Launch> launches;
};
struct Image {
  void* function;
  int64_t threads, shared;
};
struct Arena {
  Address scratch = 0, zeros = 0;
};

// Reads int64, and bytes that are padded to 8.
class Reader {
 public:
  Reader(const char* data, size_t size) : next_(data), end_(data + size) {}
  const char* take(size_t bytes) {
    bytes = (bytes + 7) / 8 * 8;
    require(bytes <= (size_t)(end_ - next_), "the tensor `kernels` is truncated");
    const char* taken = next_;
    next_ += bytes;
    return taken;
  }
  int64_t number() {
    int64_t value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
  // A number in [least, most].
  int64_t number(int64_t least, int64_t most) {
    const int64_t value = number();
    require(value >= least && value <= most, "the tensor `kernels` is damaged");
    return value;
  }
  // A number of things that follow, each of them at least so many bytes: so no count asks for more
  // memory than a few times the tensor has.
  size_t count(size_t bytes_each) { return (size_t)number(0, (int64_t)(left() / bytes_each)); }
  std::string text() {
    const size_t size = count(1);
    return std::string(take(size), size);
  }
  size_t left() const { return end_ - next_; }

 private:
  const char *next_, *end_;
};

// The kernels and plans of a model in one CUDA context.
class Kernels {
 public:
  Kernels(Reader file, int arch) {
    std::string known;
    for (size_t archs = file.count(2 * sizeof(int64_t)); archs > 0; --archs) {
      const int64_t built = file.number(1, 10000);
      const size_t size = file.count(1);
      const char* section = file.take(size);
      known += " sm_" + std::to_string(built);
      // Machine code runs on its own and on later GPUs of the same generation.
      if (built / 10 != arch / 10 || built > arch || built < arch_) continue;
      arch_ = built;
      section_ = {section, size};
    }
    require(arch_ != 0, "the model has kernels for" + known + ", this GPU is sm_" +
                            std::to_string(arch) + "; compile it for this GPU");
    Reader reader(section_.first, section_.second);
    for (size_t n = reader.count(4 * sizeof(int64_t)); n > 0; --n)
      images_.push_back(load(reader));
    scratch_ = reader.number(0, kMostScratch);
    zeros_ = reader.number(0, kMostScratch);
    plans.resize(reader.count(4 * sizeof(int64_t)));
    for (Plan& plan : plans) read(reader, plan);
  }

  const Image& image(size_t place) const { return images_[place]; }

  // Memory of a stream, in which nodes run one after the other. Kernels leave zeros as zeros.
  const Arena& arena(void* stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Arena& found = arenas_[stream];
    if (found.zeros == 0) {
      Arena made;
      driver().ask(driver().allocate(&made.scratch, scratch_ + 1), "cuMemAlloc");
      driver().ask(driver().allocate(&made.zeros, zeros_ + 1), "cuMemAlloc");
      driver().ask(driver().fill(made.zeros, 0, zeros_ + 1, stream), "cuMemsetD8Async");
      found = made;
    }
    return found;
  }

  std::vector<Plan> plans;

 private:
  static Image load(Reader& reader) {
    const std::string entry = reader.text();
    Image made{nullptr, reader.number(1, kMostThreads), reader.number(0, kMostSharedMemory)};
    const size_t size = reader.count(1);
    void* module = nullptr;
    driver().ask(driver().load(&module, reader.take(size)), "loading a kernel");
    driver().ask(driver().function(&made.function, module, entry.c_str()), "cuModuleGetFunction");
    if (made.shared > kStaticSharedMemory)
      driver().ask(driver().set(made.function, kDynamicSharedMemory, (int)made.shared),
                   "cuFuncSetAttribute");
    return made;
  }

  // The sizes of an input or output: fixed, or one of those that only a run knows.
  static Argument argument(Reader& reader) {
    Argument made{reader.number(0, INT32_MAX), {}};
    made.dims.resize(reader.number(0, kMostRank));
    for (int64_t& dim : made.dims) dim = reader.number(kTotal, INT32_MAX);
    return made;
  }

  // A place in what a launch may touch: one byte of number, the rest bytes from its beginning.
  static bool is_place(int64_t value, const std::vector<Argument>& arguments) {
    const size_t place = value & 0xff;
    if (value < 0 || place >= arguments.size() || arguments[place].type == 0) return false;
    int64_t bytes = sizeof(int64_t);  // of a value, at most
    for (int64_t dim : arguments[place].dims) {
      if (dim < 0) return true;  // as large as a run says
      if (dim > 0 && bytes > INT64_MAX / dim) return false;
      bytes *= dim;
    }
    return value >> 8 <= bytes;
  }

  bool is_right(const Parameter& parameter, const Plan& plan) const {
    const int64_t value = parameter.value;
    switch (parameter.source) {
      case kFromInput: return is_place(value, plan.inputs);
      case kFromOutput: return is_place(value, plan.outputs);
      case kFromScratch: return value >= 0 && (size_t)value <= scratch_;
      case kFromZeros: return value >= 0 && (size_t)value <= zeros_;
      default: return parameter.source >= kNumber && parameter.source <= kFilledNow;
    }
  }

  void read(Reader& reader, Plan& plan) const {
    plan.op = reader.text();
    for (auto* arguments : {&plan.inputs, &plan.outputs}) {
      arguments->resize(reader.count(2 * sizeof(int64_t)));
      for (Argument& each : *arguments) each = argument(reader);
    }
    plan.launches.resize(reader.count(5 * sizeof(int64_t)));
    for (Launch& launch : plan.launches) {
      launch.image = reader.number(0, (int64_t)images_.size() - 1);
      for (int64_t& size : launch.grid) size = reader.number(1, INT32_MAX);
      launch.parameters.resize(reader.count(2 * sizeof(int64_t)));
      for (Parameter& parameter : launch.parameters) {
        parameter = {reader.number(), reader.number()};
        require(is_right(parameter, plan), "the tensor `kernels` is damaged");
      }
    }
  }

  int64_t arch_ = 0;
  std::pair<const char*, size_t> section_;
  std::vector<Image> images_;
  size_t scratch_ = 0, zeros_ = 0;
  std::mutex mutex_;
  std::map<void*, Arena> arenas_;
};

constexpr char kMagic[] = "shadowc1";
constexpr size_t kIdentity = 32;

// The kernels in a model's tensor, loaded once into the current context and kept.
Kernels& kernels_of(const char* data, size_t size) {
  Reader file(data, size);
  require(std::memcmp(file.take(8), kMagic, 8) == 0,
          "the tensor `kernels` is of another version of shadowc");
  std::string identity(file.take(kIdentity), kIdentity);
  void* context = nullptr;
  int device = 0, major = 0, minor = 0;
  driver().ask(driver().current(&context), "cuCtxGetCurrent");
  require(context != nullptr, "no CUDA context is current");
  driver().ask(driver().device(&device), "cuCtxGetDevice");
  driver().ask(driver().attribute(&major, kMajor, device), "cuDeviceGetAttribute");
  driver().ask(driver().attribute(&minor, kMinor, device), "cuDeviceGetAttribute");
  static std::mutex mutex;
  static auto& known = *new std::map<std::pair<void*, std::string>, std::unique_ptr<Kernels>>;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Kernels>& found = known[{context, identity}];
  if (found == nullptr) found = std::make_unique<Kernels>(file, 10 * major + minor);
  return *found;
}

// ---------------------------------------------------------------------------- nodes

// Places of the inputs and outputs of SparseAttention that the cache is.
enum Place : size_t { kPastKey = 12, kPosition = 14, kPresentKey = 1 };

struct CudaNode {
  const Op* op;
  const Api* api;
  Kernels* kernels;
  const Plan* plan;
  bool cached;  // SparseAttention
};

Status* create(const CustomOp* op, const Api* api, const Info* info, void** kernel) {
  const Op* own = (const Op*)op;
  return guarded(api, own->title, [&] {
    check_abi(api, info);
    int constant = 0;
    const Value* value = nullptr;
    check(api->call(kGetConstantInput, info, own->input_count - 1, &constant, &value));
    require(constant && value != nullptr,
            "the model brings no kernels for a GPU; compile it with --target onnx-cuda, or run it "
            "without the CUDA provider");
    Shape* shape = nullptr;
    void* data = nullptr;
    size_t size = 0;
    check(api->call(kGetTensorTypeAndShape, value, &shape));
    check(api->call(kGetTensorShapeElementCount, (const Shape*)shape, &size));
    api->call<void>(kReleaseTensorTypeAndShape, shape);
    check(api->call(kGetTensorMutableData, (Value*)value, &data));
    Kernels& kernels = kernels_of((const char*)data, size);
    const int64_t place = integer(api, info, "plan");
    require(place >= 0 && (size_t)place < kernels.plans.size(), "the model has no such plan");
    const Plan& plan = kernels.plans[place];
    require(plan.op == own->title && plan.inputs.size() + 1 == own->input_count &&
                plan.outputs.size() == own->output_count,
            "the plan is one of " + plan.op);
    *kernel = new CudaNode{own, api, &kernels, &plan, plan.op == "SparseAttention"};
  });
}

// Lets what was kept of the past begin the present, which is longer or other memory.
void move_cache(const Tensor& past, Address present, int64_t filled, int64_t slots, void* stream) {
  const size_t value = past.dim[3] * sizeof(float);
  if ((Address)past.data == present || filled == 0) return;
  Copy2D copy;
  copy.from.device = (Address)past.data;
  copy.from.pitch = past.dim[2] * value;
  copy.to.device = present;
  copy.to.pitch = slots * value;
  copy.width = filled * value;
  copy.height = past.dim[0] * past.dim[1];
  driver().ask(driver().copy(&copy, stream), "cuMemcpy2DAsync");
}

void run(const CudaNode& node, const Call& call, void* stream) {
  const Plan& plan = *node.plan;
  int64_t filled = 0, slots = 0;
  if (node.cached) {
    filled = *call.input(kPosition, {1}).as<int64_t>();
    require(filled >= 0, "attention_mask is shorter than the new tokens");
    const Tensor past = call.input(kPastKey, {-1, -1, -1, -1});
    require(past.dim[2] >= filled,
            "the cache has " + std::to_string(past.dim[2]) + " slots, attention_mask says that " +
                std::to_string(filled) + " are filled");
    // As long as what is filled, the cache grows; longer, it is memory for the whole sequence.
    slots = std::max(past.dim[2], filled + 1);
  }
  std::vector<Tensor> inputs(plan.inputs.size());
  std::vector<int64_t> dims;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto& [type, expected] = plan.inputs[i];
    const std::string name = node.op->input[i].name;
    dims = expected;
    std::replace(dims.begin(), dims.end(), (int64_t)kTotal, filled + 1);
    inputs[i] = type == 0 ? call.input(i) : call.input(i, dims);
    require((type == 0) == (inputs[i].data == nullptr) && inputs[i].type == type,
            name + " is of another type than the model was compiled for");
    require((Address)inputs[i].data % 16 == 0 || i == kPosition,
            name + " must begin at a multiple of 16 bytes");
  }
  std::vector<Address> outputs(plan.outputs.size());
  for (size_t i = 0; i < outputs.size(); ++i) {
    dims = plan.outputs[i].dims;
    std::replace(dims.begin(), dims.end(), (int64_t)kSlots, slots);
    outputs[i] = (Address)call.output(i, dims);
    require(outputs[i] % 16 == 0, "an output must begin at a multiple of 16 bytes");
  }
  require(!node.cached || inputs[kPastKey].dim[2] == inputs[kPastKey + 1].dim[2],
          "past_key and past_value differ in length");
  if (node.cached)
    for (size_t i = 0; i < 2; ++i)
      move_cache(inputs[kPastKey + i], outputs[kPresentKey + i], filled, slots, stream);

  const Arena& arena = node.kernels->arena(stream);
  std::vector<uint64_t> values;
  std::vector<void*> pointers;
  for (const Launch& launch : plan.launches) {
    values.clear();
    for (const auto& [source, value] : launch.parameters) {
      const uint64_t place = (uint64_t)value & 0xff, offset = (uint64_t)value >> 8;
      switch (source) {
        case kFromInput: values.push_back((Address)inputs[place].data + offset); break;
        case kFromOutput: values.push_back(outputs[place] + offset); break;
        case kFromScratch: values.push_back(arena.scratch + value); break;
        case kFromZeros: values.push_back(arena.zeros + value); break;
        case kNumber: values.push_back((uint64_t)value); break;
        case kSlotsNow: values.push_back((uint64_t)slots); break;
        case kFilledNow: values.push_back((uint64_t)filled); break;
        default: throw Failure{"the tensor `kernels` is damaged"};
      }
    }
    pointers.clear();
    for (uint64_t& value : values) pointers.push_back(&value);
    const Image& image = node.kernels->image(launch.image);
    const auto [x, y, z] = launch.grid;
    driver().ask(driver().launch(image.function, x, y, z, image.threads, 1, 1, image.shared, stream,
                                 pointers.data(), nullptr),
                 "cuLaunchKernel");
  }
}

Status* compute(void* kernel, Context* context) {
  const CudaNode& node = *(const CudaNode*)kernel;
  return guarded(node.api, node.op->title, [&] {
    void* stream = nullptr;
    check(node.api->call(kGetGpuComputeStream, (const Context*)context, &stream));
    run(node, Call(node.op, node.api, context), stream);
  });
}

}  // namespace

void move_to_cuda(Op& op) {
  op.provider = [](const CustomOp*) { return "CUDAExecutionProvider"; };
  op.input_memory = [](const CustomOp* o, size_t i) {  // -2: the host's
    const std::string name = ((const Op*)o)->input[i].name;
    return name == "position" || name == "kernels" ? -2 : 0;
  };
  op.create_kernel_v2 = create;
  op.compute_v2 = compute;
  op.destroy = [](void* kernel) { delete (CudaNode*)kernel; };
}

}  // namespace shadowc
