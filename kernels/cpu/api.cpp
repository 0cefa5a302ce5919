// The C functions that the launchers call. All of them return a Code of check.h: 0 when done.
#include <cstring>

#include "check.h"
#include "pool.h"

#define API extern "C" __attribute__((visibility("default")))

namespace shadowc {

const Table* table = &kGeneric;

namespace {

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

// Counted up with every change of a struct that the launchers pack.
API int shadowc_abi() { return 5; }

// The address of GOMP_parallel: see pool.h.
API void shadowc_use_openmp(Parallel parallel) { use_openmp(parallel); }

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

struct Linear {
  const float* x;
  const void* weight;
  const float* bias;
  float* out;
  int64_t M, O, I;
  int threads, dtype;
};

struct Qkv {
  const float* x;
  const void* wq;
  const float* bq;
  const void* wk;
  const float* bk;
  const void* wv;
  const float* bv;
  float *q, *k, *v;
  const int32_t *index, *count;
  int64_t B, T, C, H, G, D;
  int threads, dtype;
};

API int shadowc_linear(const Linear* p) {
  if (p == nullptr) return kPointer;
  return launch({p->x, {{p->weight, p->bias, p->out, p->O, {}}}, 1, p->M, 1, p->I, p->threads,
                 p->dtype},
                table->project);
}

API int shadowc_qkv(const Qkv* p) {
  if (p == nullptr) return kPointer;
  if (!are_sizes({p->B, p->T}) || !are_sizes({p->H, p->D}) || !are_sizes({p->G, p->D}))
    return kSize;
  return launch({p->x,
                 {{p->wq, p->bq, p->q, p->H * p->D, {p->index, p->count, p->H, p->D}},
                  {p->wk, p->bk, p->k, p->G * p->D, {}},
                  {p->wv, p->bv, p->v, p->G * p->D, {}}},
                 3, p->B * p->T, p->T, p->C, p->threads, p->dtype},
                table->project);
}

#define CHECKED(op, Arguments) \
  API int shadowc_##op(const Arguments* p) { return p ? launch(*p, table->op) : kPointer; }
CHECKED(out_proj, OutProj)
CHECKED(mlp, Mlp)
CHECKED(attention, Attention)
CHECKED(select, Select)
CHECKED(select_above, SelectAbove)
CHECKED(choose, Choose)

API int shadowc_rms_norm(const Norm* p) { return p ? launch(*p, table->norm) : kPointer; }
