// Exact top-k of every layer and of the whole model, without sorting. Included after simd.h.

// Keys order as the scores do, NaN counting as +infinity; 0 is below the key of every score.
INLINE uint32_t key_of(float score) {
  uint32_t bits;  // integers only, so that loops over scores become vector code
  __builtin_memcpy(&bits, &score, sizeof bits);
  bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7f800000u : bits;
  bits = bits == 0x80000000u ? 0 : bits;  // -0 is 0
  return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

// The k best of a list: the keys above `key`, and the first `ties` of those that equal it.
struct Threshold {
  uint32_t key;
  int64_t ties;
};

// Narrows the range of keys that holds the k-th best by a histogram of it, until one key is left.
// Reads `keys`, keeps its candidates in `room` (both n long); 1 <= k <= n.
Threshold threshold(const uint32_t* keys, int64_t n, int64_t k, uint32_t* room) {
  constexpr int BITS = 11;
  for (;;) {
    uint32_t low = ~0u, high = 0;
    for (int64_t i = 0; i < n; ++i) {
      low = keys[i] < low ? keys[i] : low;
      high = keys[i] > high ? keys[i] : high;
    }
    if (low == high) return {low, k};
    const int width = 32 - __builtin_clz(high - low), shift = width > BITS ? width - BITS : 0;
    uint32_t histogram[2][1 << BITS] = {};  // two, as neighbours often meet in one bin
    for (int64_t i = 0; i < n; ++i) ++histogram[i & 1][(keys[i] - low) >> shift];
    uint32_t bin = (high - low) >> shift;
    for (;; --bin) {
      const int64_t here = histogram[0][bin] + histogram[1][bin];
      if (here >= k) break;
      k -= here;
    }
    if (shift == 0) return {low + bin, k};
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = keys[i];  // few are in the bin, so a branch is cheap
      if (((key - low) >> shift) == bin) room[kept++] = key;
    }
    keys = room;
    n = kept;
  }
}

// The position after the threshold's last tie: a unit is kept if its key is above, or if it equals
// and comes before this position. So loops over units carry nothing from one to the next.
INLINE int32_t end_of_ties(const uint32_t* keys, int64_t n, Threshold t) {
  if (t.ties == 0) return 0;
  int64_t i = 0;
  for (; i < n; ++i)
    if (keys[i] == t.key && --t.ties == 0) break;
  return (int32_t)(i + 1);
}

// Lowers the thresholds `own` of L layers of N units so far that the `budget` best of `keys` are in,
// ties to the lowest layers; says whether every layer has `floor` of them.
INLINE bool share(const uint32_t* keys, int64_t L, int64_t N, int64_t budget, int64_t floor,
                  uint32_t* room, Threshold* own) {
  if (budget == 0) return floor == 0;
  Threshold model = threshold(keys, L * N, budget, room);
  bool enough = true;
  for (int64_t l = 0; l < L; ++l) {
    int32_t above = 0, equal = 0;
    for (int64_t i = l * N; i < (l + 1) * N; ++i) {
      above += keys[i] > model.key;
      equal += keys[i] == model.key;
    }
    const int64_t ties = smaller((int64_t)equal, model.ties);
    model.ties -= ties;
    enough &= above + ties >= floor;
    if (model.key < own[l].key)
      own[l] = {model.key, ties};
    else if (model.key == own[l].key)
      own[l].ties += ties;
  }
  return enough;
}

void select(const Select& p) {
  const int64_t L = p.L, N = p.N;
  uint32_t* keys = (uint32_t*)scratch(0, 3 * L * N * sizeof(uint32_t));
  uint32_t *rest = keys + L * N, *room = rest + L * N;
  Threshold* own = (Threshold*)scratch(1, L * sizeof(Threshold));
  const int threads = L * N < 1 << 13 ? 1 : p.threads;
  const auto over_layers = [&](const auto& body) { in_team(threads, L, body); };

  for (int64_t b = 0; b < p.B; ++b) {
    over_layers([&](int64_t l) {
      const float* scores = p.scores + (b * L + l) * N;
      for (int64_t i = 0; i < N; ++i) keys[l * N + i] = key_of(scores[i]);
      const int64_t k = p.local ? p.keep / L + (l < p.keep % L) : 0;
      own[l] = k == 0 ? Threshold{~0u, 0} : threshold(keys + l * N, N, k, rest + l * N);
    });
    // When the best of the model hold the best of every layer, they are the answer; else the
    // layers' own come first and the others compete for what is left.
    if (!p.local && !share(keys, L, N, p.keep, p.floor, room, own)) {
      over_layers([&](int64_t l) {
        const uint32_t* key = keys + l * N;
        own[l] = p.floor == 0 ? Threshold{~0u, 0} : threshold(key, N, p.floor, rest + l * N);
        const uint32_t above = own[l].key;
        const int32_t end = end_of_ties(key, N, own[l]);
        for (int32_t i = 0; i < N; ++i)
          rest[l * N + i] = key[i] > above || (key[i] == above && i < end) ? 0 : key[i];
      });
      share(rest, L, N, p.keep - L * p.floor, 0, room, own);
    }
    over_layers([&](int64_t l) {
      const uint32_t *key = keys + l * N, above = own[l].key;
      const int32_t end = end_of_ties(key, N, own[l]);
      int32_t* index = p.index + (l * p.B + b) * N;
      int64_t n = 0;
      for (int32_t i = 0; i < N; ++i) {
        index[n] = i;
        n += (key[i] > above) | ((key[i] == above) & (i < end));
      }
      p.count[l * p.B + b] = (int32_t)n;
      for (; n < N; ++n) index[n] = 0;
    });
  }
}

// Kept units from the front on, the others from the back: no branch, and one pass.
void select_above(const SelectAbove& p) {
  const int64_t rows = p.B * p.L, N = p.N;
  in_team(rows * N < 1 << 13 ? 1 : p.threads, rows, [&](int64_t row) {
    const int64_t b = row / p.L, l = row % p.L;
    const float* scores = p.scores + row * N;
    const uint32_t least = key_of(p.threshold[l]);
    int32_t* index = p.index + (l * p.B + b) * N;
    int64_t front = 0, back = N - 1;
    for (int64_t i = 0; i < N; ++i) {  // what is written too much, a later unit writes over
      const int kept = key_of(scores[i]) > least;
      index[front] = index[back] = (int32_t)i;
      front += kept;
      back -= 1 - kept;
    }
    p.count[l * p.B + b] = (int32_t)front;
  });
}
