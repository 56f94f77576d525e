// Exact attention over KV pages where they lie in host memory, for decode beside the link.
//
// A job is one layer: its query tokens against some pages, heads outermost ([Hkv, 2, B, T, D],
// runtime/spec.py). It is cut into tasks, one head and batch row and a run of rows each, which
// threads take in turn; the partial results are joined by whoever ends the last task of a head, in
// the order of the rows, so a result does not depend on the threads. No CUDA header is needed:
// `host_attention_run` has the signature of a host function of a stream.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "host_attention_levels.h"
#include "host_attention_pool.h"

namespace host_attention {

// What jobs report; read by the host while they run.
struct Report {
  std::atomic<int64_t> error;  // 0, or what the first job that failed says
  std::atomic<int64_t> jobs;
  std::atomic<int64_t> nanoseconds;  // sum over the jobs
  std::atomic<int64_t> bytes;        // of K and V read
  std::atomic<int64_t> failed;       // jobs done before the one that failed
};

enum Error : int64_t { kNone = 0, kBadJob = 1, kNoMemory = 2, kUnknown = 3 };

// One page: K of all heads and batch rows, and V after K within a head.
struct Page {
  int64_t address, tokens, rows, position;
};

// Sizes and addresses of a job, in the order of `_Numbers` in host_attention.py.
struct Numbers {
  int64_t size;  // of this struct
  int64_t dtype, level, batch, kv_heads, group, queries, head_dim, v_head_dim, num_pages;
  int64_t q, out, lse, starts, pages, reads_only;
};

struct Job {
  Pool* pool;
  Report* report;
  Numbers n;
  float scale, softcap;
  std::vector<Page> pages;
  std::vector<int64_t> starts;
};

struct Piece {
  int64_t page, row, rows;
};

constexpr int64_t kLargestPartials = 16 << 20;  // bytes
constexpr int64_t kTasks = HA_TASKS;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The memory of one run of a job, laid out in the pool's workspace.
struct Work {
  const Job* job;
  Level level;
  std::vector<Piece> pieces;  // of one head and batch row
  int64_t heads, rows, pair_rows, q_stride, out_stride;
  float* q;
  uint16_t* q_pairs;
  float *out, *tops, *totals;  // partial results, [head, piece, row, ...]
  std::unique_ptr<std::atomic<int64_t>[]> left;  // tasks of each head
  std::atomic<float> sink{0.0f};
};

bool is_sound(const Job& job) {
  const Numbers& n = job.n;
  const int64_t counts[] = {n.batch, n.kv_heads, n.group, n.queries, n.head_dim, n.v_head_dim};
  for (int64_t count : counts) {
    if (count < 1 || count > (1 << 24)) return false;
  }
  if (n.group * n.queries > (1 << 20) || n.dtype < kFloat32 || n.dtype > kFloat16) return false;
  if (n.level > best_level() || !n.q || !n.out || !n.lse || job.pages.empty()) return false;
  for (const Page& page : job.pages) {
    if (!page.address || page.rows < 1 || page.rows > page.tokens) return false;
  }
  return true;
}

// Runs of rows, of lengths that depend on the job alone.
std::vector<Piece> cut(const Job& job, int64_t heads, int64_t rows, int64_t out_stride) {
  int64_t tokens = 0;
  for (const Page& page : job.pages) tokens += page.rows;
  const int64_t partial = rows * (out_stride + 2) * static_cast<int64_t>(sizeof(float));
  const int64_t tasks = std::clamp<int64_t>(kLargestPartials / partial, heads, kTasks);
  const int64_t length = std::max<int64_t>(256, round_up(tokens * heads / tasks, 64));
  std::vector<Piece> pieces;
  for (size_t page = 0; page < job.pages.size(); ++page) {
    const int64_t all = job.pages[page].rows;
    // Runs of one page are as equal as whole tiles allow.
    const int64_t parts = (all + length - 1) / length;
    const int64_t each = round_up((all + parts - 1) / parts, 64);
    for (int64_t row = 0; row < all; row += each) {
      pieces.push_back({static_cast<int64_t>(page), row, std::min(each, all - row)});
    }
  }
  return pieces;
}

void prepare(Work& work) {
  const Job& job = *work.job;
  const Numbers& n = job.n;
  work.level = n.level < 0 ? usual_level() : static_cast<Level>(n.level);
  work.heads = n.batch * n.kv_heads;
  work.rows = n.group * n.queries;
  work.q_stride = round_up(n.head_dim, 32);
  work.out_stride = round_up(n.v_head_dim, 32);
  work.pieces = cut(job, work.heads, work.rows, work.out_stride);
  const int64_t results = work.heads * static_cast<int64_t>(work.pieces.size()) * work.rows;
  const int64_t queries = work.heads * work.rows * work.q_stride;
  const bool tiles = work.level == kAmx;
  work.pair_rows = tiles ? round_up(work.rows, kTileRows) : work.rows;
  const int64_t pairs = work.heads * work.pair_rows * work.q_stride / 2;  // floats
  const int64_t floats = queries + pairs + results * (work.out_stride + 2);
  char* memory = job.pool->workspace(static_cast<size_t>(floats) * sizeof(float) + 64);
  memory += 64 - reinterpret_cast<uintptr_t>(memory) % 64;
  work.q = reinterpret_cast<float*>(memory);
  work.q_pairs = reinterpret_cast<uint16_t*>(work.q + queries);
  work.out = work.q + queries + pairs;
  work.tops = work.out + results * work.out_stride;
  work.totals = work.tops + results;
  work.left = std::make_unique<std::atomic<int64_t>[]>(work.heads);
  for (int64_t i = 0; i < work.heads; ++i) work.left[i] = work.pieces.size();
  std::memset(work.q, 0, (queries + pairs) * sizeof(float));
  for (int64_t row = 0; row < work.heads * work.rows; ++row) {
    const int64_t head = row / work.rows, in_head = row % work.rows;
    uint16_t* pair_row = work.q_pairs + head * work.pair_rows * work.q_stride +
                         (tiles ? tile_place(in_head, 0, work.q_stride) : in_head * work.q_stride);
    for (int64_t d = 0; d < n.head_dim; ++d) {
      const int64_t from = row * n.head_dim + d, to = row * work.q_stride + d;
      if (n.dtype == kFloat32) {
        work.q[to] = reinterpret_cast<const float*>(n.q)[from];
      } else if (n.dtype == kBFloat16) {
        const bf16 value = reinterpret_cast<const bf16*>(n.q)[from];
        work.q[row * work.q_stride + place(work.level, d, n.head_dim)] = portable::widen(value);
        pair_row[tiles ? tile_place(0, d, work.q_stride) : d] = value.bits;
      } else {
        work.q[to] = portable::widen(reinterpret_cast<const fp16*>(n.q)[from]);
      }
    }
  }
}

// Joins the partial results of one head, in the order of the rows.
void join(const Work& work, int64_t head) {
  const Numbers& n = work.job->n;
  const int64_t pieces = work.pieces.size();
  for (int64_t r = 0; r < work.rows; ++r) {
    float* out = reinterpret_cast<float*>(n.out) + (head * work.rows + r) * n.v_head_dim;
    float* lse = reinterpret_cast<float*>(n.lse) + head * work.rows + r;
    float top = -INFINITY, total = 0.0f;
    for (int64_t i = 0; i < pieces; ++i) {
      top = std::max(top, work.tops[(head * pieces + i) * work.rows + r]);
    }
    if (top == -INFINITY) {
      std::fill(out, out + n.v_head_dim, 0.0f);
      *lse = -INFINITY;
      continue;
    }
    float* sums = work.out + (head * pieces * work.rows + r) * work.out_stride;
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t at = (head * pieces + i) * work.rows + r;
      const float weight = std::exp(work.tops[at] - top);
      total += weight * work.totals[at];
      const float* part = work.out + at * work.out_stride;
      for (int64_t d = 0; d < work.out_stride; ++d) {
        sums[d] = i == 0 ? weight * part[d] : sums[d] + weight * part[d];
      }
    }
    const float share = 1.0f / total;
    for (int64_t d = 0; d < n.v_head_dim; ++d) {
      const bool split = n.dtype == kBFloat16;
      out[d] = sums[split ? place(work.level, d, n.v_head_dim) : d] * share;
    }
    *lse = top + std::log(total);
  }
}

// Tasks go through the pages head by head, as they lie in memory.
void do_task(void* state, int64_t index, int) {
  Work& work = *static_cast<Work*>(state);
  const Job& job = *work.job;
  const Numbers& n = job.n;
  const int64_t pieces = work.pieces.size();
  const int64_t head = index / pieces, piece = index % pieces;
  const int64_t batch = head / n.kv_heads, kv_head = head % n.kv_heads;
  const Piece& rows = work.pieces[piece];
  const Page& page = job.pages[rows.page];
  const int64_t item = n.dtype == kFloat32 ? 4 : 2;
  const int64_t head_bytes = n.batch * page.tokens * (n.head_dim + n.v_head_dim) * item;
  const char* k = reinterpret_cast<const char*>(page.address) + kv_head * head_bytes;
  const char* v = k + n.batch * page.tokens * n.head_dim * item;
  const int64_t first = head * pieces * work.rows + piece * work.rows;
  Run run;
  run.dtype = static_cast<Dtype>(n.dtype);
  run.item = item;
  run.k = k + (batch * page.tokens + rows.row) * n.head_dim * item;
  run.v = v + (batch * page.tokens + rows.row) * n.v_head_dim * item;
  run.rows = rows.rows;
  run.position = page.position + rows.row;
  run.head_dim = n.head_dim;
  run.v_head_dim = n.v_head_dim;
  run.q = work.q + head * work.rows * work.q_stride;
  run.q_pairs = work.q_pairs + head * work.pair_rows * work.q_stride;
  run.q_stride = work.q_stride;
  run.query_rows = static_cast<int>(work.rows);
  run.queries = n.queries;
  run.starts = job.starts.empty() ? nullptr : job.starts.data() + batch * n.queries;
  run.scale = job.scale;
  run.softcap = job.softcap;
  run.out = work.out + first * work.out_stride;
  run.out_stride = work.out_stride;
  run.tops = work.tops + first;
  run.totals = work.totals + first;
  if (n.reads_only) {
    work.sink.store(read_run(work.level, run), std::memory_order_relaxed);
    return;
  }
  attend_run(work.level, run);
  if (work.left[head].fetch_sub(1, std::memory_order_acq_rel) == 1) join(work, head);
}

int64_t run(const Job& job) {
  if (!is_sound(job)) return kBadJob;
  std::lock_guard<std::mutex> turn(job.pool->turn());
  Work work;
  work.job = &job;
  prepare(work);
  job.pool->run(do_task, &work, work.heads * static_cast<int64_t>(work.pieces.size()));
  return kNone;
}

int64_t kv_bytes(const Job& job) {
  int64_t rows = 0;
  for (const Page& page : job.pages) rows += page.rows;
  const Numbers& n = job.n;
  const int64_t item = n.dtype == kFloat32 ? 4 : 2;
  return rows * n.batch * n.kv_heads * (n.head_dim + n.v_head_dim) * item;
}

// A job that fails must not pass for one that did not: its result is no number.
void poison(const Job& job) {
  const Numbers& n = job.n;
  const int64_t rows = n.batch * n.kv_heads * n.group * n.queries;
  if (rows < 1 || rows > (1 << 24) || n.v_head_dim < 1 || n.v_head_dim > (1 << 16)) return;
  if (n.out) std::fill_n(reinterpret_cast<float*>(n.out), rows * n.v_head_dim, NAN);
  if (n.lse) std::fill_n(reinterpret_cast<float*>(n.lse), rows, NAN);
}

}  // namespace host_attention

extern "C" {

using host_attention::Job;

// The highest level that this machine runs.
int64_t host_attention_level() { return host_attention::best_level(); }

// The level of jobs that name none.
int64_t host_attention_usual_level() { return host_attention::usual_level(); }

void* host_attention_pool(int64_t threads) {
  return new host_attention::Pool(static_cast<int>(threads));
}

void host_attention_close(void* pool) { delete static_cast<host_attention::Pool*>(pool); }

// A job that `host_attention_run` takes; only q, out, lse and the rows of pages must outlive this.
void* host_attention_job(void* pool, void* report, const void* numbers, float scale,
                         float softcap) {
  auto* job = new (std::nothrow) Job();
  if (job == nullptr) return nullptr;
  job->pool = static_cast<host_attention::Pool*>(pool);
  job->report = static_cast<host_attention::Report*>(report);
  std::memcpy(&job->n, numbers, sizeof(job->n));
  if (job->n.size != static_cast<int64_t>(sizeof(job->n))) {
    delete job;
    return nullptr;
  }
  const auto* pages = reinterpret_cast<const host_attention::Page*>(job->n.pages);
  job->pages.assign(pages, pages + std::max<int64_t>(0, job->n.num_pages));
  if (job->n.starts) {
    const auto* starts = reinterpret_cast<const int64_t*>(job->n.starts);
    job->starts.assign(starts, starts + std::max<int64_t>(0, job->n.batch * job->n.queries));
  }
  job->scale = scale;
  job->softcap = softcap;
  return job;
}

// Runs a job and frees it; a failure is in the report. A `cudaHostFn_t`.
void host_attention_run(void* state) {
  std::unique_ptr<Job> job(static_cast<Job*>(state));
  const auto start = std::chrono::steady_clock::now();
  int64_t error = host_attention::kUnknown;
  try {
    error = host_attention::run(*job);
  } catch (const std::bad_alloc&) {
    error = host_attention::kNoMemory;
  } catch (const std::exception&) {
    // An exception must not reach the driver's thread; the report says that there was one.
  }
  if (error != host_attention::kNone) host_attention::poison(*job);
  const auto spent = std::chrono::steady_clock::now() - start;
  host_attention::Report& report = *job->report;
  int64_t none = host_attention::kNone;
  if (error != host_attention::kNone && report.error.load() == host_attention::kNone) {
    report.failed = report.jobs.load();
    report.error.compare_exchange_strong(none, error);
  }
  report.nanoseconds += std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count();
  if (error == host_attention::kNone) report.bytes += host_attention::kv_bytes(*job);
  report.jobs += 1;
}

}  // extern "C"
