// Products of few float32 rows with a large matrix on a CPU. The rows are packed and stay in the L2 cache; the matrix
// is read once, without packing. (A BLAS packs the matrix too, which for few rows costs as much as the product.)

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "multiply.h"

#ifdef SAGA_AVX2

namespace {

using saga::kGrain, saga::Left, saga::multiply, saga::Right;

constexpr int64_t kOut = 12, kDepth = 768;  // rows of the matrix per tile, and numbers of each

// y (rows, out) = x (rows, in) @ weight (out, in)^T, both contiguous. Each number is summed in one fixed order, so it
// does not depend on the other rows or the number of threads.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t rows = x.size(0), in = x.size(1), out = weight.size(0), columns = (rows + 7) / 8 * 8;
  at::Tensor y = at::empty({rows, out}, x.options());
  std::vector<float> packed((rows + 15) / 16 * 16 * in, 0);  // transposed, in panels of sixteen rows
  for (int64_t r = 0; r < rows; ++r) {
    const float* const from = x.const_data_ptr<float>() + r * in;
    float* const to = packed.data() + r / 16 * 16 * in + r % 16;
    for (int64_t d = 0; d < in; ++d) to[d * 16] = from[d];
  }
  const int64_t grain = 1 + kGrain / (1 + kOut * rows * in);
  at::parallel_for(0, (out + kOut - 1) / kOut, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> part(kOut * columns);
    for (int64_t first = begin * kOut; first < std::min(out, end * kOut); first += kOut) {
      const int64_t n = std::min(kOut, out - first);
      std::fill(part.begin(), part.end(), 0.0f);
      for (int64_t d = 0; d < in; d += kDepth) {
        const Left w{weight.const_data_ptr<float>() + first * in + d, in};
        const Right x_columns{packed.data() + d * 16, 16, in * 16};
        multiply<true>(w, x_columns, part.data(), columns, n, std::min(kDepth, in - d), columns);
      }
      float* const to = y.mutable_data_ptr<float>() + first;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < n; ++i) to[r * out + i] = part[i * columns + r];
      }
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(saga_kernels, library) { library.def("linear_cpu(Tensor x, Tensor weight) -> Tensor"); }

TORCH_LIBRARY_IMPL(saga_kernels, CPU, library) { library.impl("linear_cpu", &linear); }

#endif
