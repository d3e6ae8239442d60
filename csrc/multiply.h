// Float32 matrix products of operands in the caches, in tiles of six rows by sixteen columns: twelve AVX2 registers.

#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "vector.h"

#ifdef SAGA_AVX2

namespace saga {

constexpr int64_t kGrain = 1 << 22;  // least multiplications per thread: a tenth of a millisecond

// Prefetches memory that is read once, in strides that hardware prefetchers do not follow.
inline void prefetch(const float* from) { _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T1); }

// Element (i, d) of the left matrix, at[i * row + d * step]; transposed, the two are exchanged.
struct Left {
  const float* at;
  int64_t row, step = 1;
};

// Element (d, 16 j + c) of the right one, at[d * row + j * panel + c]. ahead: distance of the prefetched
// memory behind it; 0 for no prefetch.
struct Right {
  const float* at;
  int64_t row, panel = 16, ahead = 0;
};

// One tile: out (rows I, 16) = or += a (rows I, depth) @ b (depth, 16), whose columns' validity is in `left` and
// `right`; 8 columns if `right` is Nothing. Unrolled over I, as sums indexed by a loop would be written back to memory
// at each step.
struct Nothing {};
template <bool add, class L, class R, int... I>
SAGA_TARGET void tile(std::integer_sequence<int, I...>, const L& left, const R& right, Left a, Right b, float* out,
                      int64_t out_row, int64_t depth) {
  constexpr bool wide = !std::is_same_v<R, Nothing>;
  const auto sum = [&](const auto& lanes, float* at) SAGA_INLINE {
    if constexpr (std::is_same_v<decltype(lanes), const Nothing&>) return _mm256_setzero_ps();
    else return add ? lanes.load(at) : _mm256_setzero_ps();
  };
  __m256 x[] = {sum(left, out + I * out_row)...};
  __m256 y[] = {sum(right, out + I * out_row + 8)...};
  for (int64_t d = 0; d < depth; ++d, a.at += a.step, b.at += b.row) {
    if (b.ahead != 0) prefetch(b.at + b.ahead);
    const __m256 u = left.load(b.at);
    if constexpr (wide) {
      const __m256 v = right.load(b.at + 8);
      ((x[I] = _mm256_fmadd_ps(_mm256_broadcast_ss(a.at + I * a.row), u, x[I]),
        y[I] = _mm256_fmadd_ps(_mm256_broadcast_ss(a.at + I * a.row), v, y[I])),
       ...);
    } else {
      ((x[I] = _mm256_fmadd_ps(_mm256_broadcast_ss(a.at + I * a.row), u, x[I])), ...);
    }
  }
  (left.store(out + I * out_row, x[I]), ...);
  if constexpr (wide) (right.store(out + I * out_row + 8, y[I]), ...);
}

// The same for any number of rows, in tiles of up to `max_rows`.
template <bool add, int max_rows, class L, class R>
SAGA_TARGET void tiles(const L& left, const R& right, Left a, Right b, float* out, int64_t out_row, int64_t rows,
                       int64_t depth) {
  for (; rows >= max_rows; rows -= max_rows, a.at += max_rows * a.row, out += max_rows * out_row) {
    tile<add>(std::make_integer_sequence<int, max_rows>(), left, right, a, b, out, out_row, depth);
  }
  if constexpr (max_rows > 1) {
    if (rows > 0) tiles<add, (max_rows + 1) / 2>(left, right, a, b, out, out_row, rows, depth);
  }
}

// out (rows, columns), its rows `out_row` apart, = or += a (rows, depth) @ b (depth, columns).
template <bool add>
SAGA_TARGET void multiply(Left a, Right b, float* out, int64_t out_row, int64_t rows, int64_t depth, int64_t columns) {
  for (; columns >= 16; columns -= 16, b.at += b.panel, out += 16) {
    tiles<add, 6>(Eight(), Eight(), a, b, out, out_row, rows, depth);
  }
  if (columns > 8) tiles<add, 6>(Eight(), Tail(columns - 8), a, b, out, out_row, rows, depth);
  if (columns == 8) tiles<add, 12>(Eight(), Nothing(), a, b, out, out_row, rows, depth);
  if (0 < columns && columns < 8) tiles<add, 12>(Tail(columns), Nothing(), a, b, out, out_row, rows, depth);
}

}  // namespace saga

#endif
