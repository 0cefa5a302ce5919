// The arguments of every op, as structs of plain pointers, and the table that each instruction set
// fills. Matrices are row-major; shape letters as in the Python files. The launchers pack OutProj,
// Mlp, Attention, Norm, Select, SelectAbove and Choose field by field: a change here is a change
// there, and of the number that shadowc_abi() returns.
#pragma once
#include <cstdint>

namespace shadowc {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum Activation : int { kRelu = 0, kSilu = 1, kGelu = 2 };

// Kept units of each batch row: index [B, N] ascending, the first count[b] valid; null = all.
struct Keep {
  const int32_t* index;
  const int32_t* count;
  int64_t units;        // N
  int64_t rows_a_unit;  // matrix rows of one unit: D of a head, 1 of a neuron
};

struct Matrix {
  const void* weight;  // [rows, C]
  const float* bias;   // [rows] or null
  float* out;          // [M, rows]
  int64_t rows;
  Keep keep;
};

// out = x weight^T + bias for up to three matrices that share x; zeros for rows not kept.
struct Project {
  const float* x;  // [M, C], M = B * T
  Matrix matrix[3];
  int64_t matrices, M, T, C;
  int threads, dtype;
};

// y = residual + bias + sum over kept rows of coefficient * row.
struct OutProj {
  const float* ctx;       // [M, rows]
  const void* weight_t;   // [rows, C]
  const float* bias;      // [C] or null
  const float* residual;  // [M, C] or null
  float* y;               // [M, C]
  int64_t rows;
  Keep keep;
  int64_t M, T, C;
  int threads, dtype;
};

// y = residual + b2 + sum_u h_u w2t_u, h = act(w1 x + b1), or h = act(w1 x) * (up x) when gated.
struct Mlp {
  const float* x;         // [M, C]
  const void* w1;         // [F, C]
  const void* up;         // [F, C] or null
  const float* b1;        // [F] or null
  const void* w2t;        // [F, C]
  const float* b2;        // [C] or null
  const float* residual;  // [M, C] or null
  float* y;               // [M, C]
  int32_t* read;          // [B]
  Keep keep;
  int64_t M, T, C, F;
  int activation, skip_zeros, threads, dtype;
};

// One token: rotary, cache write, attention over slots start[b]..position.
struct Attention {
  const float *q, *k, *v;           // [B, H*D], [B, G*D]
  const float *cos, *sin;           // [B, D] or null
  float *k_cache, *v_cache;         // [B, G, S, D]
  const int64_t *start, *position;  // [B], [1]
  float* ctx;                       // [B, H*D]
  Keep keep;
  int64_t B, H, G, D, S;
  float scale;
  int threads;
};

struct Norm {
  const float *x, *weight;  // [M, C], [C]
  float* y;                 // [M, C]
  int64_t M, C;
  float eps;
};

// index [L, B, N], count [L, B] from scores [B, L, N].
struct Select {
  const float* scores;
  int32_t *index, *count;
  int64_t B, L, N, keep, floor;
  int local, threads;
};

// The same from thresholds [L].
struct SelectAbove {
  const float *scores, *threshold;
  int32_t *index, *count;
  int64_t B, L, N;
  int threads;
};

// What a predictor's output matrix chooses of one kind of unit.
struct Choice {
  const void* weight;      // [L * N, R]
  const float* bias;       // [L * N]
  const float* threshold;  // [L]
  int32_t *index, *count;  // [L, B, N], [L, B]
  int64_t L, N;
};

// A whole predictor and its selection: code = first x + bias, or x itself without `first`; scores
// from the code, keep sets from the scores.
struct Choose {
  const float* x;       // [B, C], [B, R] without `first`
  const void* first;    // [R, C] or null
  const float* bias;    // [R] or null
  Choice kind[2];       // the second with N = 0 where there is one alone
  int64_t B, C, R;
  int threads, dtype;
};

struct Table {
  const char* name;
  void (*project)(const Project&);
  void (*out_proj)(const OutProj&);
  void (*mlp)(const Mlp&);
  void (*attention)(const Attention&);
  void (*norm)(const Norm&);
  void (*select)(const Select&);
  void (*select_above)(const SelectAbove&);
  void (*choose)(const Choose&);
};

extern const Table* table;  // of the instruction set in use
extern const Table kGeneric;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SHADOWC_X86 1
extern const Table kAvx2;
extern const Table kAvx512;
#endif

}  // namespace shadowc
