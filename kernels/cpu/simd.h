// Vectors of LANES floats, in the compiler's own vector types: the same source serves SSE, AVX2,
// AVX-512 and NEON. Included inside the namespace of each instruction set; no std templates here,
// their instances would be shared between instruction sets by the linker.

#define INLINE static inline __attribute__((always_inline))

typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef int32_t vint __attribute__((vector_size(LANES * 4)));
typedef uint32_t vuint __attribute__((vector_size(LANES * 4)));
typedef uint16_t vhalf __attribute__((vector_size(LANES * 2)));

INLINE vfloat load(const float* p) {
  vfloat v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

INLINE vfloat load(const bf16* p) {
  vhalf h;
  __builtin_memcpy(&h, p, sizeof h);
  return (vfloat)(__builtin_convertvector(h, vuint) << 16);
}

INLINE vfloat load(const fp16* p) {
#if defined(SHADOWC_AVX512)
  return (vfloat)_mm512_maskz_cvtph_ps((__mmask16)-1, _mm256_loadu_si256((const __m256i*)p));
#elif defined(SHADOWC_AVX2)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vhalf h;
  __builtin_memcpy(&h, p, sizeof h);
  const vuint bits = __builtin_convertvector(h, vuint);
  const vuint magnitude = (bits & 0x7fff) << 13;
  // Rebias by a multiplication, which also normalises subnormals; infinities and NaN by hand.
  const vuint finite = (vuint)((vfloat)magnitude * 0x1p112f);
  const vuint special = magnitude | 0x7f800000u;
  const vuint is_special = (vuint)(magnitude >= 0x0f800000u);
  return (vfloat)((special & is_special) | (finite & ~is_special) | (bits & 0x8000) << 16);
#endif
}

// The first n values, then zeros.
template <class W>
INLINE vfloat load(const W* p, int64_t n) {
  if (n >= LANES) return load(p);
  W part[LANES] = {};
  __builtin_memcpy(part, p, n * sizeof(W));
  return load(part);
}

INLINE void store(float* p, vfloat v) { __builtin_memcpy(p, &v, sizeof v); }

INLINE void store(float* p, vfloat v, int64_t n) {
  __builtin_memcpy(p, &v, (n < LANES ? n : LANES) * sizeof(float));
}

template <int N>
struct Vector {
  typedef float type __attribute__((vector_size(N * 4)));
};

// Halves the vector until two values are left, all in registers.
template <int N>
INLINE float sum_of(typename Vector<N>::type v) {
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    typename Vector<N / 2>::type half[2];
    __builtin_memcpy(half, &v, sizeof v);
    return sum_of<N / 2>(half[0] + half[1]);
  }
}

INLINE float sum(vfloat v) { return sum_of<LANES>(v); }

INLINE vfloat exp(vfloat x) {
  // exp(x) = 2^n exp(r), |r| <= ln2/2; coefficients 1/k!, relative error below 3e-7.
  x = x < -87.0f ? vfloat{} - 87.0f : x;
  x = x > 89.0f ? vfloat{} + 89.0f : x;  // n = 128 makes infinity
  const vfloat n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const vfloat r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vfloat p = vfloat{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (vfloat)((__builtin_convertvector(n, vint) + 127) << 23);
}
