// The ops as custom ops of ONNX Runtime, of the domain `shadowc`: what shadowc/onnx/bodies.py means.
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "onnx.h"
#include "pool.h"

extern "C" const char* shadowc_isa(const char* name);

namespace shadowc {

// What a node says of itself; never changed once made, as sessions run it from many threads.
struct Node {
  const Op* op;
  const Api* api;
  int64_t heads = 0, kv_heads = 0, head_dim = 0, keep = 0, floor = 0;
  int activation = 0;
  bool skip_zeros = false, local = false;
  float scale = 0;
};

namespace {

int team_size() {
  static const unsigned found = std::thread::hardware_concurrency();
  return found == 0 ? 1 : (int)found;
}

class CpuCall : public Call, public Host {
 public:
  using Call::Call;

  // ONNX Runtime's threads run what the kernels share out.
  void run(int ranks, void (*rank)(void* job, size_t rank), void* job) const override {
    check(api_->call(kParallelFor, (const Context*)context_, rank, (size_t)ranks, (size_t)0, job));
  }
};

// The type of matrices, which share one.
int dtype_of(std::initializer_list<const Tensor*> matrices) {
  const int type = (*matrices.begin())->type;
  for (const Tensor* matrix : matrices)
    require(matrix->type == type, "matrices of different types");
  if (type == kFloat) return kFloat32;
  if (type == kBf16) return kBfloat16;
  require(type == kHalf, "matrices must be float32, bfloat16 or float16, got type " +
                             std::to_string(type));
  return kFloat16;
}

// Raises what an op refuses: a model's inputs fit one another by now, so this is a second fence.
void require_done(int code) { require(code == kFine, std::string("refused: ") + reason(code)); }

// Hands out a thread's buffer piece by piece; the kernels use the other slots.
class Room {
 public:
  explicit Room(size_t bytes) : next_((char*)scratch(2, bytes)) {}
  static size_t size(size_t bytes) { return (bytes + 63) / 64 * 64; }
  template <class T>
  T* take(int64_t n) {
    T* taken = (T*)next_;
    next_ += size(n * sizeof(T));
    return taken;
  }

 private:
  char* next_;
};

size_t keep_size(int64_t B, int64_t N) {
  return Room::size(B * N * sizeof(int32_t)) + Room::size(B * sizeof(int32_t));
}

// The keep set that a mask [1 or B, N] says.
Keep keep_of(const Tensor& mask, int64_t B, int64_t N, int64_t rows_a_unit, Room& room) {
  require(mask.dim[0] == 1 || mask.dim[0] == B, "keep must have a row for all or for each");
  int32_t *index = room.take<int32_t>(B * N), *count = room.take<int32_t>(B);
  bool whole = true;
  for (int64_t b = 0; b < B; ++b) {
    const uint8_t* kept = mask.as<uint8_t>() + (mask.dim[0] == 1 ? 0 : b * N);
    int32_t n = 0;
    for (int32_t i = 0; i < N; ++i) {
      index[b * N + n] = i;  // what is written too much, a later unit writes over
      n += kept[i] != 0;
    }
    count[b] = n;
    whole = whole && n == N;
  }
  if (whole) return {nullptr, nullptr, N, rows_a_unit};
  return {index, count, N, rows_a_unit};
}

// ---------------------------------------------------------------------------- the ops

constexpr Input kLinearInputs[] = {{"x", kFloat}, {"weight", kAny}, {"bias", kFloat, true},
                                   {"kernels", kByte, true}};

void linear(const Node&, Call& call) {
  const Tensor x = call.input(0, {-1, -1, -1}), weight = call.input(1, {-1, x.dim[2]});
  const int64_t rows = weight.dim[0];
  const Tensor bias = call.input(2, {rows});
  float* y = (float*)call.output(0, {x.dim[0], x.dim[1], rows});
  require_done(launch({x.as<float>(), {{weight.data, bias.as<float>(), y, rows, {}}}, 1,
                       x.dim[0] * x.dim[1], 1, x.dim[2], team_size(), dtype_of({&weight})},
                      table->project));
}

constexpr Input kMlpInputs[] = {{"x", kFloat},    {"w1", kAny},         {"b1", kFloat, true},
                                {"w2t", kAny},    {"b2", kFloat, true}, {"residual", kFloat, true},
                                {"keep", kBool},  {"kernels", kByte, true}};
constexpr Input kGatedInputs[] = {{"x", kFloat},  {"gate", kAny},
                                  {"up", kAny},   {"downt", kAny},
                                  {"residual", kFloat, true}, {"keep", kBool},
                                  {"kernels", kByte, true}};

void mlp_of(const Node& node, Call& call, bool gated) {
  const Tensor x = call.input(0, {-1, -1, -1});
  const int64_t B = x.dim[0], T = x.dim[1], C = x.dim[2];
  const Tensor w1 = call.input(1, {-1, C});
  const int64_t F = w1.dim[0];
  const Tensor up = gated ? call.input(2, {F, C}) : w1;
  const Tensor b1 = gated ? Tensor{} : call.input(2, {F});
  const Tensor w2t = call.input(3, {F, C});
  const Tensor b2 = gated ? Tensor{} : call.input(4, {C});
  const size_t next = gated ? 4 : 5;
  const Tensor residual = call.input(next, {B, T, C}), mask = call.input(next + 1, {-1, F});
  float* y = (float*)call.output(0, {B, T, C});
  int32_t* rows = (int32_t*)call.output(1, {1, B});
  std::memset(rows, 0, B * sizeof(int32_t));
  if (B * T == 0) return;
  Room room(keep_size(B, F));
  require_done(launch({x.as<float>(), w1.data, gated ? up.data : nullptr, b1.as<float>(), w2t.data,
                       b2.as<float>(), residual.as<float>(), y, rows,
                       keep_of(mask, B, F, 1, room), B * T, T, C, F, node.activation,
                       node.skip_zeros, team_size(), dtype_of({&w1, &up, &w2t})},
                      table->mlp));
}

void mlp(const Node& node, Call& call) { mlp_of(node, call, false); }
void gated_mlp(const Node& node, Call& call) { mlp_of(node, call, true); }

constexpr Input kAttentionInputs[] = {
    {"x", kFloat},           {"wq", kAny},           {"bq", kFloat, true},
    {"wk", kAny},            {"bk", kFloat, true},   {"wv", kAny},
    {"bv", kFloat, true},    {"wot", kAny},          {"bo", kFloat, true},
    {"residual", kFloat, true}, {"cos", kFloat, true}, {"sin", kFloat, true},
    {"past_key", kFloat},    {"past_value", kFloat}, {"position", kInt64},
    {"allowed", kBool},      {"keep", kBool},        {"kernels", kByte, true}};

// The first slot that a row sees, of one run that ends with the last slot; `total` if it sees none.
int64_t first_seen(const uint8_t* allowed, int64_t total) {
  int64_t start = 0;
  while (start < total && !allowed[start]) ++start;
  for (int64_t s = start; s < total; ++s)
    require(allowed[s], "allowed has a gap: padding must be on the left");
  return start;
}

void attention(const Node& node, Call& call) {
  const int64_t H = node.heads, G = node.kv_heads, D = node.head_dim;
  const Tensor x = call.input(0, {-1, 1, -1});
  const int64_t B = x.dim[0], C = x.dim[2];
  const Tensor wq = call.input(1, {H * D, C}), bq = call.input(2, {H * D});
  const Tensor wk = call.input(3, {G * D, C}), bk = call.input(4, {G * D});
  const Tensor wv = call.input(5, {G * D, C}), bv = call.input(6, {G * D});
  const Tensor wot = call.input(7, {H * D, C}), bo = call.input(8, {C});
  const Tensor residual = call.input(9, {B, 1, C});
  const Tensor cos = call.input(10, {B, 1, D}), sin = call.input(11, {B, 1, D});
  require((cos.data == nullptr) == (sin.data == nullptr), "cos and sin come together");
  const Tensor past_key = call.input(12, {B, G, -1, D});
  const int64_t slots = past_key.dim[2];
  const Tensor past_value = call.input(13, {B, G, slots, D});
  const Tensor position = call.input(14, {1});
  const int64_t filled = *position.as<int64_t>();
  require(filled >= 0, "attention_mask is shorter than the new tokens");
  require(filled < kMostValues, "attention_mask is too long");
  const int64_t total = filled + 1;
  // As long as what is filled, the cache grows; longer, it is memory for the whole sequence.
  const bool grows = slots == filled;
  require(slots >= filled && (grows || slots >= total),
          "the cache has " + std::to_string(slots) + " slots, attention_mask says that " +
              std::to_string(filled) + " are filled");
  const Tensor allowed = call.input(15, {B, 1, total}), mask = call.input(16, {-1, H});
  const int dtype = dtype_of({&wq, &wk, &wv, &wot});

  const int64_t S = grows ? total : slots;
  float* y = (float*)call.output(0, {B, 1, C});
  float* present[2] = {(float*)call.output(1, {B, G, S, D}), (float*)call.output(2, {B, G, S, D})};
  const float* past[2] = {past_key.as<float>(), past_value.as<float>()};
  for (int i = 0; i < 2; ++i)  // memory that past and present share is not touched
    for (int64_t bg = 0; present[i] != past[i] && bg < B * G; ++bg)
      if (filled > 0)
        std::memcpy(present[i] + bg * S * D, past[i] + bg * slots * D, filled * D * sizeof(float));
  if (B == 0) return;

  const int64_t queries = B * H * D, keys = B * G * D;
  Room room(keep_size(B, H) + Room::size(B * sizeof(int64_t)) +
            2 * Room::size(queries * sizeof(float)) + 2 * Room::size(keys * sizeof(float)));
  const Keep heads = keep_of(mask, B, H, D, room);
  int64_t* start = room.take<int64_t>(B);
  for (int64_t b = 0; b < B; ++b) start[b] = first_seen(allowed.as<uint8_t>() + b * total, total);
  float *q = room.take<float>(queries), *ctx = room.take<float>(queries);
  float *k = room.take<float>(keys), *v = room.take<float>(keys);
  const int threads = team_size();
  require_done(launch({x.as<float>(),
                       {{wq.data, bq.as<float>(), q, H * D, heads},
                        {wk.data, bk.as<float>(), k, G * D, {}},
                        {wv.data, bv.as<float>(), v, G * D, {}}},
                       3, B, 1, C, threads, dtype},
                      table->project));
  require_done(launch({q, k, v, cos.as<float>(), sin.as<float>(), present[0], present[1], start,
                       &filled, ctx, {heads.index, heads.count, H, D}, B, H, G, D, S, node.scale,
                       threads},
                      table->attention));
  require_done(launch({ctx, wot.data, bo.as<float>(), residual.as<float>(), y, H * D, heads, B, 1,
                       C, threads, dtype},
                      table->out_proj));
}

constexpr Input kSelectInputs[] = {{"scores", kFloat}, {"kernels", kByte, true}};

void select(const Node& node, Call& call) {
  const Tensor scores = call.input(0, {-1, -1, -1});
  const int64_t B = scores.dim[0], L = scores.dim[1], N = scores.dim[2];
  require(node.keep >= 0 && node.keep <= L * N, "keep is more than there are units");
  require(node.local || (node.floor >= 0 && node.floor <= N && L * node.floor <= node.keep),
          "floor is more than keep allows");
  uint8_t* mask = (uint8_t*)call.output(0, {L, B, N});
  Room room(keep_size(L * B, N));
  int32_t *index = room.take<int32_t>(L * B * N), *count = room.take<int32_t>(L * B);
  require_done(launch({scores.as<float>(), index, count, B, L, N, node.keep, node.floor,
                       node.local, team_size()},
                      table->select));
  std::memset(mask, 0, L * B * N);
  for (int64_t row = 0; row < L * B; ++row)
    for (int32_t i = 0; i < count[row]; ++i) mask[row * N + index[row * N + i]] = 1;
}

// ---------------------------------------------------------------------------- the table of ops

Status* create(const CustomOp* op, const Api* api, const Info* info, void** kernel) {
  const Op* own = (const Op*)op;
  return guarded(api, own->title, [&] {
    check_abi(api, info);
    Node made{own, api};
    if (own->run == attention) {
      made.heads = integer(api, info, "heads");
      made.kv_heads = integer(api, info, "kv_heads");
      made.head_dim = integer(api, info, "head_dim");
      check(api->call(kGetAttributeFloat, info, "scale", &made.scale));
      require(made.kv_heads > 0 && made.heads > 0 && made.heads % made.kv_heads == 0 &&
                  made.head_dim > 0 && made.head_dim <= 256 && made.head_dim % 8 == 0 &&
                  is_number(made.heads) && is_number(made.heads * made.head_dim),
              "heads must be a multiple of kv_heads, head_dim one of 8 up to 256");
    } else if (own->run == select) {
      made.keep = integer(api, info, "keep");
      made.floor = integer(api, info, "floor");
      made.local = integer(api, info, "local") != 0;
    } else if (own->run != linear) {
      char name[16] = {};
      size_t size = sizeof name;
      check(api->call(kGetAttributeString, info, "activation", name, &size));
      const char* const known[] = {"relu", "silu", "gelu"};
      for (made.activation = 0; made.activation < 3; ++made.activation)
        if (std::strcmp(name, known[made.activation]) == 0) break;
      require(made.activation < 3, "activation must be relu, silu or gelu");
      made.skip_zeros = integer(api, info, "skip_zeros") != 0;
    }
    *kernel = new Node(made);
  });
}

Status* compute(void* kernel, Context* context) {
  const Node& node = *(const Node*)kernel;
  return guarded(node.api, node.op->title, [&] {
    CpuCall call(node.op, node.api, context);
    const Lent lent(call);
    node.op->run(node, call);
  });
}

template <size_t I, size_t O>
Op op(const char* title, const Input (&inputs)[I], const int (&outputs)[O],
      void (*run)(const Node&, Call&)) {
  Op made{};
  made.version = kApiVersion;
  made.title = title;
  made.input = inputs;
  made.input_count = I;
  made.output = outputs;
  made.output_count = O;
  made.run = run;
  made.name = [](const CustomOp* o) { return ((const Op*)o)->title; };
  made.provider = [](const CustomOp*) -> const char* { return nullptr; };
  made.input_type = [](const CustomOp* o, size_t i) { return ((const Op*)o)->input[i].type; };
  made.inputs = [](const CustomOp* o) { return ((const Op*)o)->input_count; };
  made.output_type = [](const CustomOp* o, size_t i) { return ((const Op*)o)->output[i]; };
  made.outputs = [](const CustomOp* o) { return ((const Op*)o)->output_count; };
  made.destroy = [](void* kernel) { delete (Node*)kernel; };
  made.input_characteristic = [](const CustomOp* o, size_t i) {
    return (int)((const Op*)o)->input[i].optional;
  };
  made.output_characteristic = [](const CustomOp*, size_t) { return 0; };
  made.input_memory = [](const CustomOp*, size_t) { return 0; };
  made.create_kernel_v2 = create;
  made.compute_v2 = compute;
  return made;
}

constexpr int kOneFloat[] = {kFloat};
constexpr int kFloatAndRows[] = {kFloat, kInt32};
constexpr int kThreeFloats[] = {kFloat, kFloat, kFloat};
constexpr int kMask[] = {kBool};

// Every op for the CPU provider, then for the CUDA provider.
const std::vector<Op>& ops() {
  static const std::vector<Op> all = [] {
    std::vector<Op> made = {
        op("Linear", kLinearInputs, kOneFloat, linear),
        op("SparseMLP", kMlpInputs, kFloatAndRows, mlp),
        op("SparseGatedMLP", kGatedInputs, kFloatAndRows, gated_mlp),
        op("SparseAttention", kAttentionInputs, kThreeFloats, attention),
        op("Select", kSelectInputs, kMask, select),
    };
    for (size_t i = 0, n = made.size(); i < n; ++i) {
      Op other = made[i];
      move_to_cuda(other);
      made.push_back(other);
    }
    return made;
  }();
  return all;
}

}  // namespace
}  // namespace shadowc

using namespace shadowc;

// What ONNX Runtime calls when the library is registered in a session's options.
extern "C" __attribute__((visibility("default"))) Status* RegisterCustomOps(
    SessionOptions* options, const ApiBase* base) {
  const Api* api = base->api(kApiVersion);
  if (api == nullptr) {
    const std::string text = std::string("shadowc's custom ops need ONNX Runtime 1.17 or newer, "
                                         "this is ") + base->version();
    return base->api(1)->call(kCreateStatus, (int)kNotImplemented, text.c_str());
  }
  if (shadowc_isa(std::getenv("SHADOWC_ISA")) == nullptr)
    return api->call(kCreateStatus, (int)kInvalidArgument,
                     "SHADOWC_ISA names an instruction set that is not available here");
  return guarded(api, "RegisterCustomOps", [&] {
    // One domain a registration: it must outlive its sessions, of which nobody tells the end.
    Domain* domain = nullptr;
    check(api->call(kCreateCustomOpDomain, "shadowc", &domain));
    for (const Op& each : ops())
      check(api->call(kCustomOpDomainAdd, domain, (const CustomOp*)&each));
    check(api->call(kAddCustomOpDomain, options, domain));
  });
}
