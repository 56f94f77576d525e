// The attention kernel over one run of KV rows, written once over the vector type of its namespace.
//
// Included once per instruction set, inside a namespace that has defined HA_FN, kLanes, F and its
// primitives, and HA_DOT with Pairs for products of bf16 pairs where there are. No include guard.
//
// Tile by tile: scores of up to four query rows, online softmax, weighted sum of V. A tile's K
// and V stay in the first-level cache while all query rows pass over them; what comes next is
// prefetched along the way, so that memory never waits for the arithmetic.

constexpr int kTile = HA_TILE;
constexpr int kPrefetchBytes = HA_PREFETCH_BYTES;

HA_FN F exp_nonpositive(F x) {
  // Cephes' expf: x = n ln 2 + r with |r| <= ln 2 / 2, then a polynomial of degree 6.
  const F magic = set1(12582912.0f);
  const F clamped = max(x, set1(-87.3f));
  const F n = sub(fma(clamped, set1(1.44269504f), magic), magic);
  F r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(mul(p, r), r, r), set1(1.0f));
  return zero_where_less(x, set1(-87.3f), scale_by_power_of_two(p, n));
}

// Two vectors of K or V in fp32. Whole pairs of bf16 are split into their even and odd elements,
// which takes half the instructions; q and out lie in that order too (`place`).
struct Two {
  F a, b;
};
constexpr int kPair = 2 * kLanes;

template <class T>
HA_FN Two load_pair(const T* p) {
  Two out;
  if constexpr (std::is_same<T, bf16>::value) {
    split(p, &out.a, &out.b);
  } else {
    out = {load(p), load(p + kLanes)};
  }
  return out;
}

template <class T>
HA_FN Two load_part(const T* p, int count) {
  if (count <= kLanes) return {load_first(p, count), zero()};
  return {load_first(p, kLanes), load_first(p + kLanes, count - kLanes)};
}

// How the products of queries and keys are made: in fp32,
template <class T>
struct Widened {
  using Key = T;
  using Query = float;
  using Operand = Two;
  static constexpr bool kQuick = false;  // beside the weighted sum
  HA_FN Two query(const float* p) { return {load(p), load(p + kLanes)}; }
  HA_FN Two whole(const T* p) { return load_pair(p); }
  HA_FN Two part(const T* p, int count) { return load_part(p, count); }
  HA_FN F accumulate(F acc, Two q, Two k) { return fma(q.b, k.b, fma(q.a, k.a, acc)); }
  static const float* queries(const Run& run) { return run.q; }
};

#ifdef HA_DOT
// or of pairs of bf16 at a time.
struct Paired {
  using Key = bf16;
  using Query = bf16;
  using Operand = Pairs;
  static constexpr bool kQuick = true;
  HA_FN Pairs query(const bf16* p) { return load_pairs(p); }
  HA_FN Pairs whole(const bf16* p) { return load_pairs(p); }
  HA_FN Pairs part(const bf16* p, int count) { return load_pairs_first(p, count); }
  HA_FN F accumulate(F acc, Pairs q, Pairs k) { return dot_pairs(acc, q, k); }
  static const bf16* queries(const Run& run) { return static_cast<const bf16*>(run.q_pairs); }
};
template <class T>
using Products = std::conditional_t<std::is_same<T, bf16>::value, Paired, Widened<T>>;
#else
template <class T>
using Products = Widened<T>;
#endif

// Prefetches what lies ahead of elements [d, d + kPair) of a row, each line once.
template <bool Ahead, class T>
HA_FN void prefetch_pair(const T* row, int64_t d) {
  constexpr int kBytes = kPair * sizeof(T), kStride = HA_PREFETCH_STRIDE;
  if (!Ahead || (kBytes < kStride && d * sizeof(T) % kStride != 0)) return;
  HA_UNROLL
  for (int byte = 0; byte < kBytes; byte += kStride) {
    prefetch(reinterpret_cast<const char*>(row + d) + byte + kPrefetchBytes);
  }
}

// Scores of RB query rows with keys [0, rows) into s[r * kTile + j]. Key rows lie `dim` apart, and
// [0, prefetched) of those ahead are prefetched.
template <class P, int RB, bool Ahead>
HA_FN void score(
    const typename P::Query* q, int64_t q_stride, const typename P::Key* k, int64_t dim,
    int64_t prefetched, int rows, float* s) {
  constexpr int JB = kLanes / RB;
  constexpr int GB = JB < 4 ? JB : 4;  // read side by side: the hardware follows a few rows, not 16
  for (int j = 0; j < rows; j += JB) {
    // At a ragged end the last key is done again and again; its copies are not looked at.
    const typename P::Key* keys[JB];
    HA_UNROLL
    for (int jj = 0; jj < JB; ++jj) keys[jj] = k + (j + jj < rows ? j + jj : rows - 1) * dim;
    F acc[kLanes];
    HA_UNROLL
    for (int i = 0; i < kLanes; ++i) acc[i] = zero();
    HA_UNROLL
    for (int g = 0; g < JB; g += GB) {
      int64_t d = 0;
      for (; d + kPair <= dim; d += kPair) {
        typename P::Operand queries[RB];
        HA_UNROLL
        for (int r = 0; r < RB; ++r) queries[r] = P::query(q + r * q_stride + d);
        HA_UNROLL
        for (int jj = g; jj < g + GB; ++jj) {
          if (d < prefetched) prefetch_pair<Ahead>(keys[jj], d);
          const typename P::Operand key = P::whole(keys[jj] + d);
          HA_UNROLL
          for (int r = 0; r < RB; ++r) {
            acc[r * JB + jj] = P::accumulate(acc[r * JB + jj], queries[r], key);
          }
        }
      }
      if (d < dim) {
        HA_UNROLL
        for (int jj = g; jj < g + GB; ++jj) {
          const typename P::Operand key = P::part(keys[jj] + d, static_cast<int>(dim - d));
          HA_UNROLL
          for (int r = 0; r < RB; ++r) {
            const typename P::Operand query = P::query(q + r * q_stride + d);
            acc[r * JB + jj] = P::accumulate(acc[r * JB + jj], query, key);
          }
        }
      }
    }
    alignas(64) float sums[kLanes];
    store(sums, sum_each(acc));
    HA_UNROLL
    for (int r = 0; r < RB; ++r) std::memcpy(s + r * kTile + j, sums + r * JB, JB * sizeof(float));
  }
}

// o[r, d .. d + CB * kPair) += sum over j of p[r, j] * v[j], fewer columns where Part. Unless it is
// null, `k` has a pair of each key row ahead prefetched.
template <class T, int RB, int CB, bool Ahead, bool Part>
HA_FN void weigh(
    const float* p, const T* v, int64_t dim, int64_t d, int rows, float* o, int64_t o_stride,
    const T* k, int64_t k_dim) {
  F acc[RB * CB * 2];
  HA_UNROLL
  for (int r = 0; r < RB; ++r) {
    HA_UNROLL
    for (int c = 0; c < CB * 2; ++c) acc[r * CB * 2 + c] = load(o + r * o_stride + d + c * kLanes);
  }
  const T* row = v;
  for (int j = 0; j < rows; ++j, row += dim) {
    if (Ahead && k != nullptr) prefetch_pair<Ahead>(k + j * k_dim, 0);
    F weights[RB];
    HA_UNROLL
    for (int r = 0; r < RB; ++r) weights[r] = set1(p[r * kTile + j]);
    HA_UNROLL
    for (int c = 0; c < CB; ++c) {
      prefetch_pair<Ahead>(row, d + c * kPair);
      const T* at = row + d + c * kPair;
      const Two values = Part ? load_part(at, static_cast<int>(dim - d)) : load_pair(at);
      HA_UNROLL
      for (int r = 0; r < RB; ++r) {
        F* sums = acc + (r * CB + c) * 2;
        sums[0] = fma(weights[r], values.a, sums[0]);
        sums[1] = fma(weights[r], values.b, sums[1]);
      }
    }
  }
  HA_UNROLL
  for (int r = 0; r < RB; ++r) {
    HA_UNROLL
    for (int c = 0; c < CB * 2; ++c) store(o + r * o_stride + d + c * kLanes, acc[r * CB * 2 + c]);
  }
}

template <class T, int RB, bool Ahead>
HA_FN void weigh_all(
    const float* p, const T* v, int64_t dim, int rows, float* o, int64_t stride, const T* k,
    int64_t k_dim) {
  constexpr int CB = RB == 1 ? kPairsOfOne : kPairs;
  int64_t d = 0;
  for (; d + CB * kPair <= dim; d += CB * kPair) {
    weigh<T, RB, CB, Ahead, false>(p, v, dim, d, rows, o, stride, d == 0 ? k : nullptr, k_dim);
  }
  if (CB > 1) {
    for (; d + kPair <= dim; d += kPair) {
      weigh<T, RB, 1, Ahead, false>(p, v, dim, d, rows, o, stride, nullptr, k_dim);
    }
  }
  if (d < dim) weigh<T, RB, 1, false, true>(p, v, dim, d, rows, o, stride, nullptr, k_dim);
}

// Scores to weights of one query row, in place; returns what the sums so far shrink by.
HA_FN float soften(const Run& run, float* s, int rows, int first, float* top, float* total) {
  const int padded = (rows + kLanes - 1) / kLanes * kLanes;
  for (int j = rows; j < padded; ++j) s[j] = 0.0f;
  F tile_top = set1(-INFINITY);
  for (int j = 0; j < padded; j += kLanes) {
    F x = mul(load(s + j), set1(run.scale));
    if (run.softcap > 0.0f) {
      // tanh(y) = sign(y) (1 - e) / (1 + e), e = exp(-2 |y|)
      const F y = mul(x, set1(1.0f / run.softcap));
      const F size = max(y, sub(zero(), y));
      const F e = exp_nonpositive(mul(size, set1(-2.0f)));
      const F tanh = div(sub(set1(1.0f), e), add(set1(1.0f), e));
      x = mul(mul(tanh, set1(run.softcap)), div(y, max(size, set1(1e-30f))));
    }
    store(s + j, x);
  }
  // After the soft cap, which would make NaN of infinity.
  for (int j = rows; j < padded; ++j) s[j] = -INFINITY;
  for (int j = 0; j < first; ++j) s[j] = -INFINITY;
  for (int j = 0; j < padded; j += kLanes) tile_top = max(tile_top, load(s + j));
  const float fresh = std::fmax(*top, greatest(tile_top));
  if (fresh == -INFINITY) {
    std::memset(s, 0, rows * sizeof(float));
    return 1.0f;
  }
  const float shrink = *top == fresh ? 1.0f : std::exp(*top - fresh);
  F sums = zero();
  for (int j = 0; j < padded; j += kLanes) {
    const F p = exp_nonpositive(sub(load(s + j), set1(fresh)));
    store(s + j, p);
    sums = add(sums, p);
  }
  *top = fresh;
  *total = *total * shrink + sum(sums);
  return shrink;
}

// How many of the keys [at, at + rows) of a run a query row does not see: the first ones.
HA_FN int hidden_keys(const Run& run, int row, int64_t at, int rows) {
  if (run.starts == nullptr) return 0;
  const int64_t first = run.starts[row % run.queries] - (run.position + at);
  return first <= 0 ? 0 : first < rows ? static_cast<int>(first) : rows;
}

HA_FN void scale_row(float* o, int64_t stride, float by) {
  for (int64_t c = 0; c < stride; c += kLanes) store(o + c, mul(load(o + c), set1(by)));
}

template <class T, int RB, bool Ahead>
HA_FN void attend_block(const Run& run, int row, int64_t at, int rows, float* s) {
  const T* k = static_cast<const T*>(run.k) + at * run.head_dim;
  const T* v = static_cast<const T*>(run.v) + at * run.v_head_dim;
  using P = Products<T>;
  // Memory should have as much to do all along: where scores are quick, a quarter of the next keys
  // is prefetched during the weighted sum.
  const bool later = Ahead && P::kQuick && RB == 4 && run.head_dim == 4 * kPair;
  const int64_t prefetched = run.head_dim - (later ? kPair : 0);
  score<P, RB, Ahead>(
      P::queries(run) + row * run.q_stride, run.q_stride, k, run.head_dim, prefetched, rows, s);
  HA_UNROLL
  for (int r = 0; r < RB; ++r) {
    const int hidden = hidden_keys(run, row + r, at, rows);
    float* o = run.out + (row + r) * run.out_stride;
    const float shrink =
        soften(run, s + r * kTile, rows, hidden, run.tops + row + r, run.totals + row + r);
    if (shrink != 1.0f) scale_row(o, run.out_stride, shrink);
  }
  weigh_all<T, RB, Ahead>(
      s, v, run.v_head_dim, rows, run.out + row * run.out_stride, run.out_stride,
      later ? k + prefetched : nullptr, run.head_dim);
}

// The first query rows of a tile also prefetch the next ones; to the others they are in the cache.
template <class T>
HA_FN void attend_tile(const Run& run, int64_t at, int rows, float* s) {
  const int stop = run.query_rows;
  int row = 0;
  if (stop >= 4) {
    attend_block<T, 4, true>(run, 0, at, rows, s);
    row = 4;
  } else if (stop >= 2) {
    attend_block<T, 2, true>(run, 0, at, rows, s);
    row = 2;
  } else {
    attend_block<T, 1, true>(run, 0, at, rows, s);
    row = 1;
  }
  for (; row + 4 <= stop; row += 4) attend_block<T, 4, false>(run, row, at, rows, s);
  for (; row + 2 <= stop; row += 2) attend_block<T, 2, false>(run, row, at, rows, s);
  if (row < stop) attend_block<T, 1, false>(run, row, at, rows, s);
}

// No row attended yet.
HA_FN void clear(const Run& run) {
  for (int r = 0; r < run.query_rows; ++r) {
    run.tops[r] = -INFINITY;
    run.totals[r] = 0.0f;
  }
  std::memset(run.out, 0, sizeof(float) * run.query_rows * run.out_stride);
}

// Attend one run of rows; out, tops and totals are the partial result of this run.
template <class T>
HA_FN void attend_run_as(const Run& run) {
  clear(run);
  alignas(64) float s[4 * kTile];
  for (int64_t at = 0; at < run.rows; at += kTile) {
    const int rows = static_cast<int>(run.rows - at < kTile ? run.rows - at : kTile);
    attend_tile<T>(run, at, rows, s);
  }
}

HA_FN void attend_run(const Run& run) {
  if (run.dtype == kFloat32) attend_run_as<float>(run);
  if (run.dtype == kBFloat16) attend_run_as<bf16>(run);
  if (run.dtype == kFloat16) attend_run_as<fp16>(run);
}

// Read every byte of a run and nothing else: what memory gives a kernel that does no work.
HA_FN float read_run(const Run& run) {
  F sums[8];
  HA_UNROLL
  for (int i = 0; i < 8; ++i) sums[i] = zero();
  for (int part = 0; part < 2; ++part) {
    const void* start = part == 0 ? run.k : run.v;
    const int64_t dim = part == 0 ? run.head_dim : run.v_head_dim;
    const float* at = static_cast<const float*>(start);
    const int64_t count = run.rows * dim * run.item / static_cast<int64_t>(sizeof(float));
    for (int64_t i = 0; i + 8 * kLanes <= count; i += 8 * kLanes) {
      for (int64_t line = 0; line < 8 * kLanes; line += 16) {
        prefetch(reinterpret_cast<const char*>(at + i + line) + kPrefetchBytes);
      }
      HA_UNROLL
      for (int lane = 0; lane < 8; ++lane) {
        sums[lane] = either(sums[lane], load(at + i + lane * kLanes));
      }
    }
  }
  F all = sums[0];
  for (int i = 1; i < 8; ++i) all = either(all, sums[i]);
  return sum(all);
}
