// Attention of a decode step on a CPU. A prefix is read once for all rollouts of its pair, a row's own keys and values
// once for its query heads, with an online softmax over blocks of keys (as in FlashAttention, arXiv 2205.14135).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "multiply.h"
#include "vector.h"

#ifdef SAGA_AVX2

namespace {

using saga::prefetch, saga::kGrain, saga::Left, saga::multiply, saga::Right;

constexpr int64_t kBlock = 64;  // keys a block: their scores, keys and values stay in the first cache

// Queries of one key head, and their online softmax over the keys so far: o = Σ e^(s - row_max) v, sum = Σ e^(s - row_max)
// and row_max = max s.
struct Queries {
  int64_t count, dim;
  float *q, *o, *sum, *row_max;
};

// out (count, kBlock): scores onto k (keys, dim), one dot product each; meanwhile v (keys, dim) is fetched.
SAGA_TARGET void dot(const Queries& rows, const float* k, const float* v, int64_t keys, float* out) {
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t d = 0; d < rows.dim; d += 16) prefetch(v + j * rows.dim + d);
    for (int64_t i = 0; i < rows.count; ++i) {
      const float *x = rows.q + i * rows.dim, *y = k + j * rows.dim;
      out[i * kBlock + j] = saga::vector_sum(
          rows.dim, [&](int64_t d, const auto& lanes) SAGA_INLINE { return lanes.load(x + d) * lanes.load(y + d); });
    }
  }
}

// Adds a block of scores (count, kBlock), of which `keys` are valid, and its values (keys, dim) to the online softmax.
SAGA_TARGET void accumulate(const Queries& rows, float* scores, const float* v, int64_t ahead, int64_t keys) {
  for (int64_t i = 0; i < rows.count; ++i) {
    float* const s = scores + i * kBlock;
    std::fill(s + keys, s + (keys + 7) / 8 * 8, -std::numeric_limits<float>::infinity());
    __m256 maxima = _mm256_loadu_ps(s), sum = _mm256_setzero_ps();
    for (int64_t j = 8; j < keys; j += 8) maxima = _mm256_max_ps(maxima, _mm256_loadu_ps(s + j));
    const float row_max = std::max(rows.row_max[i], saga::max(maxima));
    const float rescale = std::exp(rows.row_max[i] - row_max);  // 0 the first time
    for (int64_t j = 0; j < keys; j += 8) {
      const __m256 e = saga::exp(_mm256_sub_ps(_mm256_loadu_ps(s + j), _mm256_set1_ps(row_max)));
      _mm256_storeu_ps(s + j, e);
      sum = _mm256_add_ps(sum, e);
    }
    rows.row_max[i] = row_max;
    rows.sum[i] = rows.sum[i] * rescale + saga::sum(sum);
    if (rescale != 1) {
      for (int64_t d = 0; d < rows.dim; ++d) rows.o[i * rows.dim + d] *= rescale;
    }
  }
  multiply<true>(Left{scores, kBlock}, Right{v, rows.dim, 16, ahead}, rows.o, rows.dim, rows.count, keys, rows.dim);
}

// All float32; what a row, a head or a slot holds is contiguous. See kernels/decode.py.
at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& prefix_k,
                            const at::Tensor& prefix_v, at::Tensor own_k, at::Tensor own_v,
                            const at::Tensor& query_slot, const at::Tensor& cached, int64_t group) {
  at::Tensor out = at::zeros_like(q, at::MemoryFormat::Contiguous);
  const int64_t n = q.size(0), heads = q.size(1), dim = q.size(2);
  const int64_t pairs = prefix_k.size(0), kv_heads = prefix_k.size(1), length = prefix_k.size(3);
  const int64_t heads_per_kv = heads / kv_heads;
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  const at::Tensor dense_slots = query_slot.contiguous(), dense_cached = cached.contiguous();
  const int64_t* const slots = dense_slots.const_data_ptr<int64_t>();
  const int64_t* const counts = dense_cached.const_data_ptr<int64_t>();
  std::vector<std::vector<int64_t>> rows_of_pair(pairs);
  for (int64_t row = 0; row < n; ++row) {
    TORCH_CHECK_VALUE(slots[row] >= 0, "query_slot: got ", slots[row], " at ", row, ", accepted is 0 or more");
    TORCH_CHECK_VALUE(counts[row] >= 0 && counts[row] < own_k.size(2), "cached: got ", counts[row], " at ", row,
                      ", accepted is 0 to ", own_k.size(2) - 1);
    if (slots[row] < pairs * group) rows_of_pair[slots[row] / group].push_back(row);
  }
  const auto data_of = [](const at::Tensor& x, int64_t i, int64_t j) {
    return static_cast<float*>(x.data_ptr()) + i * x.stride(0) + j * x.stride(1);
  };

  // Little work stays on one thread: on a busy machine waiting for a second one costs a slice of the scheduler's. work:
  // multiplications a task, on average.
  const int64_t work = 2 * n * heads_per_kv * (length + own_k.size(2)) * dim / std::max<int64_t>(1, pairs);
  at::parallel_for(0, pairs * kv_heads, 1 + kGrain / (1 + work), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    for (int64_t task = begin; task < end; ++task) {
      const std::vector<int64_t>& rows = rows_of_pair[task / kv_heads];
      const int64_t pair = task / kv_heads, head = task % kv_heads, count = rows.size() * heads_per_kv;
      scratch.assign(count * (2 * dim + kBlock + 2), 0);
      Queries all{count, dim, scratch.data(), scratch.data() + count * dim, nullptr, nullptr};
      float* const scores = all.o + count * dim;
      all.sum = scores + count * kBlock;
      all.row_max = all.sum + count;
      std::fill(all.row_max, all.row_max + count, -std::numeric_limits<float>::infinity());
      for (int64_t i = 0; i < count; ++i) {
        const float* const x = data_of(q, rows[i / heads_per_kv], head * heads_per_kv + i % heads_per_kv);
        for (int64_t d = 0; d < dim; ++d) all.q[i * dim + d] = scale * x[d];
      }

      for (int64_t first = 0; first < length; first += kBlock) {
        const int64_t keys = std::min(kBlock, length - first);
        const Right block{data_of(prefix_k, pair, head) + first, length, 16, kBlock};
        multiply<false>(Left{all.q, dim}, block, scores, kBlock, count, dim, keys);
        accumulate(all, scores, data_of(prefix_v, pair, head) + first * dim, kBlock * dim, keys);
      }
      for (size_t r = 0; r < rows.size(); ++r) {
        const int64_t row = rows[r], shift = r * heads_per_kv, total = counts[row] + 1;
        float* const row_k = data_of(own_k, row, head);
        float* const row_v = data_of(own_v, row, head);
        std::copy_n(data_of(k, row, head), dim, row_k + counts[row] * dim);
        std::copy_n(data_of(v, row, head), dim, row_v + counts[row] * dim);
        const Queries own{heads_per_kv,        dim, all.q + shift * dim, all.o + shift * dim, all.sum + shift,
                          all.row_max + shift};
        for (int64_t first = 0; first < total; first += kBlock) {
          const int64_t keys = std::min(kBlock, total - first);
          dot(own, row_k + first * dim, row_v + first * dim, keys, scores);
          accumulate(own, scores, row_v + first * dim, 0, keys);
        }
        float* const o = out.mutable_data_ptr<float>() + (row * heads + head * heads_per_kv) * dim;
        for (int64_t i = 0; i < heads_per_kv * dim; ++i) o[i] = own.o[i] / own.sum[i / dim];
      }
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(saga_kernels, library) {
  library.def(
      "decode_attention_cpu(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor(a!) own_k, "
      "Tensor(b!) own_v, Tensor query_slot, Tensor cached, int group) -> Tensor");
}

TORCH_LIBRARY_IMPL(saga_kernels, CPU, library) { library.impl("decode_attention_cpu", &decode_attention); }

#endif
