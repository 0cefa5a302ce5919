#include "ops.h"

#ifdef SHADOWC_X86
#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "pool.h"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx2,fma,f16c")
#define SHADOWC_AVX512

namespace shadowc {
namespace avx512 {
constexpr int LANES = 16;
#include "simd.h"
#include "kernels.h"
}  // namespace avx512
const Table kAvx512 = avx512::table("avx512");
}  // namespace shadowc
#endif
