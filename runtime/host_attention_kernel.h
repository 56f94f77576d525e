// The attention kernel over one run of KV rows, written once over the vector type of its namespace.
//
// Included once per instruction set, inside a namespace that has defined HA_FN, kLanes, F and the
// primitives below, and HA_DOT for a product of bf16 pairs where there is one. No include guard.
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

// Scores of RB query rows with keys [0, rows) into s[r * kTile + j]. Key rows lie `dim` apart.
template <class T, int RB, bool Ahead>
HA_FN void score(const float* q, int64_t q_stride, const T* k, int64_t dim, int rows, float* s) {
  constexpr int JB = kLanes / RB;
  int j = 0;
  while (rows >= JB && j < rows) {
    // The last keys of a ragged tile are done with some that have been done before.
    const int at = j + JB <= rows ? j : rows - JB;
    const T* base = k + at * dim;
    F acc[kLanes];
    HA_UNROLL
    for (int i = 0; i < kLanes; ++i) acc[i] = zero();
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
      F rows_of_q[RB];
      HA_UNROLL
      for (int r = 0; r < RB; ++r) rows_of_q[r] = load(q + r * q_stride + d);
      HA_UNROLL
      for (int jj = 0; jj < JB; ++jj) {
        const T* at_k = base + jj * dim + d;
        if (Ahead && d * sizeof(T) % 64 == 0) {
          prefetch(reinterpret_cast<const char*>(at_k) + kPrefetchBytes);
        }
        const F keys = load(at_k);
        HA_UNROLL
        for (int r = 0; r < RB; ++r) {
          acc[r * JB + jj] = fma(rows_of_q[r], keys, acc[r * JB + jj]);
        }
      }
    }
    if (d < dim) {
      HA_UNROLL
      for (int jj = 0; jj < JB; ++jj) {
        const F keys = load_first(base + jj * dim + d, static_cast<int>(dim - d));
        HA_UNROLL
        for (int r = 0; r < RB; ++r) {
          acc[r * JB + jj] = fma(load(q + r * q_stride + d), keys, acc[r * JB + jj]);
        }
      }
    }
    alignas(64) float sums[kLanes];
    store(sums, sum_each(acc));
    HA_UNROLL
    for (int r = 0; r < RB; ++r) {
      std::memcpy(s + r * kTile + at, sums + r * JB, JB * sizeof(float));
    }
    j = at + JB;
  }
  for (; j < rows; ++j) {
    HA_UNROLL
    for (int r = 0; r < RB; ++r) {
      F acc = zero();
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int count = dim - d < kLanes ? static_cast<int>(dim - d) : kLanes;
        acc = fma(load(q + r * q_stride + d), load_first(k + j * dim + d, count), acc);
      }
      s[r * kTile + j] = sum(acc);
    }
  }
}

#ifdef HA_DOT
// The same for bf16 keys and queries, by products of pairs; q rows are padded to whole vectors.
template <int RB, bool Ahead>
HA_FN void score_pairs(
    const bf16* q, int64_t q_stride, const bf16* k, int64_t dim, int rows, float* s) {
  constexpr int JB = kLanes / RB;
  int j = 0;
  while (rows >= JB && j < rows) {
    const int at = j + JB <= rows ? j : rows - JB;
    const bf16* base = k + at * dim;
    F acc[kLanes];
    HA_UNROLL
    for (int i = 0; i < kLanes; ++i) acc[i] = zero();
    for (int64_t d = 0; d < dim; d += 2 * kLanes) {
      Pairs rows_of_q[RB];
      HA_UNROLL
      for (int r = 0; r < RB; ++r) rows_of_q[r] = load_pairs(q + r * q_stride + d, 2 * kLanes);
      const int count = dim - d < 2 * kLanes ? static_cast<int>(dim - d) : 2 * kLanes;
      HA_UNROLL
      for (int jj = 0; jj < JB; ++jj) {
        const bf16* at_k = base + jj * dim + d;
        if (Ahead) prefetch(reinterpret_cast<const char*>(at_k) + kPrefetchBytes);
        const Pairs keys = load_pairs(at_k, count);
        HA_UNROLL
        for (int r = 0; r < RB; ++r) {
          acc[r * JB + jj] = dot_pairs(acc[r * JB + jj], rows_of_q[r], keys);
        }
      }
    }
    alignas(64) float sums[kLanes];
    store(sums, sum_each(acc));
    HA_UNROLL
    for (int r = 0; r < RB; ++r) {
      std::memcpy(s + r * kTile + at, sums + r * JB, JB * sizeof(float));
    }
    j = at + JB;
  }
  for (; j < rows; ++j) {
    HA_UNROLL
    for (int r = 0; r < RB; ++r) {
      F acc = zero();
      for (int64_t d = 0; d < dim; d += 2 * kLanes) {
        const int count = dim - d < 2 * kLanes ? static_cast<int>(dim - d) : 2 * kLanes;
        acc = dot_pairs(
            acc, load_pairs(q + r * q_stride + d, 2 * kLanes), load_pairs(k + j * dim + d, count));
      }
      s[r * kTile + j] = sum(acc);
    }
  }
}
#endif

// o[r, c .. c + CB * kLanes) += sum over j of p[r, j] * v[j]; `last` is set for the ragged columns.
template <class T, int RB, int CB, bool Ahead>
HA_FN void weigh(
    const float* p, const T* v, int64_t dim, int64_t column, int rows, float* o, int64_t o_stride) {
  F acc[RB * CB];
  HA_UNROLL
  for (int r = 0; r < RB; ++r) {
    HA_UNROLL
    for (int c = 0; c < CB; ++c) acc[r * CB + c] = load(o + r * o_stride + column + c * kLanes);
  }
  const T* row = v + column;
  for (int j = 0; j < rows; ++j, row += dim) {
    F weights[RB];
    HA_UNROLL
    for (int r = 0; r < RB; ++r) weights[r] = set1(p[r * kTile + j]);
    HA_UNROLL
    for (int c = 0; c < CB; ++c) {
      // Once a line.
      if (Ahead && (c * kLanes * sizeof(T)) % 64 == 0) {
        prefetch(reinterpret_cast<const char*>(row + c * kLanes) + kPrefetchBytes);
      }
      const F values = load(row + c * kLanes);
      HA_UNROLL
      for (int r = 0; r < RB; ++r) acc[r * CB + c] = fma(weights[r], values, acc[r * CB + c]);
    }
  }
  HA_UNROLL
  for (int r = 0; r < RB; ++r) {
    HA_UNROLL
    for (int c = 0; c < CB; ++c) store(o + r * o_stride + column + c * kLanes, acc[r * CB + c]);
  }
}

template <class T, int RB>
HA_FN void weigh_last(
    const float* p, const T* v, int64_t dim, int64_t column, int rows, float* o, int64_t o_stride) {
  F acc[RB];
  const int count = static_cast<int>(dim - column);
  HA_UNROLL
  for (int r = 0; r < RB; ++r) acc[r] = load(o + r * o_stride + column);
  for (int j = 0; j < rows; ++j) {
    const F values = load_first(v + j * dim + column, count);
    HA_UNROLL
    for (int r = 0; r < RB; ++r) acc[r] = fma(set1(p[r * kTile + j]), values, acc[r]);
  }
  HA_UNROLL
  for (int r = 0; r < RB; ++r) store(o + r * o_stride + column, acc[r]);
}

template <class T, int RB, bool Ahead>
HA_FN void weigh_all(const float* p, const T* v, int64_t dim, int rows, float* o, int64_t stride) {
  constexpr int CB = RB == 1 ? kColumnsOfOne : kColumns;
  int64_t c = 0;
  for (; c + CB * kLanes <= dim; c += CB * kLanes) {
    weigh<T, RB, CB, Ahead>(p, v, dim, c, rows, o, stride);
  }
  for (; c + 2 * kLanes <= dim; c += 2 * kLanes) {
    weigh<T, RB, 2, Ahead>(p, v, dim, c, rows, o, stride);
  }
  for (; c + kLanes <= dim; c += kLanes) weigh<T, RB, 1, Ahead>(p, v, dim, c, rows, o, stride);
  if (c < dim) weigh_last<T, RB>(p, v, dim, c, rows, o, stride);
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

template <class T, int RB, bool Ahead>
HA_FN void attend_block(const Run& run, int row, int64_t at, int rows, float* s) {
  const T* k = static_cast<const T*>(run.k) + at * run.head_dim;
  const T* v = static_cast<const T*>(run.v) + at * run.v_head_dim;
#ifdef HA_DOT
  if (std::is_same<T, bf16>::value) {
    const bf16* q = reinterpret_cast<const bf16*>(run.q_pairs) + row * run.q_stride;
    const bf16* keys = reinterpret_cast<const bf16*>(k);
    score_pairs<RB, Ahead>(q, run.q_stride, keys, run.head_dim, rows, s);
  } else
#endif
  {
    const float* q = run.q + row * run.q_stride;
    score<T, RB, Ahead>(q, run.q_stride, k, run.head_dim, rows, s);
  }
  HA_UNROLL
  for (int r = 0; r < RB; ++r) {
    int64_t first = 0;
    if (run.starts != nullptr) first = run.starts[(row + r) % run.queries] - (run.position + at);
    const int hidden = first <= 0 ? 0 : first < rows ? static_cast<int>(first) : rows;
    float* o = run.out + (row + r) * run.out_stride;
    const float shrink =
        soften(run, s + r * kTile, rows, hidden, run.tops + row + r, run.totals + row + r);
    if (shrink != 1.0f) {
      for (int64_t c = 0; c < run.out_stride; c += kLanes) {
        store(o + c, mul(load(o + c), set1(shrink)));
      }
    }
  }
  weigh_all<T, RB, Ahead>(
      s, v, run.v_head_dim, rows, run.out + row * run.out_stride, run.out_stride);
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

// Attend one run of rows; out, tops and totals are the partial result of this run.
template <class T>
HA_FN void attend_run_as(const Run& run) {
  for (int r = 0; r < run.query_rows; ++r) {
    run.tops[r] = -INFINITY;
    run.totals[r] = 0.0f;
  }
  std::memset(run.out, 0, sizeof(float) * run.query_rows * run.out_stride);
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
