// Float32 matrix products of what lies in the caches, in tiles of six rows by sixteen columns: twelve AVX2 registers.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "vector.h"

#ifdef SAGA_AVX2

namespace saga {

// Memory that is read once comes in strides that no prefetcher follows.
inline void fetch(const float* from) { _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T1); }

// Element (i, d) of the left matrix, at[i * row + d * step]; transposed, the two are exchanged.
struct Left {
  const float* at;
  int64_t row, step = 1;
};

// Element (d, 16 j + c) of the right one, at[d * row + j * panel + c]. ahead: how far behind it lies what is fetched
// from memory meanwhile; 0 for nothing.
struct Right {
  const float* at;
  int64_t row, panel = 16, ahead = 0;
};

// One tile: out (rows I, 16) = or += a (rows I, depth) @ b (depth, 16), of whose columns `left` and `right` hold those
// there are. Spelled out over I, as sums that a loop indexes would be written back to memory at each step.
template <bool add, class Lanes, int... I>
SAGA_TARGET void tile(std::integer_sequence<int, I...>, const Lanes& left, const Lanes& right, Left a, Right b,
                      float* out, int64_t out_row, int64_t depth) {
  __m256 x[] = {(add ? left.load(out + I * out_row) : _mm256_setzero_ps())...};
  __m256 y[] = {(add ? right.load(out + I * out_row + 8) : _mm256_setzero_ps())...};
  for (int64_t d = 0; d < depth; ++d, a.at += a.step, b.at += b.row) {
    if (b.ahead != 0) fetch(b.at + b.ahead);
    const __m256 u = left.load(b.at), v = right.load(b.at + 8);
    ((x[I] = _mm256_fmadd_ps(_mm256_broadcast_ss(a.at + I * a.row), u, x[I]),
      y[I] = _mm256_fmadd_ps(_mm256_broadcast_ss(a.at + I * a.row), v, y[I])),
     ...);
  }
  ((left.store(out + I * out_row, x[I]), right.store(out + I * out_row + 8, y[I])), ...);
}

// out (rows, columns), its rows `out_row` apart, = or += a (rows, depth) @ b (depth, columns).
template <bool add>
SAGA_TARGET void multiply(Left a, Right b, float* out, int64_t out_row, int64_t rows, int64_t depth, int64_t columns) {
  for (int64_t j = 0; j < columns; j += 16, b.at += b.panel) {
    const auto column = [&](const auto& left, const auto& right) SAGA_TARGET {
      for (int64_t i = 0; i < rows; i += 6) {
        const auto run = [&](auto which) SAGA_TARGET {
          const Left from{a.at + i * a.row, a.row, a.step};
          tile<add>(which, left, right, from, b, out + i * out_row + j, out_row, depth);
        };
        switch (rows - i) {
          case 1: run(std::make_integer_sequence<int, 1>()); break;
          case 2: run(std::make_integer_sequence<int, 2>()); break;
          case 3: run(std::make_integer_sequence<int, 3>()); break;
          case 4: run(std::make_integer_sequence<int, 4>()); break;
          case 5: run(std::make_integer_sequence<int, 5>()); break;
          default: run(std::make_integer_sequence<int, 6>());
        }
      }
    };
    const int64_t there = columns - j;
    there >= 16 ? column(Eight(), Eight()) : column(Tail(there), Tail(there - 8));
  }
}

}  // namespace saga

#endif
