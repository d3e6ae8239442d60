// The pointwise ops between a decoder layer's matmuls, for CPUs with AVX2, in float32: norms, rotary embedding, gate.
// Each is one pass over its rows. The schemas, and the formulas in plain PyTorch, are in kernels/.

#include <torch/library.h>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "vector.h"

#ifdef SAGA_AVX2

namespace {

constexpr int64_t GRAIN = 1 << 16;  // least numbers per thread

// A tensor as n rows, without a copy if only rows have a stride, as q and k in the result of one matmul. The pointer is
// null without a tensor.
class Rows {
 public:
  Rows(const std::optional<at::Tensor>& x, int64_t n, int64_t width) {
    if (!x) return;
    tensor_ = x->reshape({n, width});
    if (width > 1 && tensor_.stride(1) != 1) tensor_ = tensor_.contiguous();
    data_ = tensor_.const_data_ptr<float>();
    stride_ = tensor_.stride(0);
  }
  const float* operator[](int64_t i) const { return data_ + i * stride_; }

 private:
  at::Tensor tensor_;
  const float* data_ = nullptr;
  int64_t stride_ = 0;
};

int64_t count_rows(const at::Tensor& x) { return x.numel() / std::max<int64_t>(1, x.size(-1)); }

template <class Row>
void for_rows(int64_t n, int64_t width, const Row& row) {
  at::parallel_for(0, n, 1 + GRAIN / (1 + width), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) row(i);
  });
}

// Each works on one row; an output may be the first input.

SAGA_TARGET void add(const float* x, const float* residual, int64_t width, float* y) {
  saga::for_vectors(width, [&](int64_t i, const auto& lanes) SAGA_INLINE {
    lanes.store(y + i, lanes.load(x + i) + lanes.load(residual + i));
  });
}

SAGA_TARGET float inverse_rms(const float* x, int64_t width, float eps) {
  const float squares = saga::vector_sum(width, [&](int64_t i, const auto& lanes) SAGA_INLINE {
    const __m256 v = lanes.load(x + i);
    return v * v;
  });
  return 1 / std::sqrt(squares / static_cast<float>(width) + eps);
}

SAGA_TARGET void norm(const float* x, const float* weight, int64_t width, float eps, float* y) {
  const float scale = inverse_rms(x, width, eps);
  saga::for_vectors(width, [&](int64_t i, const auto& lanes) SAGA_INLINE {
    lanes.store(y + i, lanes.load(x + i) * scale * lanes.load(weight + i));
  });
}

SAGA_TARGET void norm_backward(const float* dy, const float* dsum, const float* x, const float* weight, int64_t width,
                               float eps, float* dx) {
  const float scale = inverse_rms(x, width, eps);
  const float dot = saga::vector_sum(width, [&](int64_t i, const auto& lanes) SAGA_INLINE {
    return lanes.load(dy + i) * lanes.load(weight + i) * (lanes.load(x + i) * scale);
  });
  const float along = scale * (dot / static_cast<float>(width));
  saga::for_vectors(width, [&](int64_t i, const auto& lanes) SAGA_INLINE {
    __m256 d = (lanes.load(dy + i) * lanes.load(weight + i) - lanes.load(x + i) * along) * scale;
    if (dsum != nullptr) d += lanes.load(dsum + i);
    lanes.store(dx + i, d);
  });
}

SAGA_TARGET void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* y) {
  saga::for_vectors(half, [&](int64_t i, const auto& lanes) SAGA_INLINE {
    const int64_t j = i + half;
    const __m256 first = lanes.load(x + i), second = lanes.load(x + j);
    lanes.store(y + i, first * lanes.load(cos + i) - second * lanes.load(sin + i));
    lanes.store(y + j, second * lanes.load(cos + j) + first * lanes.load(sin + j));
  });
}

SAGA_TARGET void rotate_back(const float* dy, const float* cos, const float* sin, int64_t half, float* dx) {
  saga::for_vectors(half, [&](int64_t i, const auto& lanes) SAGA_INLINE {
    const int64_t j = i + half;
    const __m256 first = lanes.load(dy + i), second = lanes.load(dy + j);
    lanes.store(dx + i, first * lanes.load(cos + i) + second * lanes.load(sin + j));
    lanes.store(dx + j, second * lanes.load(cos + j) - first * lanes.load(sin + i));
  });
}

// From e^-|x|, which cannot overflow, so that both ends keep their relative precision.
SAGA_TARGET inline __m256 sigmoid(__m256 x) {
  const __m256 e = saga::exp(_mm256_or_ps(x, _mm256_set1_ps(-0.0f)));
  return _mm256_blendv_ps(_mm256_set1_ps(1.0f), e, x) / (1.0f + e);
}

SAGA_TARGET void gate(const float* gate_up, int64_t width, float* y) {
  saga::for_vectors(width, [&](int64_t i, const auto& lanes) SAGA_INLINE {
    const __m256 x = lanes.load(gate_up + i);
    lanes.store(y + i, x * sigmoid(x) * lanes.load(gate_up + width + i));
  });
}

SAGA_TARGET void gate_backward(const float* dy, const float* gate_up, int64_t width, float* d) {
  saga::for_vectors(width, [&](int64_t i, const auto& lanes) SAGA_INLINE {
    const __m256 x = lanes.load(gate_up + i), s = sigmoid(x), dys = lanes.load(dy + i) * s;
    lanes.store(d + i, (dys + dys * x * (1.0f - s)) * lanes.load(gate_up + width + i));
    lanes.store(d + width + i, dys * x);
  });
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const int64_t n = count_rows(x), width = x.size(-1);
  const Rows xs(x, n, width), weights(weight, 1, width);
  at::Tensor y = at::empty(x.sizes(), x.options());
  float* const out = y.mutable_data_ptr<float>();
  for_rows(n, width, [&](int64_t i) { norm(xs[i], weights[0], width, eps, out + i * width); });
  return y;
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                                const at::Tensor& weight, double eps) {
  const int64_t n = count_rows(x), width = x.size(-1);
  const Rows xs(x, n, width), residuals(residual, n, width), weights(weight, 1, width);
  at::Tensor total = at::empty(x.sizes(), x.options()), y = at::empty(x.sizes(), x.options());
  float* const sums = total.mutable_data_ptr<float>();
  float* const out = y.mutable_data_ptr<float>();
  for_rows(n, width, [&](int64_t i) {
    float* const sum = sums + i * width;
    add(xs[i], residuals[i], width, sum);
    norm(sum, weights[0], width, eps, out + i * width);
  });
  return {total, y};
}

at::Tensor rms_norm_backward(const at::Tensor& dy, const std::optional<at::Tensor>& dsum, const at::Tensor& x,
                             const at::Tensor& weight, double eps) {
  const int64_t n = count_rows(x), width = x.size(-1);
  const Rows dys(dy, n, width), dsums(dsum, n, width), xs(x, n, width), weights(weight, 1, width);
  at::Tensor dx = at::empty(x.sizes(), x.options());
  float* const out = dx.mutable_data_ptr<float>();
  for_rows(n, width, [&](int64_t i) {
    norm_backward(dys[i], dsums[i], xs[i], weights[0], width, eps, out + i * width);
  });
  return dx;
}

at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                const std::optional<at::Tensor>& weight, double eps) {
  const int64_t tokens = x.size(0), dim = x.size(2), width = x.size(1) * dim;
  const Rows xs(x, tokens, width), coss(cos, tokens, dim), sins(sin, tokens, dim), weights(weight, 1, dim);
  at::Tensor y = at::empty(x.sizes(), x.options());
  float* const out = y.mutable_data_ptr<float>();
  for_rows(tokens, width, [&](int64_t token) {
    for (int64_t head = 0; head < width; head += dim) {
      const float* from = xs[token] + head;
      float* const to = out + token * width + head;
      if (weight) {
        norm(from, weights[0], dim, eps, to);
        from = to;
      }
      rotate(from, coss[token], sins[token], dim / 2, to);
    }
  });
  return y;
}

at::Tensor rope_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x, const at::Tensor& cos,
                         const at::Tensor& sin, const std::optional<at::Tensor>& weight, double eps) {
  const int64_t tokens = dy.size(0), dim = dy.size(2), width = dy.size(1) * dim;
  const Rows dys(dy, tokens, width), xs(x, tokens, width), coss(cos, tokens, dim), sins(sin, tokens, dim),
      weights(weight, 1, dim);
  at::Tensor dx = at::empty(dy.sizes(), dy.options());
  float* const out = dx.mutable_data_ptr<float>();
  for_rows(tokens, width, [&](int64_t token) {
    for (int64_t head = 0; head < width; head += dim) {
      float* const to = out + token * width + head;
      rotate_back(dys[token] + head, coss[token], sins[token], dim / 2, to);
      if (weight && x) norm_backward(to, nullptr, xs[token] + head, weights[0], dim, eps, to);
    }
  });
  return dx;
}

at::Tensor swiglu(const at::Tensor& gate_up) {
  const int64_t n = count_rows(gate_up), width = gate_up.size(-1) / 2;
  const Rows rows(gate_up, n, 2 * width);
  at::DimVector sizes(gate_up.sizes());
  sizes.back() = width;
  at::Tensor y = at::empty(sizes, gate_up.options());
  float* const out = y.mutable_data_ptr<float>();
  for_rows(n, 2 * width, [&](int64_t i) { gate(rows[i], width, out + i * width); });
  return y;
}

at::Tensor swiglu_backward(const at::Tensor& dy, const at::Tensor& gate_up) {
  const int64_t n = count_rows(gate_up), width = gate_up.size(-1) / 2;
  const Rows dys(dy, n, width), rows(gate_up, n, 2 * width);
  at::Tensor d = at::empty(gate_up.sizes(), gate_up.options());
  float* const out = d.mutable_data_ptr<float>();
  for_rows(n, 2 * width, [&](int64_t i) { gate_backward(dys[i], rows[i], width, out + i * 2 * width); });
  return d;
}

}  // namespace

#endif

TORCH_LIBRARY_FRAGMENT(saga_kernels, library) {
  library.def("has_avx2() -> bool", &saga::has_avx2);
#ifdef SAGA_AVX2
  const auto def = [&](const char* schema, auto kernel) {
    library.def(schema, torch::dispatch(c10::DispatchKey::CPU, kernel));
  };
  def("rms_norm_cpu(Tensor x, Tensor weight, float eps) -> Tensor", &rms_norm);
  def("add_rms_norm_cpu(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)", &add_rms_norm);
  def("rms_norm_backward_cpu(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, float eps) -> Tensor",
      &rms_norm_backward);
  def("rope_cpu(Tensor x, Tensor cos, Tensor sin, Tensor? weight, float eps) -> Tensor", &rope);
  def("rope_backward_cpu(Tensor dy, Tensor? x, Tensor cos, Tensor sin, Tensor? weight, float eps) -> Tensor",
      &rope_backward);
  def("swiglu_cpu(Tensor gate_up) -> Tensor", &swiglu);
  def("swiglu_backward_cpu(Tensor dy, Tensor gate_up) -> Tensor", &swiglu_backward);
#endif
}
