// The C functions that shadowc/native.py calls. All arguments have been checked there.
#include <cstring>

#include "ops.h"

#define API extern "C" __attribute__((visibility("default")))

namespace shadowc {
namespace {

const Table* table = &kGeneric;

bool supports(const char* isa) {
  if (std::strcmp(isa, "generic") == 0) return true;
#ifdef SHADOWC_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (std::strcmp(isa, "avx2") == 0) return avx2;
  if (std::strcmp(isa, "avx512") == 0)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
#endif
  return false;
}

}  // namespace
}  // namespace shadowc

using namespace shadowc;

// Counted up with every change of a signature below.
API int shadowc_abi() { return 1; }

// Selects an instruction set by name, the best one for null; returns its name, null if refused.
API const char* shadowc_isa(const char* name) {
  if (name != nullptr && !supports(name)) return nullptr;
  const auto wanted = [&](const char* isa) {
    return name == nullptr ? supports(isa) : std::strcmp(name, isa) == 0;
  };
  table = &kGeneric;
#ifdef SHADOWC_X86
  if (wanted("avx2")) table = &kAvx2;
  if (wanted("avx512")) table = &kAvx512;
#endif
  return table->name;
}

API void shadowc_linear(const float* x, const void* weight, const float* bias, float* out,
                        int64_t M, int64_t O, int64_t I, int threads, int dtype) {
  table->project({x, {{weight, bias, out, O, {}}}, 1, M, 1, I, threads, dtype});
}

API void shadowc_qkv(const float* x, const void* wq, const float* bq, const void* wk,
                     const float* bk, const void* wv, const float* bv, float* q, float* k, float* v,
                     const int32_t* index, const int32_t* count, int64_t B, int64_t T, int64_t C,
                     int64_t H, int64_t G, int64_t D, int threads, int dtype) {
  table->project({x,
                  {{wq, bq, q, H * D, {index, count, H, D}},
                   {wk, bk, k, G * D, {}},
                   {wv, bv, v, G * D, {}}},
                  3, B * T, T, C, threads, dtype});
}

API void shadowc_out_proj(const float* ctx, const void* weight_t, const float* bias,
                          const float* residual, float* y, const int32_t* index,
                          const int32_t* count, int64_t B, int64_t T, int64_t C, int64_t H,
                          int64_t D, int threads, int dtype) {
  table->out_proj({ctx, weight_t, bias, residual, y, H * D, {index, count, H, D}, B * T, T, C,
                   threads, dtype});
}

API void shadowc_mlp(const float* x, const void* w1, const void* up, const float* b1,
                     const void* w2t, const float* b2, const float* residual, float* y,
                     int32_t* read, const int32_t* index, const int32_t* count, int64_t B,
                     int64_t T, int64_t C, int64_t F, int activation, int skip_zeros, int threads,
                     int dtype) {
  table->mlp({x, w1, up, b1, w2t, b2, residual, y, read, {index, count, F, 1}, B * T, T, C, F,
              activation, skip_zeros, threads, dtype});
}

// Returns 1 when the position is outside of the cache, 0 when done.
API int shadowc_attention(const float* q, const float* k, const float* v, const float* cos,
                          const float* sin, float* k_cache, float* v_cache, const int64_t* start,
                          const int64_t* position, float* ctx, const int32_t* index,
                          const int32_t* count, int64_t B, int64_t H, int64_t G, int64_t D,
                          int64_t S, float scale, int threads) {
  if (*position < 0 || *position >= S) return 1;
  table->attention({q, k, v, cos, sin, k_cache, v_cache, start, position, ctx,
                    {index, count, H, D}, B, H, G, D, S, scale, threads});
  return 0;
}

API void shadowc_rms_norm(const float* x, const float* weight, float* y, int64_t M, int64_t C,
                          float eps) {
  table->norm({x, weight, y, M, C, eps, 1});
}

API void shadowc_select(const float* scores, int32_t* index, int32_t* count, int64_t B, int64_t L,
                        int64_t N, int64_t keep, int64_t floor, int local, int threads) {
  select(scores, index, count, B, L, N, keep, floor, local != 0, threads);
}
