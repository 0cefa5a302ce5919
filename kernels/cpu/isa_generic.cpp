#include <cmath>
#include <cstdint>

#include "ops.h"
#include "pool.h"

namespace shadowc {
namespace generic {
constexpr int LANES = 4;
#include "simd.h"
#include "kernels.h"
}  // namespace generic
const Table kGeneric = generic::table("generic");
}  // namespace shadowc
