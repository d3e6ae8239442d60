// `group_attention` in float32 on a CPU, by blocks of query rows and of keys with an online softmax; the backward pass
// recomputes the scores (FlashAttention-2, arXiv 2307.08691). The query heads of a key head are stacked as rows, so
// that keys and values are read once for all of them.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "multiply.h"
#include "vector.h"

#ifdef SAGA_AVX2

namespace {

using saga::kGrain, saga::Left, saga::multiply, saga::Right;

// Rows and keys a block: whole tiles, and what a block of each needs stays in the second cache. Strides of 16 more than
// a multiple of 32 spread the lines of a column over all sets of the first.
constexpr int64_t kRows = 96, kKeys = 192, kPad = 16, kScores = kKeys + kPad;
constexpr float kMasked = -std::numeric_limits<float>::infinity();

int64_t round_up_16(int64_t n) { return (n + 15) / 16 * 16; }

// Queries first to last of a segment. `prefix` packed keys from `prefix_at` on are visible to all of them; of those from
// `own_at` on `visible` are to the first query, one more to the next, and so on.
struct Block {
  int64_t first, last, prefix_at, prefix, own_at, visible;
};

// A call's sizes, and where its segments lie. A row is a query of one of the `heads_per_kv` query heads of a key head.
struct Layout {
  int64_t queries, heads, kv_heads, dim, heads_per_kv;
  int64_t width, stride;         // of a row that is copied: dim in whole sixteens, and up to the next row
  int64_t max_rows;              // rows a block has, at most
  std::vector<int64_t> offsets;  // of each segment's keys, and their end
  std::vector<int64_t> packed;   // the same where every segment has whole sixteens
  std::vector<Block> blocks;
  int64_t scores = 1;  // of one query head

  Layout(const at::Tensor& q, const at::Tensor& k, const at::Tensor& segment_offsets, const at::Tensor& segment_prefix,
         const at::Tensor& query_offsets)
      : queries(q.size(0)), heads(q.size(1)), kv_heads(k.size(1)), dim(q.size(2)), heads_per_kv(heads / kv_heads),
        width(round_up_16(dim)), stride((width + 31) / 32 * 32 + kPad),
        max_rows(std::max<int64_t>(1, kRows / heads_per_kv) * heads_per_kv) {
    const auto *begin = segment_offsets.const_data_ptr<int>(), *prefix_of = segment_prefix.const_data_ptr<int>(),
               *query_begin = query_offsets.const_data_ptr<int>();
    const int64_t segments = segment_prefix.numel(), step = max_rows / heads_per_kv;
    offsets.assign(begin, begin + segments + 1);
    packed.push_back(0);
    for (int64_t s = 0; s < segments; ++s) packed.push_back(packed[s] + round_up_16(offsets[s + 1] - offsets[s]));
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t p = prefix_of[s], prefix = p == s ? 0 : offsets[p + 1] - offsets[p];
      for (int64_t row = query_begin[s]; row < query_begin[s + 1]; row += step) {
        const int64_t last = std::min<int64_t>(row + step, query_begin[s + 1]), own = offsets[s + 1] - offsets[s];
        blocks.push_back({row, last, packed[p], prefix, packed[s], own - (query_begin[s + 1] - row) + 1});
        scores += (last - row) * (prefix + blocks.back().visible);
      }
    }
  }

  int64_t rows(const Block& block) const { return (block.last - block.first) * heads_per_kv; }

  // body(row, query, head) for the rows of a block, of the query heads of a key head.
  template <class Body>
  void for_each_row(const Block& block, int64_t kv_head, const Body& body) const {
    for (int64_t i = 0; i < rows(block); ++i) {
      body(i, block.first + i / heads_per_kv, kv_head * heads_per_kv + i % heads_per_kv);
    }
  }

  // body(key, keys, visible) for the blocks of packed keys of a block of queries. Of a block `visible` keys are visible to
  // the first query, one more to the next, and so on, up to all.
  template <class Body>
  void for_each_key_block(const Block& block, const Body& body) const {
    for (int64_t key = 0; key < block.prefix; key += kKeys) {
      const int64_t keys = std::min(kKeys, block.prefix - key);
      body(block.prefix_at + key, keys, keys);
    }
    const int64_t all = block.visible + block.last - block.first - 1;
    for (int64_t key = 0; key < all; key += kKeys) {
      body(block.own_at + key, std::min(kKeys, all - key), block.visible - key);
    }
  }

  // body(token, place) for all keys: among those of the call, and among the packed ones.
  template <class Body>
  void for_each_key(const Body& body) const {
    for (size_t s = 0; s + 1 < offsets.size(); ++s) {
      for (int64_t t = offsets[s]; t < offsets[s + 1]; ++t) body(t, packed[s] + t - offsets[s]);
    }
  }

  // Packed keys: row after row, and transposed, sixteen keys after sixteen; zeros between the segments.
  std::vector<float> pack_rows(const at::Tensor& x, int64_t kv_head) const {
    std::vector<float> to(packed.back() * stride, 0);
    for_each_key([&](int64_t token, int64_t place) {
      std::copy_n(at(x, token, kv_head), dim, to.data() + place * stride);
    });
    return to;
  }
  std::vector<float> pack_columns(const at::Tensor& x, int64_t kv_head) const {
    std::vector<float> to(packed.back() * width, 0);
    for_each_key([&](int64_t token, int64_t place) {
      const float* const from = at(x, token, kv_head);
      float* const column = to.data() + place / 16 * 16 * width + place % 16;
      for (int64_t d = 0; d < dim; ++d) column[d * 16] = from[d];
    });
    return to;
  }
  Right rows_from(const std::vector<float>& packed_rows, int64_t key) const {
    return {packed_rows.data() + key * stride, stride};
  }
  Right columns_from(const std::vector<float>& packed_columns, int64_t key) const {
    return {packed_columns.data() + key * width, 16, 16 * width};
  }

  // Rows of a block out of x (queries, heads, dim), times `scale`; what lies behind each is left alone.
  void gather(const Block& block, int64_t kv_head, const at::Tensor& x, float scale, std::vector<float>& to) const {
    for_each_row(block, kv_head, [&](int64_t i, int64_t query, int64_t head) {
      const float* const from = at(x, query, head);
      for (int64_t d = 0; d < dim; ++d) to[i * stride + d] = scale * from[d];
    });
  }

  static const float* at(const at::Tensor& x, int64_t row, int64_t head) {
    return x.const_data_ptr<float>() + row * x.stride(0) + head * x.stride(1);
  }
};

// A row's scores of keys that are not visible to it become -inf, and those behind the last key.
inline void mask(float* scores, int64_t keys, int64_t visible) {
  std::fill(scores + std::clamp<int64_t>(visible, 0, keys), scores + round_up_16(keys), kMasked);
}

// Online softmax of rows: o = Σ e^(s - row_max) v, sum = Σ e^(s - row_max), over the keys so far, and row_max = max s.
struct SoftmaxState {
  std::vector<float> o, sum, row_max;
};

// A block's scores become e^(s - row_max), and `state` includes these keys once their values are added.
SAGA_TARGET void softmax(const Layout& layout, float* scores, int64_t keys, int64_t visible, int64_t rows,
                         SoftmaxState& state) {
  for (int64_t i = 0; i < rows; ++i, scores += kScores) {
    mask(scores, keys, visible + i / layout.heads_per_kv);
    __m256 maxima = _mm256_loadu_ps(scores), sum = _mm256_setzero_ps();
    for (int64_t j = 8; j < keys; j += 8) maxima = _mm256_max_ps(maxima, _mm256_loadu_ps(scores + j));
    const float row_max = std::max(state.row_max[i], saga::max(maxima));
    for (int64_t j = 0; j < keys; j += 8) {
      const __m256 e = saga::exp(_mm256_sub_ps(_mm256_loadu_ps(scores + j), _mm256_set1_ps(row_max)));
      _mm256_storeu_ps(scores + j, e);
      sum = _mm256_add_ps(sum, e);
    }
    const float rescale = std::exp(state.row_max[i] - row_max);  // 0 the first time
    state.row_max[i] = row_max;
    state.sum[i] = state.sum[i] * rescale + saga::sum(sum);
    if (rescale != 1) {
      for (int64_t d = 0; d < layout.width; ++d) state.o[i * layout.stride + d] *= rescale;
    }
  }
}

// Scores become P = e^(s - lse); d_p, the gradient of P, that of the scores: P (d_p - delta).
SAGA_TARGET void differentiate(const Layout& layout, float* scores, float* d_p, int64_t keys, int64_t visible,
                               int64_t rows, const float* lse, const float* delta) {
  for (int64_t i = 0; i < rows; ++i, scores += kScores, d_p += kScores) {
    mask(scores, keys, visible + i / layout.heads_per_kv);
    for (int64_t j = 0; j < keys; j += 8) {
      const __m256 p = saga::exp(_mm256_sub_ps(_mm256_loadu_ps(scores + j), _mm256_set1_ps(lse[i])));
      _mm256_storeu_ps(scores + j, p);
      _mm256_storeu_ps(d_p + j, _mm256_mul_ps(p, _mm256_sub_ps(_mm256_loadu_ps(d_p + j), _mm256_set1_ps(delta[i]))));
    }
  }
}

at::Tensor rowwise(const at::Tensor& x) { return x.stride(2) == 1 ? x : x.contiguous(); }

// See kernels/attention.py. All float32, offsets int32.
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                           const at::Tensor& segment_offsets, const at::Tensor& segment_prefix,
                                           const at::Tensor& query_offsets, double scale) {
  const at::Tensor q_rows = rowwise(q), k_rows = rowwise(k), v_rows = rowwise(v);
  const Layout layout(q, k, segment_offsets, segment_prefix, query_offsets);
  const int64_t blocks = layout.blocks.size(), stride = layout.stride, max_rows = layout.max_rows;
  at::Tensor o = at::empty_like(q, at::MemoryFormat::Contiguous);
  at::Tensor lse = at::empty({layout.heads, layout.queries}, q.options());
  std::vector<std::vector<float>> keys(layout.kv_heads), values(layout.kv_heads);
  const int64_t work = 2 * layout.scores * layout.heads_per_kv * layout.dim;  // multiplications a key head
  at::parallel_for(0, layout.kv_heads, 1 + kGrain / work, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      keys[head] = layout.pack_columns(k_rows, head);
      values[head] = layout.pack_rows(v_rows, head);
    }
  });
  at::parallel_for(0, layout.kv_heads * blocks, 1 + kGrain * blocks / work, [&](int64_t begin, int64_t end) {
    std::vector<float> own(max_rows * stride, 0), scores(max_rows * kScores);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / blocks;
      const Block& block = layout.blocks[task % blocks];
      const int64_t rows = layout.rows(block);
      SoftmaxState state{std::vector<float>(max_rows * stride, 0), std::vector<float>(max_rows, 0),
                         std::vector<float>(max_rows, kMasked)};
      layout.gather(block, head, q_rows, static_cast<float>(scale), own);
      layout.for_each_key_block(block, [&](int64_t key, int64_t n, int64_t first) {
        const Right k_columns = layout.columns_from(keys[head], key), v_block = layout.rows_from(values[head], key);
        multiply<false>(Left{own.data(), stride}, k_columns, scores.data(), kScores, rows, layout.width,
                        round_up_16(n));
        softmax(layout, scores.data(), n, first, rows, state);
        multiply<true>(Left{scores.data(), kScores}, v_block, state.o.data(), stride, rows, n, layout.width);
      });
      layout.for_each_row(block, head, [&](int64_t i, int64_t query, int64_t h) {
        float* const to = o.mutable_data_ptr<float>() + (query * layout.heads + h) * layout.dim;
        for (int64_t d = 0; d < layout.dim; ++d) to[d] = state.o[i * stride + d] / state.sum[i];
        lse.mutable_data_ptr<float>()[h * layout.queries + query] = state.row_max[i] + std::log(state.sum[i]);
      });
    }
  });
  return {o, lse};
}

// A key head's gradients are one thread's: sums over completions are always taken in the same order.
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& d_o, const at::Tensor& q, const at::Tensor& k,
                                                        const at::Tensor& v, const at::Tensor& o, const at::Tensor& lse,
                                                        const at::Tensor& segment_offsets,
                                                        const at::Tensor& segment_prefix,
                                                        const at::Tensor& query_offsets, double scale) {
  const at::Tensor do_rows = rowwise(d_o), q_rows = rowwise(q), k_rows = rowwise(k), v_rows = rowwise(v);
  const at::Tensor o_rows = rowwise(o), dense_lse = lse.contiguous();
  const Layout layout(q, k, segment_offsets, segment_prefix, query_offsets);
  const int64_t stride = layout.stride, max_rows = layout.max_rows, width = layout.width;
  at::Tensor dq = at::empty_like(q, at::MemoryFormat::Contiguous);
  at::Tensor dk = at::empty_like(k, at::MemoryFormat::Contiguous);
  at::Tensor dv = at::empty_like(v, at::MemoryFormat::Contiguous);
  const int64_t work = 5 * layout.scores * layout.heads_per_kv * layout.dim;
  at::parallel_for(0, layout.kv_heads, 1 + kGrain / work, [&](int64_t begin, int64_t end) {
    std::vector<float> own(max_rows * stride, 0), own_do(max_rows * stride, 0), own_dq(max_rows * stride);
    std::vector<float> scores(max_rows * kScores), d_p(max_rows * kScores), own_lse(max_rows), delta(max_rows);
    for (int64_t head = begin; head < end; ++head) {
      const std::vector<float> k_columns = layout.pack_columns(k_rows, head), k_packed = layout.pack_rows(k_rows, head);
      const std::vector<float> v_columns = layout.pack_columns(v_rows, head);
      std::vector<float> d_keys(k_packed.size(), 0), d_values(k_packed.size(), 0);
      for (const Block& block : layout.blocks) {
        const int64_t rows = layout.rows(block);
        layout.gather(block, head, q_rows, static_cast<float>(scale), own);
        layout.gather(block, head, do_rows, 1, own_do);
        std::fill(own_dq.begin(), own_dq.end(), 0.0f);
        layout.for_each_row(block, head, [&](int64_t i, int64_t query, int64_t h) {
          const float *x = Layout::at(do_rows, query, h), *y = Layout::at(o_rows, query, h);
          own_lse[i] = dense_lse.const_data_ptr<float>()[h * layout.queries + query];
          delta[i] = std::inner_product(x, x + layout.dim, y, 0.0f);
        });
        layout.for_each_key_block(block, [&](int64_t key, int64_t n, int64_t first) {
          const auto onto = [&](const std::vector<float>& left, const std::vector<float>& columns, auto& to) {
            multiply<false>(Left{left.data(), stride}, layout.columns_from(columns, key), to.data(), kScores, rows,
                            width, round_up_16(n));
          };
          const auto over = [&](const std::vector<float>& weights, const std::vector<float>& right, auto& to) {
            const Left transposed{weights.data(), 1, kScores};
            multiply<true>(transposed, Right{right.data(), stride}, to.data() + key * stride, stride, n, rows, width);
          };
          onto(own, k_columns, scores);
          onto(own_do, v_columns, d_p);
          differentiate(layout, scores.data(), d_p.data(), n, first, rows, own_lse.data(), delta.data());
          over(scores, own_do, d_values);
          over(d_p, own, d_keys);
          multiply<true>(Left{d_p.data(), kScores}, layout.rows_from(k_packed, key), own_dq.data(), stride, rows, n,
                         width);
        });
        layout.for_each_row(block, head, [&](int64_t i, int64_t query, int64_t h) {
          float* const to = dq.mutable_data_ptr<float>() + (query * layout.heads + h) * layout.dim;
          for (int64_t d = 0; d < layout.dim; ++d) to[d] = static_cast<float>(scale) * own_dq[i * stride + d];
        });
      }
      layout.for_each_key([&](int64_t token, int64_t place) {
        const int64_t to = (token * layout.kv_heads + head) * layout.dim;
        std::copy_n(d_keys.data() + place * stride, layout.dim, dk.mutable_data_ptr<float>() + to);
        std::copy_n(d_values.data() + place * stride, layout.dim, dv.mutable_data_ptr<float>() + to);
      });
    }
  });
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(saga_kernels, library) {
  library.def(
      "group_attention_cpu(Tensor q, Tensor k, Tensor v, Tensor segment_offsets, Tensor segment_prefix, "
      "Tensor query_offsets, float scale) -> (Tensor, Tensor)");
  library.def(
      "group_attention_backward_cpu(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
      "Tensor segment_offsets, Tensor segment_prefix, Tensor query_offsets, float scale) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(saga_kernels, CPU, library) {
  library.impl("group_attention_cpu", &forward);
  library.impl("group_attention_backward_cpu", &backward);
}

#endif
