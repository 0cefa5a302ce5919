#include "ops.h"

#ifdef SHADOWC_X86
#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "pool.h"
#pragma GCC target("avx2,fma,f16c")
#define SHADOWC_AVX2

namespace shadowc {
namespace avx2 {
constexpr int LANES = 8;
#include "simd.h"
#include "kernels.h"
}  // namespace avx2
const Table kAvx2 = avx2::table("avx2");
}  // namespace shadowc
#endif
