// Nucleus sampling on a CPU, in float32. Reads a row from memory once and from the cache once more, and writes or sorts
// nothing as large as the vocabulary, unless the nucleus is.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t kBlock = 2048;  // logits that stay in the L1 cache between their maximum and their sum
constexpr int64_t kRun = 256;     // weights that are summed in float32
constexpr int kBins = 1017;       // of weights from 1 down to 0: eight for each power of two
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Token {
  float p;  // in units of the likeliest token's
  int64_t id;
  bool operator<(const Token& other) const { return p > other.p || (p == other.p && id < other.id); }
};

// The three loops over n logits. The weight of a logit is exp((x - peak) * scale).
struct Plain {
  // The maximum; nan if there is one.
  static float peak(const float* x, int64_t n) {
    float peak = -kInfinity;
    for (int64_t i = 0; i < n; ++i) {
      if (std::isnan(x[i])) return x[i];
      peak = std::max(peak, x[i]);
    }
    return peak;
  }

  static double mass(const float* x, int64_t n, float peak, float scale) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += std::exp((x[i] - peak) * scale);
    return sum;
  }

  // The tokens of logits `least` and above, in token order.
  static void gather(const float* x, int64_t n, float least, float peak, float scale, std::vector<Token>& tokens) {
    for (int64_t i = 0; i < n; ++i) {
      if (x[i] >= least) tokens.push_back({std::exp((x[i] - peak) * scale), i});
    }
  }
};

#ifdef SAGA_AVX2

struct Avx2 {
  // Eight logits, padded with -inf.
  SAGA_TARGET static inline __m256 load(const float* x, int64_t left) {
    if (left >= 8) return _mm256_loadu_ps(x);
    float padded[8];
    std::fill(std::copy_n(x, left, padded), padded + 8, -kInfinity);
    return _mm256_loadu_ps(padded);
  }

  SAGA_TARGET static inline __m256 weight(__m256 x, float peak, float scale) {
    return saga::exp(_mm256_mul_ps(_mm256_sub_ps(x, _mm256_set1_ps(peak)), _mm256_set1_ps(scale)));
  }

  SAGA_TARGET static float peak(const float* x, int64_t n) {
    __m256 peaks = _mm256_set1_ps(-kInfinity), unordered = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 8) {
      const __m256 next = load(x + i, n - i);
      peaks = _mm256_max_ps(peaks, next);
      unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(next, next, _CMP_UNORD_Q));
    }
    if (_mm256_movemask_ps(unordered)) return std::numeric_limits<float>::quiet_NaN();
    return saga::max(peaks);
  }

  SAGA_TARGET static double mass(const float* x, int64_t n, float peak, float scale) {
    double sum = 0;
    for (int64_t first = 0; first < n; first += kRun) {
      __m256 run = _mm256_setzero_ps();
      for (int64_t i = first; i < std::min(n, first + kRun); i += 8) {
        _mm_prefetch(reinterpret_cast<const char*>(x + i + kBlock), _MM_HINT_T0);  // overlaps memory with computation
        run = _mm256_add_ps(run, weight(load(x + i, n - i), peak, scale));
      }
      sum += saga::sum(run);
    }
    return sum;
  }

  SAGA_TARGET static void gather(const float* x, int64_t n, float least, float peak, float scale,
                                 std::vector<Token>& tokens) {
    float weights[8];
    for (int64_t i = 0; i < n; i += 8) {
      const __m256 next = load(x + i, n - i);
      unsigned found = _mm256_movemask_ps(_mm256_cmp_ps(next, _mm256_set1_ps(least), _CMP_GE_OQ));
      if (!found) continue;
      _mm256_storeu_ps(weights, weight(next, peak, scale));
      for (; found; found &= found - 1) {
        const int lane = __builtin_ctz(found);
        tokens.push_back({weights[lane], i + lane});
      }
    }
  }
};

#else
using Avx2 = Plain;
#endif

int bin(float p) { return (std::bit_cast<int32_t>(1.0f) - std::bit_cast<int32_t>(p)) >> 20; }

// The last token of the nucleus: likeliest first, the one that brings the sum to `target`; one after all others if none
// does. Nothing is sorted: the sum crosses `target` in one bin, which is copied to `inside` and halved repeatedly.
Token crossing(const std::vector<Token>& tokens, double target, std::vector<Token>& inside) {
  double masses[kBins] = {};
  for (const Token& token : tokens) masses[bin(token.p)] += token.p;
  double before = 0;
  int crossed = 0;
  while (crossed < kBins && before + masses[crossed] < target) before += masses[crossed++];
  inside.clear();
  for (const Token& token : tokens) {
    if (bin(token.p) == crossed) inside.push_back(token);
  }
  if (inside.empty()) return {0, std::numeric_limits<int64_t>::max()};

  auto first = inside.begin(), last = inside.end();
  while (last - first > 1) {
    const auto middle = first + (last - first) / 2;
    std::nth_element(first, middle, last);
    double through = before;
    for (auto token = first; token < middle; ++token) through += token->p;
    if (through >= target) {
      last = middle;
    } else {
      first = middle;
      before = through;
    }
  }
  return *first;
}

// One token of n logits x, by the random number `uniform`. The two vectors are scratch memory.
template <class Loops>
int64_t draw(const float* x, int64_t n, double temperature, double top_p, double uniform, std::vector<Token>& tokens,
             std::vector<Token>& inside) {
  if (temperature == 0) {
    const float peak = Loops::peak(x, n);
    return std::find_if(x, x + n, [peak](float y) { return std::isnan(peak) ? std::isnan(y) : y == peak; }) - x;
  }
  // Bounded, to avoid 0 * inf.
  const float scale = std::clamp<double>(1 / temperature, std::numeric_limits<float>::min(),
                                         std::numeric_limits<float>::max());
  float peak = -kInfinity;
  double total = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t count = std::min(kBlock, n - first);
    const float high = Loops::peak(x + first, count);
    if (!(high < kInfinity)) return -1;
    if (high == -kInfinity) continue;
    if (high > peak) {
      total *= std::exp((static_cast<double>(peak) - high) * scale);
      peak = high;
    }
    total += Loops::mass(x + first, count, peak, scale);
  }
  if (peak == -kInfinity) return -1;

  // n tokens each lighter than (1 - top_p) / n of the total hold less than 1 - top_p of it: the nucleus is above them.
  const double least = peak + std::log((1 - top_p) * total / n) / scale;
  tokens.clear();
  Loops::gather(x, n, std::max<double>(least, std::numeric_limits<float>::lowest()), peak, scale, tokens);
  const Token last = crossing(tokens, top_p < 1 ? top_p * total : kInfinity, inside);
  std::erase_if(tokens, [&last](const Token& token) { return last < token; });

  double kept = 0, passed = 0;
  for (const Token& token : tokens) kept += token.p;
  int64_t drawn = -1;
  for (const Token& token : tokens) {
    if (token.p == 0) continue;
    drawn = token.id;  // the last one, if the product rounds up to the total
    if ((passed += token.p) > uniform * kept) break;
  }
  return drawn;
}

// In [0, 1), 53 bits of Philox4x32-10; kernels/sampling.py has it in Python.
double philox_uniform(uint64_t seed, uint64_t row, uint64_t step) {
  uint32_t a = row, b = row >> 32, c = step, d = step >> 32, k0 = seed, k1 = seed >> 32;
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{a} * 0xD2511F53, right = uint64_t{c} * 0xCD9E8D57;
    a = (right >> 32) ^ b ^ k0;
    b = right;
    c = (left >> 32) ^ d ^ k1;
    d = left;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return ((uint64_t{a >> 5} << 26) + (b >> 6)) * 0x1p-53;
}

// logits (N, V) float32, rows and step (N,) int64 -> token ids (N,) int64, as kernels/sampling.py describes them.
at::Tensor sample_top_p(const at::Tensor& logits, double temperature, double top_p, int64_t seed,
                        const at::Tensor& rows, const at::Tensor& step) {
  const int64_t vocabulary = logits.size(1);
  const at::Tensor dense = logits.contiguous(), ids = rows.contiguous(), steps = step.contiguous();
  at::Tensor tokens = at::empty_like(ids);
  const float* const x = dense.const_data_ptr<float>();
  const int64_t *const id = ids.const_data_ptr<int64_t>(), *const at = steps.const_data_ptr<int64_t>();
  int64_t* const token = tokens.mutable_data_ptr<int64_t>();
  const auto draw_one = saga::has_avx2() ? &draw<Avx2> : &draw<Plain>;
  at::parallel_for(0, logits.size(0), std::max<int64_t>(1, 16 * kBlock / vocabulary), [&](int64_t begin, int64_t end) {
    std::vector<Token> candidates, inside;
    for (int64_t i = begin; i < end; ++i) {
      const double uniform = philox_uniform(seed, id[i], at[i]);
      token[i] = draw_one(x + i * vocabulary, vocabulary, temperature, top_p, uniform, candidates, inside);
    }
  });
  return tokens;
}

}  // namespace

// Under its own name: Python defines the schema of sample_top_p and chooses between this and the reference.
TORCH_LIBRARY_FRAGMENT(saga_kernels, library) {
  library.def(
      "sample_top_p_cpu(Tensor logits, float temperature, float top_p, int seed, Tensor rows, Tensor step) -> Tensor");
}

TORCH_LIBRARY_IMPL(saga_kernels, CPU, library) { library.impl("sample_top_p_cpu", &sample_top_p); }
