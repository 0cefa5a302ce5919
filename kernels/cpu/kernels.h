// The ops, written once over simd.h. Two loops do nearly all of the work and are bound by memory:
//   dots     out[i][m] = weight[unit_i] . x[m]              first projections
//   combine  y[m]      = sum_i coefficient[i][m] row_i      second projections, packed transposed
// Both read a kept row once for all batch rows, ask for the next rows while they compute on these,
// and add in an order that does not depend on the number of threads.

constexpr int64_t kMostRows = 64;   // batch rows served by one pass over the weights
constexpr int64_t kMostUnits = 64;  // matrix rows in one task of a first projection
constexpr int64_t kMostParts = 32;  // partial sums of a second projection
constexpr int64_t kPartRows = 64;   // and the fewest rows of one
constexpr int64_t kLeastProducts = 1 << 18;  // of a predictor that is worth more than one thread
constexpr int kRows = 4;   // scattered rows at once; neighbours go one by one (see is_run)
constexpr int kBatch = 4;  // batch rows at once

template <class T>
INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}

INLINE int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The next task, in a cache line of its own: its neighbours are read by all threads.
struct alignas(64) Counter {
  int64_t next = 0;
};

// Calls body(task) for tasks [0, n) on up to `threads` threads, handed out one by one, so that a
// slowed thread takes fewer and one that comes late takes none.
template <class Body>
INLINE void in_team(int64_t threads, int64_t n, const Body& body) {
  struct Work {
    Counter counter;
    int64_t n;
    const Body& body;
  } work{{}, n, body};
  const auto task = [](void* argument) {
    Work& own = *(Work*)argument;
    for (int64_t i; (i = __atomic_fetch_add(&own.counter.next, 1, __ATOMIC_RELAXED)) < own.n;)
      own.body(i);
  };
  run((int)smaller(threads, n), task, &work);
}

// Calls body with a value of the weight type, for its type alone.
template <class Body>
INLINE void with_dtype(int dtype, const Body& body) {
  if (dtype == kFloat32) body(float{});
  if (dtype == kBfloat16) body(bf16{});
  if (dtype == kFloat16) body(fp16{});
}

// ---------------------------------------------------------------------------- the two loops

// out[r * stride + k] = row[r] . x[k]; asks for next[r] meanwhile.
template <class W, int R, int X>
INLINE void dot(const W* const* row, const W* const* next, const float* const* x, int64_t n,
                float* out, int64_t stride) {
  constexpr int LINE = 64 / sizeof(W);
  vfloat acc[R][X][2] = {};
  int64_t i = 0;
  for (; i + LINE <= n; i += LINE) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + i, 0, 3);
#pragma GCC unroll 16
    for (int v = 0; v < LINE / LANES; ++v) {
      const int64_t at = i + v * LANES;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vfloat w = load(row[r] + at);
#pragma GCC unroll 8
        for (int k = 0; k < X; ++k) acc[r][k][v & 1] += w * load(x[k] + at);
      }
    }
  }
  for (; i < n; i += LANES)
    for (int r = 0; r < R; ++r) {
      const vfloat w = load(row[r] + i, n - i);
      for (int k = 0; k < X; ++k) acc[r][k][0] += w * load(x[k] + i, n - i);
    }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int k = 0; k < X; ++k) out[r * stride + k] = sum(acc[r][k][0] + acc[r][k][1]);
}

// acc[c] += sum_r coefficient[r] row[r][c], c < n; acc is padded to whole vectors.
template <class W, int R>
INLINE void axpy(const W* const* row, const W* const* next, const float* coefficient, int64_t n,
                 float* acc) {
  constexpr int LINE = 64 / sizeof(W);
  vfloat c[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) c[r] = vfloat{} + coefficient[r];
  int64_t i = 0;
  for (; i + LINE <= n; i += LINE) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + i, 0, 3);
#pragma GCC unroll 16
    for (int v = 0; v < LINE / LANES; ++v) {
      const int64_t at = i + v * LANES;
      vfloat a = load(acc + at);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) a += c[r] * load(row[r] + at);
      store(acc + at, a);
    }
  }
  for (; i < n; i += LANES) {
    vfloat a = load(acc + i);
    for (int r = 0; r < R; ++r) a += c[r] * load(row[r] + i, n - i);
    store(acc + i, a);
  }
}

// The same for M batch rows: acc[m * stride + c] += sum_r coefficient[r][m] row[r][c].
template <class W, int R>
INLINE void axpy_batch(const W* const* row, const W* const* next, const float* const* coefficient,
                       int64_t M, int64_t n, float* acc, int64_t stride) {
  constexpr int64_t TILE = 2 * LANES;
  for (int64_t i = 0; i < n; i += TILE) {
    vfloat w[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(next[r] + i, 0, 3);
      if (i + TILE <= n) {
        w[r][0] = load(row[r] + i);
        w[r][1] = load(row[r] + i + LANES);
      } else {
        w[r][0] = load(row[r] + i, n - i);
        w[r][1] = n - i > LANES ? load(row[r] + i + LANES, n - i - LANES) : vfloat{};
      }
    }
    for (int64_t m = 0; m < M; ++m) {
      float* at = acc + m * stride + i;
      vfloat a = load(at), b = load(at + LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const float c = coefficient[r][m];
        a += c * w[r][0];
        b += c * w[r][1];
      }
      store(at, a);
      store(at + LANES, b);
    }
  }
}

// The rows of a matrix that a task works on, and which batch rows want each.
struct Rows {
  int32_t id[kMostUnits];
  uint64_t wanted[kMostUnits];  // bit m
  int n;
};

// Rows [first, last) that any of the batch rows m0..m0+M keeps; token m is of batch row m / T.
INLINE void kept_rows(const Keep& keep, int64_t first, int64_t last, int64_t m0, int64_t M,
                      int64_t T, Rows& rows) {
  const uint64_t all = M == 64 ? ~(uint64_t)0 : ((uint64_t)1 << M) - 1;
  uint64_t wanted[kMostUnits];
  for (int64_t i = 0; i < last - first; ++i) wanted[i] = keep.index == nullptr ? all : 0;
  for (int64_t m = 0; keep.index != nullptr && m < M; ++m) {
    const int64_t b = (m0 + m) / T, D = keep.rows_a_unit;
    const int32_t* index = keep.index + b * keep.units;
    int64_t low = 0, high = keep.count[b];
    while (low < high) {  // the first kept unit that has a row at or after `first`
      const int64_t middle = (low + high) / 2;
      if ((index[middle] + 1) * D <= first)
        low = middle + 1;
      else
        high = middle;
    }
    for (; low < keep.count[b] && index[low] * D < last; ++low) {
      const int64_t start = index[low] * D, end = smaller(start + D, last);
      for (int64_t row = start < first ? first : start; row < end; ++row)
        wanted[row - first] |= (uint64_t)1 << m;
    }
  }
  rows.n = 0;
  for (int64_t i = 0; i < last - first; ++i) {
    rows.id[rows.n] = (int32_t)(first + i);
    rows.wanted[rows.n] = wanted[i];
    rows.n += wanted[i] != 0;
  }
}

// Addresses of R rows from the i-th on, and of those four rows later, to ask for; past the end the
// last row stands in.
template <class W, int R>
struct Window {
  const W *row[R], *next[R];
  void at(const W* weight, int64_t C, const int32_t* id, int64_t n, int64_t i) {
    for (int r = 0; r < R; ++r) {
      row[r] = weight + id[smaller(i + r, n - 1)] * C;
      next[r] = weight + id[smaller(i + r + kRows, n - 1)] * C;
    }
  }
};

// Whether n rows lie side by side. They are then best read one by one, as the hardware sees a single
// stream and follows it; of scattered rows it follows none, so that several at once hide the wait
// (measured on two cores with AVX-512: 49 against 41 GB/s side by side, 37 against 40 scattered).
INLINE bool is_run(const int32_t* id, int64_t n) { return n > 0 && id[n - 1] - id[0] == n - 1; }

template <class W, int R>
INLINE void dots_of_one(const W* weight, int64_t C, const Rows& rows, const float* x, float* out) {
  Window<W, R> w;
  for (int i = 0; i < rows.n; i += R) {
    float part[R];
    w.at(weight, C, rows.id, rows.n, i);
    // Four short rows are too little to ask ahead for (of a predictor's 128 bytes: 12% slower).
    if (R == 1 && C * sizeof(W) < 1024) w.next[0] = w.row[0] + 4096 / sizeof(W);
    dot<W, R, 1>(w.row, w.next, &x, C, part, 1);
    for (int r = 0; r < smaller(R, rows.n - i); ++r) out[i + r] = part[r];
  }
}

// out[i * M + m] = weight[id_i] . x[m] where wanted, else 0.
template <class W>
void dots(const W* weight, int64_t C, const Rows& rows, const float* x, int64_t M, float* out) {
  if (M == 1 && is_run(rows.id, rows.n)) return dots_of_one<W, 1>(weight, C, rows, x, out);
  if (M == 1) return dots_of_one<W, kRows>(weight, C, rows, x, out);
  Window<W, 1> w;
  for (int i = 0; i < rows.n; ++i) {
    w.at(weight, C, rows.id, rows.n, i);
    int64_t who[kMostRows];
    int64_t n = 0;
    for (int64_t m = 0; m < M; ++m) {
      out[i * M + m] = 0;
      who[n] = m;
      n += rows.wanted[i] >> m & 1;
    }
    for (int64_t j = 0; j < n; j += kBatch) {
      const float* xs[kBatch];
      float part[kBatch];
      for (int k = 0; k < kBatch; ++k) xs[k] = x + who[smaller(j + k, n - 1)] * C;
      dot<W, 1, kBatch>(w.row, w.next, xs, C, part, kBatch);
      for (int k = 0; k < smaller((int64_t)kBatch, n - j); ++k) out[i * M + who[j + k]] = part[k];
    }
  }
}

// Terms of a second projection: row id[i] of the matrix times coefficient[i * M + m].
struct Terms {
  const int32_t* id;
  const float* coefficient;
  int64_t n, M;
};

INLINE int64_t padded(int64_t C) { return blocks_of(C, 2 * LANES) * 2 * LANES; }

template <class W, int R>
INLINE void add_terms_of_one(const W* weight, int64_t C, const Terms& terms, float* acc) {
  Window<W, R> w;
  for (int64_t i = 0; i < terms.n; i += R) {
    float coefficient[R];
    w.at(weight, C, terms.id, terms.n, i);
    for (int r = 0; r < R; ++r) coefficient[r] = i + r < terms.n ? terms.coefficient[i + r] : 0.0f;
    axpy<W, R>(w.row, w.next, coefficient, C, acc);
  }
}

// acc[m * padded(C) + c] += the terms.
template <class W>
void add_terms(const W* weight, int64_t C, const Terms& terms, float* acc) {
  if (terms.M == 1 && is_run(terms.id, terms.n))
    return add_terms_of_one<W, 1>(weight, C, terms, acc);
  if (terms.M == 1) return add_terms_of_one<W, kRows>(weight, C, terms, acc);
  const float zeros[kMostRows] = {};
  Window<W, kRows> w;
  for (int64_t i = 0; i < terms.n; i += kRows) {
    const float* coefficient[kRows];
    w.at(weight, C, terms.id, terms.n, i);
    for (int r = 0; r < kRows; ++r)
      coefficient[r] = i + r < terms.n ? terms.coefficient + (i + r) * terms.M : zeros;
    axpy_batch<W, kRows>(w.row, w.next, coefficient, terms.M, C, acc, padded(C));
  }
}

// y = residual + bias + sum over a matrix's rows, y and residual [M, C]. The rows are cut into parts
// whose number depends on the matrix alone, so the sum does not depend on the threads;
// body(first, last, acc) adds the terms of one part's rows to acc [M, padded(C)], in stretches of at
// most kMostUnits rows.
template <class Body>
INLINE void sum_rows(int64_t rows, int64_t M, int64_t C, int64_t threads, const float* bias,
                     const float* residual, float* y, const Body& body) {
  const int64_t most = smaller(rows / kPartRows, kMostParts), parts = most < 1 ? 1 : most;
  const int64_t size = M * padded(C);
  float* partial = (float*)scratch(0, parts * size * sizeof(float));
  in_team(threads, parts, [&](int64_t part) {
    float* acc = partial + part * size;
    for (int64_t i = 0; i < size; ++i) acc[i] = 0;
    const int64_t end = rows * (part + 1) / parts;
    for (int64_t first = rows * part / parts; first < end; first += kMostUnits)
      body(first, smaller(first + kMostUnits, end), acc);
  });
  const int64_t stretches = smaller(threads, parts);
  in_team(threads, stretches, [&](int64_t stretch) {
    const int64_t first = C * stretch / stretches, last = C * (stretch + 1) / stretches;
    for (int64_t m = 0; m < M; ++m) {
      float* acc = partial + m * padded(C);
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t c = first; c < last; ++c) acc[c] += acc[part * size + c];
      for (int64_t c = first; c < last; ++c) {
        const float value = acc[c] + (bias != nullptr ? bias[c] : 0.0f);
        y[m * C + c] = residual != nullptr ? residual[m * C + c] + value : value;
      }
    }
  });
}

// ---------------------------------------------------------------------------- projections

template <class W>
void project_as(const Project& p, int64_t m0, int64_t M) {
  int64_t rows = 0, tasks = 0;
  for (int i = 0; i < p.matrices; ++i) rows += p.matrix[i].rows;
  if (rows == 0) return;
  // Several tasks a thread, each one long stream; more threads than rows make tasks of 8.
  const int64_t size = blocks_of(rows, 64 * p.threads) * 8;
  for (int i = 0; i < p.matrices; ++i) tasks += blocks_of(p.matrix[i].rows, size);

  const auto stretch = [&](const Matrix& a, int64_t first, int64_t last) {
    Rows kept;
    kept_rows(a.keep, first, last, m0, M, p.T, kept);
    float value[kMostUnits * kMostRows];
    dots((const W*)a.weight, p.C, kept, p.x + m0 * p.C, M, value);
    for (int64_t m = 0; m < M; ++m) {
      float* out = a.out + (m0 + m) * a.rows;
      for (int64_t row = first; row < last; ++row) out[row] = 0;
      for (int i = 0; i < kept.n; ++i)
        if (kept.wanted[i] >> m & 1)
          out[kept.id[i]] = value[i * M + m] + (a.bias ? a.bias[kept.id[i]] : 0.0f);
    }
  };
  in_team(p.threads, tasks, [&](int64_t task) {
    const Matrix* a = p.matrix;
    for (; task >= blocks_of(a->rows, size); ++a) task -= blocks_of(a->rows, size);
    const int64_t end = smaller((task + 1) * size, a->rows);
    for (int64_t first = task * size; first < end; first += kMostUnits)
      stretch(*a, first, smaller(first + kMostUnits, end));
  });
}

void project(const Project& p) {
  for (int64_t m0 = 0; m0 < p.M; m0 += kMostRows)
    with_dtype(p.dtype, [&](auto type) {
      project_as<decltype(type)>(p, m0, smaller(kMostRows, p.M - m0));
    });
}

template <class W>
void out_proj_as(const OutProj& p, int64_t m0, int64_t M) {
  const float* residual = p.residual ? p.residual + m0 * p.C : nullptr;
  const auto add = [&](int64_t first, int64_t last, float* acc) {
    Rows kept;
    float coefficient[kMostUnits * kMostRows];
    kept_rows(p.keep, first, last, m0, M, p.T, kept);
    for (int i = 0; i < kept.n; ++i)
      for (int64_t m = 0; m < M; ++m)
        coefficient[i * M + m] =
            kept.wanted[i] >> m & 1 ? p.ctx[(m0 + m) * p.rows + kept.id[i]] : 0.0f;
    add_terms((const W*)p.weight_t, p.C, Terms{kept.id, coefficient, kept.n, M}, acc);
  };
  sum_rows(p.rows, M, p.C, p.threads, p.bias, residual, p.y + m0 * p.C, add);
}

void out_proj(const OutProj& p) {
  for (int64_t m0 = 0; m0 < p.M; m0 += kMostRows)
    with_dtype(p.dtype, [&](auto type) {
      out_proj_as<decltype(type)>(p, m0, smaller(kMostRows, p.M - m0));
    });
}

// ---------------------------------------------------------------------------- MLP

INLINE void activate(float* values, int64_t n, int activation) {
  if (activation == kRelu) {
    for (int64_t i = 0; i < n; ++i) values[i] = values[i] < 0 ? 0.0f : values[i];
  } else if (activation == kSilu) {
    for (int64_t i = 0; i < n; i += LANES) {
      const vfloat v = load(values + i, n - i);
      store(values + i, v / (1.0f + exp(-v)), n - i);
    }
  } else {
    for (int64_t i = 0; i < n; ++i)
      values[i] = 0.5f * values[i] * (1.0f + erff(values[i] * 0.70710678f));
  }
}

// Drops the rows for which no batch row has a nonzero value.
INLINE void drop_zeros(Rows& rows, float* value, int64_t M) {
  int n = 0;
  for (int i = 0; i < rows.n; ++i) {
    uint64_t nonzero = 0;
    for (int64_t m = 0; m < M; ++m) nonzero |= (uint64_t)(value[i * M + m] != 0) << m;
    rows.id[n] = rows.id[i];
    rows.wanted[n] = rows.wanted[i] & nonzero;
    for (int64_t m = 0; m < M; ++m) value[n * M + m] = value[i * M + m];
    n += rows.wanted[n] != 0;
  }
  rows.n = n;
}

template <class W>
void mlp_as(const Mlp& p, int64_t m0, int64_t M) {
  const float *x = p.x + m0 * p.C, *residual = p.residual ? p.residual + m0 * p.C : nullptr;
  // Both projections of a stretch of neurons in one go: h never leaves the first cache.
  const auto add = [&](int64_t first, int64_t last, float* acc) {
    Rows rows;
    float h[kMostUnits * kMostRows];
    kept_rows(p.keep, first, last, m0, M, p.T, rows);
    dots((const W*)p.w1, p.C, rows, x, M, h);
    for (int i = 0; p.b1 != nullptr && i < rows.n; ++i)
      for (int64_t m = 0; m < M; ++m)
        if (rows.wanted[i] >> m & 1) h[i * M + m] += p.b1[rows.id[i]];
    activate(h, rows.n * M, p.activation);
    if (p.up != nullptr) {
      if (p.skip_zeros) drop_zeros(rows, h, M);
      float up[kMostUnits * kMostRows];
      dots((const W*)p.up, p.C, rows, x, M, up);
      for (int64_t i = 0; i < rows.n * M; ++i) h[i] *= up[i];
    }
    if (p.skip_zeros) drop_zeros(rows, h, M);
    for (int64_t m = 0; m < M; ++m) {
      int32_t read = 0;
      for (int i = 0; i < rows.n; ++i) read += rows.wanted[i] >> m & 1;
      __atomic_fetch_add(p.read + (m0 + m) / p.T, read, __ATOMIC_RELAXED);
    }
    add_terms((const W*)p.w2t, p.C, Terms{rows.id, h, rows.n, M}, acc);
  };
  sum_rows(p.F, M, p.C, p.threads, p.b2, residual, p.y + m0 * p.C, add);
}

void mlp(const Mlp& p) {
  for (int64_t b = 0; b < p.M / p.T; ++b) p.read[b] = 0;
  for (int64_t m0 = 0; m0 < p.M; m0 += kMostRows)
    with_dtype(p.dtype, [&](auto type) {
      mlp_as<decltype(type)>(p, m0, smaller(kMostRows, p.M - m0));
    });
}

// ---------------------------------------------------------------------------- attention

INLINE void rotate(const float* in, const float* cos, const float* sin, int64_t D, float* out) {
  const int64_t half = D / 2;
  for (int64_t d = 0; d < D; ++d) {
    const float other = d < half ? -in[d + half] : in[d - half];
    out[d] = cos == nullptr ? in[d] : in[d] * cos[d] + other * sin[d];
  }
}

// Softmax in place over n scores.
INLINE void softmax(float* score, int64_t n) {
  float most = score[0];
  for (int64_t i = 1; i < n; ++i) most = score[i] > most ? score[i] : most;
  vfloat total = {};
  for (int64_t i = 0; i < n; i += LANES) {
    vfloat e = exp(load(score + i, n - i) - most);
    store(score + i, e, n - i);
    total += load(score + i, n - i);
  }
  const float scale = 1.0f / sum(total);
  for (int64_t i = 0; i < n; ++i) score[i] *= scale;
}

void attention(const Attention& p) {
  const int64_t slot = *p.position, repeat = p.H / p.G, D = p.D;
  float* q = (float*)scratch(0, p.B * p.H * D * sizeof(float));
  uint8_t* kept = (uint8_t*)scratch(1, p.B * p.H);
  for (int64_t b = 0; b < p.B; ++b) {
    const float *cos = p.cos ? p.cos + b * D : nullptr, *sin = p.sin ? p.sin + b * D : nullptr;
    for (int64_t h = 0; h < p.H; ++h) kept[b * p.H + h] = p.keep.index == nullptr;
    for (int64_t i = 0; p.keep.index != nullptr && i < p.keep.count[b]; ++i)
      kept[b * p.H + p.keep.index[b * p.H + i]] = 1;
    for (int64_t h = 0; h < p.H; ++h)
      if (kept[b * p.H + h])
        rotate(p.q + (b * p.H + h) * D, cos, sin, D, q + (b * p.H + h) * D);
    for (int64_t g = 0; g < p.G; ++g) {
      const int64_t at = ((b * p.G + g) * p.S + slot) * D;
      rotate(p.k + (b * p.G + g) * D, cos, sin, D, p.k_cache + at);
      __builtin_memcpy(p.v_cache + at, p.v + (b * p.G + g) * D, D * sizeof(float));
    }
  }
  // The query heads of a key/value head share its stretch of the cache, unless threads lack work.
  const int64_t heads = p.B * p.G >= 4 * p.threads || p.threads == 1 ? repeat : 1;
  const int64_t tasks = p.B * p.H / heads;
  const bool is_short = p.B * p.H * slot * D < 1 << 15;
  in_team(is_short ? 1 : p.threads, tasks, [&](int64_t task) {
    float* scores = (float*)scratch(3, (heads * (slot + 1) + D + 2 * LANES) * sizeof(float));
    float* acc = scores + heads * (slot + 1);
    const int64_t b = task * heads / p.H, h0 = task * heads % p.H, g = h0 / repeat;
    const int64_t start = p.start[b] < 0 ? 0 : p.start[b], n = slot + 1 - start;
    const float* keys = p.k_cache + ((b * p.G + g) * p.S + start) * D;
    const float* values = p.v_cache + ((b * p.G + g) * p.S + start) * D;
    constexpr int64_t CHUNK = 64;  // slots that stay in L1 while the heads of a group pass
    for (int64_t s0 = 0; s0 < n; s0 += CHUNK)
      for (int64_t j = 0; j < heads; ++j) {
        const float* query = q + (b * p.H + h0 + j) * D;
        if (!kept[b * p.H + h0 + j]) continue;
        for (int64_t s = s0; s < smaller(s0 + CHUNK, n); s += kRows) {
          const float *row[kRows], *ahead[kRows];
          float part[kRows];
          for (int r = 0; r < kRows; ++r) {
            row[r] = keys + smaller(s + r, n - 1) * D;
            ahead[r] = keys + smaller(s + r + 4 * kRows, n - 1) * D;
          }
          dot<float, kRows, 1>(row, ahead, &query, D, part, 1);
          for (int r = 0; r < kRows && s + r < n; ++r) scores[j * n + s + r] = part[r] * p.scale;
        }
      }
    for (int64_t j = 0; j < heads; ++j) {
      float* out = p.ctx + (b * p.H + h0 + j) * D;
      for (int64_t d = 0; d < D; ++d) out[d] = 0;
      if (n <= 0 || !kept[b * p.H + h0 + j]) continue;
      softmax(scores + j * n, n);
      for (int64_t d = 0; d < D + LANES; ++d) acc[d] = 0;
      for (int64_t s = 0; s < n; s += kRows) {
        const float *row[kRows], *ahead[kRows];
        float weight[kRows];
        for (int r = 0; r < kRows; ++r) {
          row[r] = values + smaller(s + r, n - 1) * D;
          ahead[r] = values + smaller(s + r + 4 * kRows, n - 1) * D;
          weight[r] = s + r < n ? scores[j * n + s + r] : 0.0f;
        }
        axpy<float, kRows>(row, ahead, weight, D, acc);
      }
      __builtin_memcpy(out, acc, D * sizeof(float));
    }
  });
}

// ---------------------------------------------------------------------------- RMS norm

void norm(const Norm& p) {
  for (int64_t m = 0; m < p.M; ++m) {
    const float* x = p.x + m * p.C;
    vfloat squares[2] = {};
    for (int64_t i = 0; i < p.C; i += LANES) {
      const vfloat v = load(x + i, p.C - i);
      squares[i / LANES & 1] += v * v;
    }
    const float scale = 1.0f / sqrtf(sum(squares[0] + squares[1]) / (float)p.C + p.eps);
    for (int64_t i = 0; i < p.C; ++i) p.y[m * p.C + i] = x[i] * scale * p.weight[i];
  }
}

// ---------------------------------------------------------------------------- selection

#include "select.h"

// ---------------------------------------------------------------------------- predictor

void choose(const Choose& p) {
  const Choice &one = p.kind[0], &two = p.kind[1];
  const int64_t units[2] = {one.L * one.N, two.L * two.N}, B = p.B, R = p.R;
  const int64_t products = B * R * (units[0] + units[1] + (p.first != nullptr ? p.C : 0));
  const int threads = products < kLeastProducts ? 1 : p.threads;
  float* code = (float*)scratch(4, B * (R + units[0] + units[1]) * sizeof(float));
  float* scores[2] = {code + B * R, code + B * (R + units[0])};
  if (p.first != nullptr)
    project({p.x, {{p.first, p.bias, code, R, {}}}, 1, B, 1, p.C, threads, p.dtype});
  project({p.first ? code : p.x,
           {{one.weight, one.bias, scores[0], units[0], {}},
            {two.weight, two.bias, scores[1], units[1], {}}},
           two.N > 0 ? 2 : 1, B, 1, R, threads, p.dtype});
  for (int k = 0; k < (two.N > 0 ? 2 : 1); ++k) {
    const Choice& kind = p.kind[k];
    select_above({scores[k], kind.threshold, kind.index, kind.count, B, kind.L, kind.N, threads});
  }
}

constexpr Table table(const char* name) {
  return {name, project, out_proj, mlp, attention, norm, select, select_above, choose};
}
