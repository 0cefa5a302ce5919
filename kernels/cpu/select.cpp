// Exact top-k of every layer and of the whole model, without sorting.
#include <algorithm>
#include <cstring>
#include <vector>

#include "ops.h"
#include "pool.h"

namespace shadowc {
namespace {

// Keys order as the scores do, NaN counting as +infinity; 0 is below the key of every score.
inline uint32_t key_of(float score) {
  score = score != score ? __builtin_inff() : score + 0.0f;  // -0 becomes 0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The k best of a list are the keys above `key` and the first `ties` that equal it.
struct Threshold {
  uint32_t key;
  int64_t ties;
};

// Narrows the range of keys that holds the k-th best by a histogram of it, until one key is left.
// Reads `keys`, keeps its candidates in `room` (both n long), 1 <= k <= n.
Threshold threshold(const uint32_t* keys, int64_t n, int64_t k, uint32_t* room) {
  constexpr int kBits = 11;
  for (;;) {
    uint32_t low = ~0u, high = 0;
    for (int64_t i = 0; i < n; ++i) {
      low = std::min(low, keys[i]);
      high = std::max(high, keys[i]);
    }
    if (low == high) return {low, k};
    const int width = 32 - __builtin_clz(high - low), shift = std::max(0, width - kBits);
    uint32_t histogram[2][1 << kBits] = {};  // two, as neighbours often meet in one bin
    int64_t i = 0;
    for (; i + 1 < n; i += 2) {
      ++histogram[0][(keys[i] - low) >> shift];
      ++histogram[1][(keys[i + 1] - low) >> shift];
    }
    if (i < n) ++histogram[0][(keys[i] - low) >> shift];
    uint32_t bin = (high - low) >> shift;
    for (;; --bin) {
      const int64_t here = histogram[0][bin] + histogram[1][bin];
      if (here >= k) break;
      k -= here;
    }
    if (shift == 0) return {low + bin, k};
    int64_t kept = 0;
    for (i = 0; i < n; ++i) {
      const uint32_t key = keys[i];  // read first: room may be keys
      room[kept] = key;
      kept += ((key - low) >> shift) == bin;
    }
    keys = room;
    n = kept;
  }
}

struct Call {
  const float* scores;
  int32_t *index, *count;
  int64_t B, L, N, keep, floor;
  bool local;
  uint32_t *keys, *rest, *room;  // [L, N] each, of the batch row at hand
  Threshold* floors;             // [L]
  int64_t b, next;

  int64_t floor_of(int64_t l) const { return local ? keep / L + (l < keep % L) : floor; }
};

// Keys of a layer, and the layer's own best; `rest` has 0 in their place.
void layer_keys(const Call& c, int64_t l) {
  const float* scores = c.scores + (c.b * c.L + l) * c.N;
  uint32_t *keys = c.keys + l * c.N, *rest = c.rest + l * c.N;
  for (int64_t i = 0; i < c.N; ++i) keys[i] = key_of(scores[i]);
  const int64_t k = c.floor_of(l);
  Threshold best = k == 0 ? Threshold{~0u, 0} : threshold(keys, c.N, k, rest);
  c.floors[l] = best;
  if (c.local) return;
  for (int64_t i = 0; i < c.N; ++i) {
    const bool tie = keys[i] == best.key && best.ties > 0;
    best.ties -= tie;
    rest[i] = keys[i] > best.key || tie ? 0 : keys[i];
  }
}

// Writes the units of a layer: its own best, those above the model's threshold, `ties` at it.
void emit(const Call& c, int64_t l, Threshold model) {
  const uint32_t* keys = c.keys + l * c.N;
  int32_t* index = c.index + (l * c.B + c.b) * c.N;
  Threshold own = c.floors[l];
  int64_t n = 0;
  for (int64_t i = 0; i < c.N; ++i) {
    const uint32_t key = keys[i];
    const bool own_tie = key == own.key && own.ties > 0;
    own.ties -= own_tie;
    const bool mine = key > own.key || own_tie;
    const bool tie = !mine && key == model.key && model.ties > 0;
    model.ties -= tie;
    index[n] = static_cast<int32_t>(i);
    n += mine || key > model.key || tie;
  }
  c.count[l * c.B + c.b] = static_cast<int32_t>(n);
  std::fill(index + n, index + c.N, 0);
}

template <class Body>
void over_layers(Call& call, int threads, Body body) {
  struct Job {
    Call* call;
    Body* body;
  } job{&call, &body};
  call.next = 0;
  run(call.L * call.N < 1 << 13 ? 1 : static_cast<int>(std::min<int64_t>(threads, call.L)),
      [](void* argument, const Team&) {
        const Job& job = *static_cast<Job*>(argument);
        for (int64_t l;
             (l = __atomic_fetch_add(&job.call->next, 1, __ATOMIC_RELAXED)) < job.call->L;)
          (*job.body)(l);
      },
      &job);
}

}  // namespace

void select(const float* scores, int32_t* index, int32_t* count, int64_t B, int64_t L, int64_t N,
            int64_t keep, int64_t floor, bool local, int threads) {
  uint32_t* keys = static_cast<uint32_t*>(scratch(0, 3 * L * N * sizeof(uint32_t)));
  std::vector<Threshold> floors(L), model(L);
  Call call{scores, index, count, B, L, N, keep, floor, local, keys, keys + L * N,
            keys + 2 * L * N, floors.data(), 0, 0};
  for (call.b = 0; call.b < B; ++call.b) {
    over_layers(call, threads, [&](int64_t l) { layer_keys(call, l); });
    const int64_t budget = local ? 0 : keep - L * floor;
    Threshold best{~0u, 0};
    if (budget > 0) best = threshold(call.rest, L * N, budget, call.room);
    for (int64_t l = 0; l < L; ++l) {  // ties go to the lowest layers first
      model[l] = {best.key, 0};
      if (best.ties == 0) continue;
      const uint32_t* rest = call.rest + l * N;
      const int64_t equal = std::count(rest, rest + N, best.key);
      model[l].ties = std::min(equal, best.ties);
      best.ties -= model[l].ties;
    }
    over_layers(call, threads, [&](int64_t l) { emit(call, l, model[l]); });
  }
}

}  // namespace shadowc
