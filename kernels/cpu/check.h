// What an op refuses before it touches anything: the library is called by the launchers, by ONNX
// Runtime and by other people's programs, and none of them is believed. A pointer cannot be measured
// here; everything else that a call says of it is: sizes, types, keep sets, places. The cost of a
// call is a few dozen comparisons and one pass over the kept indices.
#pragma once
#include <initializer_list>
#include <new>

#include "ops.h"

namespace shadowc {

// What every shadowc_* function returns, as shadowc/native.py names it.
enum Code : int { kFine, kPosition, kPointer, kSize, kKeepSet, kType, kMemory };

inline const char* reason(int code) {
  switch (code) {
    case kPosition: return "a position is outside of the cache";
    case kPointer: return "a pointer is null";
    case kSize: return "a size is out of range, or does not fit another one";
    case kKeepSet: return "a keep set is not ascending, or names units that there are not";
    case kType: return "a matrix type or activation is unknown";
    case kMemory: return "there is not enough memory";
    default: return "nothing";
  }
}

constexpr int64_t kMostValues = (int64_t)1 << 46;  // no address space holds a larger tensor
constexpr int64_t kMostMatrixRows = INT32_MAX;     // kernels number them by int32
constexpr int kMostThreadsAsked = 1 << 16;

// Whether a tensor can have these sizes; so no product of them overflows.
inline bool are_sizes(std::initializer_list<int64_t> dims) {
  int64_t values = 1;
  for (const int64_t dim : dims) {
    if (dim < 0 || dim > kMostValues) return false;
    if (dim > 0 && values > kMostValues / dim) return false;
    if (dim > 0) values *= dim;
  }
  return true;
}

inline bool are_threads(int threads) { return threads >= 1 && threads <= kMostThreadsAsked; }
inline bool is_dtype(int dtype) { return dtype >= kFloat32 && dtype <= kFloat16; }
inline bool is_number(int64_t rows) { return rows >= 0 && rows <= kMostMatrixRows; }

// Keep sets of B batch rows over a matrix of so many rows.
inline int check(const Keep& keep, int64_t B, int64_t rows) {
  if (keep.index == nullptr && (keep.count == nullptr || rows == 0)) return kFine;
  if (keep.index == nullptr || keep.count == nullptr) return kPointer;
  const int64_t N = keep.units;
  if (!is_number(N) || !are_sizes({B, N}) || !are_sizes({N, keep.rows_a_unit}) ||
      N * keep.rows_a_unit != rows)
    return kSize;
  bool wrong = false;
  for (int64_t b = 0; b < B; ++b) {
    const int32_t* index = keep.index + b * N;
    const int64_t n = keep.count[b];
    if (n < 0 || n > N) return kKeepSet;
    for (int64_t i = 1; i < n; ++i) wrong |= index[i] <= index[i - 1];  // no branch: vector code
    wrong |= n > 0 && (index[0] < 0 || index[n - 1] >= N);
  }
  return wrong ? kKeepSet : kFine;
}

// M tokens, T of each batch row.
inline bool are_tokens(int64_t M, int64_t T) { return M >= 0 && T >= 1 && M % T == 0; }

inline int check(const Project& p) {
  if (!is_dtype(p.dtype)) return kType;
  if (!are_threads(p.threads) || p.matrices < 1 || p.matrices > 3) return kSize;
  if (p.M == 0) return kFine;
  if (!are_tokens(p.M, p.T) || !are_sizes({p.M, p.C})) return kSize;
  if (p.x == nullptr && p.C > 0) return kPointer;
  int64_t rows = 0;
  for (int i = 0; i < p.matrices; ++i) {
    const Matrix& a = p.matrix[i];
    if (!is_number(a.rows) || !are_sizes({a.rows, p.C}) || !are_sizes({p.M, a.rows})) return kSize;
    rows += a.rows;
    if (a.rows == 0) continue;
    if (a.out == nullptr || (a.weight == nullptr && p.C > 0)) return kPointer;
    if (const int code = check(a.keep, p.M / p.T, a.rows)) return code;
  }
  return is_number(rows) ? kFine : kSize;
}

inline int check(const OutProj& p) {
  if (!is_dtype(p.dtype)) return kType;
  if (!are_threads(p.threads)) return kSize;
  if (p.M == 0) return kFine;
  if (!are_tokens(p.M, p.T) || !is_number(p.rows) || !are_sizes({p.M, p.rows}) ||
      !are_sizes({p.rows, p.C}) || !are_sizes({p.M, p.C}))
    return kSize;
  if (p.rows > 0 && (p.ctx == nullptr || (p.weight_t == nullptr && p.C > 0))) return kPointer;
  if (p.y == nullptr && p.C > 0) return kPointer;
  return check(p.keep, p.M / p.T, p.rows);
}

inline int check(const Mlp& p) {
  if (!is_dtype(p.dtype) || p.activation < kRelu || p.activation > kGelu) return kType;
  if (!are_threads(p.threads) || !are_tokens(p.M, p.T) || !is_number(p.F) ||
      !are_sizes({p.M, p.C}) || !are_sizes({p.F, p.C}) || !are_sizes({p.M, p.F}))
    return kSize;
  if (p.M == 0) return kFine;
  if (p.read == nullptr || (p.C > 0 && (p.x == nullptr || p.y == nullptr))) return kPointer;
  if (p.F > 0 && p.C > 0 && (p.w1 == nullptr || p.w2t == nullptr)) return kPointer;
  return check(p.keep, p.M / p.T, p.F);
}

inline int check(const Attention& p) {
  if (!are_threads(p.threads) || p.B < 0 || p.G < 1 || p.H < 1 || p.S < 0 || p.D < 8 ||
      p.D > 256 || p.D % 8 != 0 || p.H % p.G != 0)
    return kSize;
  if (!are_sizes({p.B, p.H, p.D}) || !are_sizes({p.B, p.G, p.S, p.D}) ||
      !are_sizes({p.B, p.H, p.S, p.D}))
    return kSize;
  if (p.position == nullptr) return kPointer;
  if (*p.position < 0 || *p.position >= p.S) return kPosition;
  if (p.B == 0) return kFine;
  for (const void* one : {(const void*)p.q, (const void*)p.k, (const void*)p.v,
                          (const void*)p.k_cache, (const void*)p.v_cache, (const void*)p.start,
                          (const void*)p.ctx})
    if (one == nullptr) return kPointer;
  if ((p.cos == nullptr) != (p.sin == nullptr)) return kPointer;
  for (int64_t b = 0; b < p.B; ++b)
    if (p.start[b] > p.S) return kPosition;
  return check(Keep{p.keep.index, p.keep.count, p.keep.units, 1}, p.B, p.H);
}

inline int check(const Norm& p) {
  if (!are_sizes({p.M, p.C})) return kSize;
  if (p.M == 0 || p.C == 0) return kFine;
  return p.x == nullptr || p.weight == nullptr || p.y == nullptr ? kPointer : kFine;
}

inline int check(const Select& p) {
  if (!are_threads(p.threads) || !is_number(p.N) || !are_sizes({p.B, p.L, p.N}) || p.keep < 0 ||
      p.keep > p.L * p.N)
    return kSize;
  if (!p.local && (p.floor < 0 || p.floor > p.N || p.L * p.floor > p.keep)) return kSize;
  if (p.B == 0 || p.L == 0) return kFine;
  if (p.count == nullptr) return kPointer;
  return p.N > 0 && (p.scores == nullptr || p.index == nullptr) ? kPointer : kFine;
}

inline int check(const SelectAbove& p) {
  if (!are_threads(p.threads) || !is_number(p.N) || !are_sizes({p.B, p.L, p.N})) return kSize;
  if (p.B == 0 || p.L == 0) return kFine;
  if (p.count == nullptr || p.threshold == nullptr) return kPointer;
  return p.N > 0 && (p.scores == nullptr || p.index == nullptr) ? kPointer : kFine;
}

inline int check(const Choose& p) {
  if (!is_dtype(p.dtype)) return kType;
  if (!are_threads(p.threads) || !are_sizes({p.B, p.C}) || !are_sizes({p.B, p.R}) ||
      !are_sizes({p.R, p.C}) || !is_number(p.R) || p.kind[0].N < 1)
    return kSize;
  if (p.B == 0) return kFine;
  int64_t products = p.R + (p.first != nullptr ? p.C : 0), units = 0;
  for (const Choice& kind : p.kind) {
    if (&kind != p.kind && kind.N == 0) continue;  // one kind alone
    if (!is_number(kind.N) || !are_sizes({p.B, kind.L, kind.N}) || !is_number(kind.L * kind.N))
      return kSize;
    units += kind.L * kind.N;
    if (kind.L == 0) continue;
    if (kind.threshold == nullptr || kind.index == nullptr || kind.count == nullptr ||
        (kind.weight == nullptr && p.R > 0))
      return kPointer;
  }
  if (!is_number(units) || !are_sizes({p.B, p.R, units + products})) return kSize;
  return p.x == nullptr && (p.first != nullptr ? p.C : p.R) > 0 ? kPointer : kFine;
}

// Runs an op if nothing is wrong with its arguments.
template <class P>
int launch(const P& p, void (*op)(const P&)) {
  if (const int code = check(p)) return code;
  try {
    op(p);
  } catch (const std::bad_alloc&) {
    return kMemory;
  }
  return kFine;
}

}  // namespace shadowc
