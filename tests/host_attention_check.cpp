// The attention kernel of the CPU against double, without Python: for machines that are emulated.
//
// Prints the largest error and exits with 1 where it is too large.

#include "../runtime/host_attention.cpp"

#include <cstdio>
#include <random>

namespace ha = host_attention;

static double widened(ha::Dtype dtype, const char* p) {
  if (dtype == ha::kFloat32) return *reinterpret_cast<const float*>(p);
  if (dtype == ha::kBFloat16) return ha::portable::widen(*reinterpret_cast<const ha::bf16*>(p));
  return ha::portable::widen(*reinterpret_cast<const ha::fp16*>(p));
}

// One head, `group` query rows, two pages of which the second is ragged; returns the largest error.
static double check(ha::Dtype dtype, int64_t dim, int64_t v_dim, int64_t group, float softcap) {
  const int64_t tokens = 200, valid[] = {200, 77}, item = dtype == ha::kFloat32 ? 4 : 2;
  std::mt19937 random(static_cast<unsigned>(dim * 31 + group));
  std::normal_distribution<float> normal;
  const auto fill = [&](std::vector<char>& to) {
    for (size_t at = 0; at < to.size(); at += item) {
      const float x = normal(random);
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      // bf16 by cutting; fp16 likewise, all these values being normal in it or next to zero.
      const uint32_t half = (bits & 0x7fffffff) >> 13;
      const uint32_t small = half > (112u << 10) ? half - (112u << 10) : 0;
      const uint32_t cut = dtype == ha::kBFloat16 ? bits >> 16 : (bits >> 31) << 15 | small;
      std::memcpy(&to[at], item == 4 ? &bits : &cut, item);
    }
  };
  std::vector<char> q(group * dim * item), page[2];
  fill(q);
  for (auto& bytes : page) {
    bytes.resize(tokens * (dim + v_dim) * item);
    fill(bytes);
  }
  std::vector<float> out(group * v_dim), lse(group);
  const int64_t pages[] = {(int64_t)page[0].data(), tokens, valid[0], 0,
                           (int64_t)page[1].data(), tokens, valid[1], tokens};
  ha::Numbers n{sizeof(ha::Numbers), dtype, -1, 1, 1, group, 1, dim, v_dim, 2, (int64_t)q.data(),
                (int64_t)out.data(), (int64_t)lse.data(), 0, (int64_t)pages, 0};
  ha::Report report{};
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  void* pool = host_attention_pool(2);
  host_attention_run(host_attention_job(pool, &report, &n, scale, softcap));
  host_attention_close(pool);
  if (report.error != ha::kNone) return INFINITY;
  double worst = 0;
  for (int64_t r = 0; r < group; ++r) {
    std::vector<double> wanted(v_dim, 0.0);
    double total = 0;
    for (int part = 0; part < 2; ++part) {
      for (int64_t j = 0; j < valid[part]; ++j) {
        double s = 0;
        for (int64_t d = 0; d < dim; ++d) {
          s += widened(dtype, &q[(r * dim + d) * item]) *
               widened(dtype, &page[part][(j * dim + d) * item]);
        }
        s *= scale;
        if (softcap > 0) s = softcap * std::tanh(s / softcap);
        total += std::exp(s);
        const char* v = &page[part][(tokens * dim + j * v_dim) * item];
        for (int64_t d = 0; d < v_dim; ++d) wanted[d] += std::exp(s) * widened(dtype, v + d * item);
      }
    }
    worst = std::max(worst, std::abs(lse[r] - std::log(total)));
    for (int64_t d = 0; d < v_dim; ++d) {
      worst = std::max(worst, std::abs(out[r * v_dim + d] - wanted[d] / total));
    }
  }
  return worst;
}

int main() {
  double worst = 0;
  for (ha::Dtype dtype : {ha::kFloat32, ha::kBFloat16, ha::kFloat16}) {
    for (int64_t group : {1, 4, 7}) {
      for (float softcap : {0.0f, 2.0f}) {
        worst = std::max(worst, check(dtype, 128, 128, group, softcap));
        worst = std::max(worst, check(dtype, 80, 96, group, softcap));
        worst = std::max(worst, check(dtype, 37, 19, group, softcap));
      }
    }
  }
  std::printf("%g\n", worst);
  return worst < 4e-6 ? 0 : 1;
}
