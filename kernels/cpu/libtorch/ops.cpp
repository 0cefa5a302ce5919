// The `shadowc::` ops of CPU programs for LibTorch without Python: what AOTInductor packages call.
//
// A shim of LibTorch's stable ABI over the C functions, compiled by whoever loads packages (see
// examples/cpp) together with isa_*.cpp and pool.cpp. Schemas, checks and results are those of the
// Python launchers in kernels/*.py. It is never loaded into Python, which registers its own. A
// prompt runs in the same kernels as a token.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../api.cpp"  // the C functions, and those arguments of theirs that only it knows

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Sizes = std::initializer_list<int64_t>;

// Every call of a C function goes through here.
template <class Arguments>
void call(const char* name, int (*function)(const Arguments*), const Arguments& arguments) {
  const int code = function(&arguments);
  STD_TORCH_CHECK(code == kFine, "shadowc::", name, " refuses its arguments: ", reason(code));
}

// What a package computes between our ops runs on OpenMP's threads: so do the ops.
const bool on_openmp = [] {
  void* parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  if (parallel != nullptr) use_openmp((Parallel)parallel);
  return parallel != nullptr;
}();

int threads() { return (int)torch::stable::get_num_threads(); }

void check_shape(const char* name, const Tensor& tensor, Sizes sizes) {
  bool fits = tensor.is_contiguous() && tensor.dim() == (int64_t)sizes.size();
  int64_t at = 0;
  for (int64_t size : sizes) fits = fits && tensor.size(at++) == size;
  STD_TORCH_CHECK(fits, "argument '", name, "' does not fit: expected another shape, contiguous");
}

// Address of a tensor of one type and shape.
template <class T>
T* data(const char* name, const Tensor& tensor, Sizes sizes) {
  constexpr ScalarType type = std::is_same_v<T, float>     ? ScalarType::Float
                              : std::is_same_v<T, int32_t> ? ScalarType::Int
                                                           : ScalarType::Long;
  STD_TORCH_CHECK(tensor.scalar_type() == type, "argument '", name, "' is of another type");
  check_shape(name, tensor, sizes);
  return (T*)tensor.data_ptr();
}

template <class T>
T* data(const char* name, const Maybe& tensor, Sizes sizes) {
  return tensor ? data<T>(name, *tensor, sizes) : nullptr;
}

int code_of(const Tensor& matrix) {
  const ScalarType type = matrix.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "a matrix is float32, bfloat16 or float16");
  return type == ScalarType::Float ? kFloat32 : type == ScalarType::BFloat16 ? kBfloat16 : kFloat16;
}

// Address of a matrix [rows, columns] of the type that `like` has.
const void* matrix(const char* name, const Tensor& tensor, const Tensor& like, int64_t rows,
                   int64_t columns) {
  STD_TORCH_CHECK(code_of(tensor) == code_of(like), "argument '", name, "' is of another type");
  check_shape(name, tensor, {rows, columns});
  return tensor.data_ptr();
}

void check_rank(const char* name, const Tensor& tensor, int64_t rank) {
  STD_TORCH_CHECK(tensor.dim() == rank, "argument '", name, "' has not ", rank, " dimensions");
}

void check_heads(int64_t rows, int64_t head_dim) {
  STD_TORCH_CHECK(head_dim > 0 && rows % head_dim == 0, "'head_dim' does not divide ", rows);
}

Keep keep(const Maybe& index, const Maybe& count, int64_t B, int64_t units, int64_t rows_a_unit) {
  STD_TORCH_CHECK(index.has_value() == count.has_value(), "a keep set is index and count together");
  return {data<int32_t>("index", index, {B, units}), data<int32_t>("count", count, {B}), units,
          rows_a_unit};
}

int activation_of(const std::string& name) {
  STD_TORCH_CHECK(name == "relu" || name == "silu" || name == "gelu", "activation ", name);
  return name == "relu" ? kRelu : name == "silu" ? kSilu : kGelu;
}

Tensor floats(const Tensor& like, Sizes sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

Tensor integers(const Tensor& like, Sizes sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Int);
}

float* out(const Tensor& tensor) { return (float*)tensor.data_ptr(); }
int32_t* numbers(const Tensor& tensor) { return (int32_t*)tensor.data_ptr(); }

// ---------------------------------------------------------------------------- the ops

Tensor linear(Tensor x, Tensor weight, Maybe bias) {
  check_rank("weight", weight, 2);
  const int64_t O = weight.size(0), I = weight.size(1);
  STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous() && x.size(-1) == I &&
                      x.scalar_type() == ScalarType::Float,
                  "argument 'x' does not fit: float32 [..., ", I, "], contiguous");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = O;
  const Tensor y = torch::stable::new_empty(x, sizes);
  const int64_t M = O == 0 ? 0 : y.numel() / O;
  call("linear", shadowc_linear,
       {out(x), matrix("weight", weight, weight, O, I), data<float>("bias", bias, {O}), out(y), M,
        O, I, threads(), code_of(weight)});
  return y;
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  const int64_t C = weight.numel();
  STD_TORCH_CHECK(C > 0 && x.dim() > 0 && x.is_contiguous() && x.size(-1) == C &&
                      x.scalar_type() == ScalarType::Float,
                  "argument 'x' does not fit: float32 [..., ", C, "], contiguous");
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  call("rms_norm", shadowc_rms_norm,
       {out(x), data<float>("weight", weight, {C}), out(y), x.numel() / C, C, (float)eps});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> sparse_qkv(Tensor x, Tensor wq, Maybe bq, Tensor wk, Maybe bk,
                                              Tensor wv, Maybe bv, int64_t head_dim, Maybe index,
                                              Maybe count) {
  check_rank("x", x, 3);
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2), D = head_dim;
  const int64_t queries = wq.size(0), keys = wk.size(0);
  check_heads(queries, D);
  check_heads(keys, D);
  const Keep kept = keep(index, count, B, queries / D, D);
  const Tensor q = floats(x, {B, T, queries}), k = floats(x, {B, T, keys});
  const Tensor v = floats(x, {B, T, keys});
  call("sparse_qkv", shadowc_qkv,
       {data<float>("x", x, {B, T, C}), matrix("wq", wq, wq, queries, C),
        data<float>("bq", bq, {queries}), matrix("wk", wk, wq, keys, C),
        data<float>("bk", bk, {keys}), matrix("wv", wv, wq, keys, C),
        data<float>("bv", bv, {keys}), out(q), out(k), out(v), kept.index, kept.count, B, T, C,
        queries / D, keys / D, D, threads(), code_of(wq)});
  return {q, k, v};
}

Tensor decode_attention(Tensor q, Maybe k, Maybe v, Maybe cos, Maybe sin, Tensor k_cache,
                        Tensor v_cache, Tensor start, Tensor position, double scale, Maybe index,
                        Maybe count) {
  check_rank("q", q, 3);
  check_rank("k_cache", k_cache, 4);
  const int64_t B = q.size(0), T = q.size(1), G = k_cache.size(1), S = k_cache.size(2);
  const int64_t D = k_cache.size(3), rows = k_cache.size(0), width = q.size(2);
  STD_TORCH_CHECK(D >= 8 && D <= 256 && D % 8 == 0, "a head dim is a multiple of 8, up to 256");
  STD_TORCH_CHECK(G > 0 && width % (G * D) == 0 && rows >= B, "'q' does not fit the cache");
  STD_TORCH_CHECK(k && v, "keys and values that wait are for CUDA targets");
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "rotary is cos and sin together");
  STD_TORCH_CHECK(T == 1 || B == 1, "a prompt is one row here");
  const Keep kept = keep(index, count, B, width / D, D);
  const float *queries = data<float>("q", q, {B, T, width});
  const float* keys = data<float>("k", k, {B, T, G * D});
  const float* values = data<float>("v", v, {B, T, G * D});
  const float* cosines = data<float>("cos", cos, {B, T, D});
  const float* sines = data<float>("sin", sin, {B, T, D});
  float *key_cache = data<float>("k_cache", k_cache, {rows, G, S, D});
  float *value_cache = data<float>("v_cache", v_cache, {rows, G, S, D});
  const int64_t* first = data<int64_t>("start", start, {B});
  const int64_t begin = *data<int64_t>("position", position, {1});
  STD_TORCH_CHECK(begin >= 0 && begin <= S - T, "no room for ", T, " tokens behind ", begin, " in ",
                  S, " slots");
  const Tensor context = floats(q, {B, T, width});
  for (int64_t t = 0; t < T; ++t) {  // of one row: a token sees itself and those before it
    const int64_t slot = begin + t, at = t * width, new_at = t * G * D;
    call("decode_attention", shadowc_attention,
         {queries + at, keys + new_at, values + new_at, cosines ? cosines + t * D : nullptr,
          sines ? sines + t * D : nullptr, key_cache, value_cache, first, &slot, out(context) + at,
          kept, B, width / D, G, D, S, (float)scale, threads()});
  }
  return context;
}

Tensor sparse_out_proj(Tensor ctx, Tensor weight_t, Maybe bias, Maybe residual, int64_t head_dim,
                       Maybe index, Maybe count) {
  check_rank("ctx", ctx, 3);
  check_rank("weight_t", weight_t, 2);
  const int64_t B = ctx.size(0), T = ctx.size(1), rows = ctx.size(2), C = weight_t.size(1);
  check_heads(rows, head_dim);
  const Tensor y = floats(ctx, {B, T, C});
  call("sparse_out_proj", shadowc_out_proj,
       {data<float>("ctx", ctx, {B, T, rows}), matrix("weight_t", weight_t, weight_t, rows, C),
        data<float>("bias", bias, {C}), data<float>("residual", residual, {B, T, C}), out(y), rows,
        keep(index, count, B, rows / head_dim, head_dim), B * T, T, C, threads(),
        code_of(weight_t)});
  return y;
}

std::tuple<Tensor, Tensor> mlp(const char* name, const Tensor& x, const Tensor& w1, const Maybe& up,
                               const Maybe& b1, const Tensor& w2t, const Maybe& b2,
                               const Maybe& residual, const std::string& activation,
                               bool skip_zeros, const Maybe& index, const Maybe& count) {
  check_rank("x", x, 3);
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2), F = w1.size(0);
  STD_TORCH_CHECK(T > 0, "no token");
  const Tensor y = floats(x, {B, T, C}), read = integers(x, {B});
  call(name, shadowc_mlp,
       {data<float>("x", x, {B, T, C}), matrix("w1", w1, w1, F, C),
        up ? matrix("w_up", *up, w1, F, C) : nullptr, data<float>("b1", b1, {F}),
        matrix("w2t", w2t, w1, F, C), data<float>("b2", b2, {C}),
        data<float>("residual", residual, {B, T, C}), out(y), numbers(read),
        keep(index, count, B, F, 1), B * T, T, C, F, activation_of(activation), skip_zeros,
        threads(), code_of(w1)});
  return {y, read};
}

std::tuple<Tensor, Tensor> sparse_mlp(Tensor x, Tensor w1, Maybe b1, Tensor w2t, Maybe b2,
                                      Maybe residual, std::string activation, bool skip_zeros,
                                      Maybe index, Maybe count) {
  return mlp("sparse_mlp", x, w1, {}, b1, w2t, b2, residual, activation, skip_zeros, index, count);
}

std::tuple<Tensor, Tensor> sparse_gated_mlp(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_downt,
                                            Maybe residual, std::string activation,
                                            bool skip_zeros, Maybe index, Maybe count) {
  return mlp("sparse_gated_mlp", x, w_gate, w_up, {}, w_downt, {}, residual, activation,
             skip_zeros, index, count);
}

std::tuple<Tensor, Tensor> select_best(Tensor scores, int64_t kept, int64_t floor, bool local) {
  check_rank("scores", scores, 3);
  const int64_t B = scores.size(0), L = scores.size(1), N = scores.size(2);
  STD_TORCH_CHECK(kept >= 0 && kept <= L * N, "'keep' does not fit: 0 to ", L * N, " units");
  STD_TORCH_CHECK(local || (floor >= 0 && floor <= N && L * floor <= kept), "'floor' does not fit");
  const Tensor index = integers(scores, {L, B, N}), count = integers(scores, {L, B});
  call("select", shadowc_select,
       {data<float>("scores", scores, {B, L, N}), numbers(index), numbers(count), B, L, N, kept,
        floor, local, threads()});
  return {index, count};
}

std::tuple<Tensor, Tensor> select_above(Tensor scores, Tensor threshold) {
  check_rank("scores", scores, 3);
  const int64_t B = scores.size(0), L = scores.size(1), N = scores.size(2);
  const Tensor index = integers(scores, {L, B, N}), count = integers(scores, {L, B});
  call("select_above", shadowc_select_above,
       {data<float>("scores", scores, {B, L, N}), data<float>("threshold", threshold, {L}),
        numbers(index), numbers(count), B, L, N, threads()});
  return {index, count};
}

void choose_into(Tensor x, Maybe first, Maybe first_bias, std::vector<Tensor> weights,
                 std::vector<Tensor> biases, std::vector<Tensor> thresholds,
                 std::vector<Tensor> sets, std::vector<int64_t> at) {
  const size_t kinds = weights.size();
  STD_TORCH_CHECK((kinds == 1 || kinds == 2) && biases.size() == kinds &&
                      thresholds.size() == kinds && sets.size() == 2 * kinds && at.size() == kinds,
                  "a tap chooses heads, neurons or both");
  check_rank("x", x, 3);
  const int64_t B = x.size(0), C = x.size(2), R = weights[0].size(1);
  Choose arguments = {data<float>("x", x, {B, 1, first ? C : R}),
                      first ? matrix("first", *first, weights[0], R, C) : nullptr,
                      data<float>("first_bias", first_bias, {R}), {}, B, C, R, threads(),
                      code_of(weights[0])};
  for (size_t k = 0; k < kinds; ++k) {
    check_rank("index", sets[2 * k], 3);
    const int64_t whole = sets[2 * k].size(0), N = sets[2 * k].size(2);
    const int64_t L = thresholds[k].numel();
    STD_TORCH_CHECK(at[k] >= 0 && at[k] <= whole - L, "argument 'at' does not fit: ", at[k]);
    arguments.kind[k] = {matrix("weight", weights[k], weights[0], L * N, R),
                         data<float>("bias", biases[k], {L * N}),
                         data<float>("threshold", thresholds[k], {L}),
                         data<int32_t>("index", sets[2 * k], {whole, B, N}) + at[k] * B * N,
                         data<int32_t>("count", sets[2 * k + 1], {whole, B}) + at[k] * B, L, N};
  }
  call("choose_into", shadowc_choose, arguments);
}

}  // namespace

STABLE_TORCH_LIBRARY(shadowc, m) {
  shadowc_isa(nullptr);  // the best instruction set of this CPU
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("sparse_qkv(Tensor x, Tensor wq, Tensor? bq, Tensor wk, Tensor? bk, Tensor wv, Tensor? bv, "
        "int head_dim, Tensor? index, Tensor? count) -> (Tensor q, Tensor k, Tensor v)");
  m.def("decode_attention(Tensor q, Tensor? k, Tensor? v, Tensor? cos, Tensor? sin, "
        "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor start, Tensor position, float scale, "
        "Tensor? index, Tensor? count) -> Tensor");
  m.def("sparse_out_proj(Tensor ctx, Tensor weight_t, Tensor? bias, Tensor? residual, "
        "int head_dim, Tensor? index, Tensor? count) -> Tensor");
  m.def("sparse_mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2t, Tensor? b2, Tensor? residual, "
        "str activation, bool skip_zeros, Tensor? index, Tensor? count) "
        "-> (Tensor y, Tensor rows)");
  m.def("sparse_gated_mlp(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_downt, Tensor? residual, "
        "str activation, bool skip_zeros, Tensor? index, Tensor? count) "
        "-> (Tensor y, Tensor rows)");
  m.def("select(Tensor scores, int keep, int floor, bool local) -> (Tensor index, Tensor count)");
  m.def("select_above(Tensor scores, Tensor threshold) -> (Tensor index, Tensor count)");
  m.def("choose_into(Tensor x, Tensor? first, Tensor? first_bias, Tensor[] weights, "
        "Tensor[] biases, Tensor[] thresholds, Tensor(a!)[] sets, int[] at) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shadowc, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("sparse_qkv", TORCH_BOX(&sparse_qkv));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("sparse_out_proj", TORCH_BOX(&sparse_out_proj));
  m.impl("sparse_mlp", TORCH_BOX(&sparse_mlp));
  m.impl("sparse_gated_mlp", TORCH_BOX(&sparse_gated_mlp));
  m.impl("select", TORCH_BOX(&select_best));
  m.impl("select_above", TORCH_BOX(&select_above));
  m.impl("choose_into", TORCH_BOX(&choose_into));
}
