// Batched group advantage: the schema, and the kernel for CPUs. advantage_cuda.cu holds the one for GPUs.

#include <Python.h>
#include <torch/library.h>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <tuple>

namespace {

// rewards (pairs, G) float32 -> advantages (pairs, G) float32, contributes (pairs,) bool, count () int64.
std::tuple<at::Tensor, at::Tensor, at::Tensor> group_advantage(const at::Tensor& rewards, double eps, bool population) {
  const int64_t pairs = rewards.size(0), group = rewards.size(1);
  const at::Tensor contiguous = rewards.contiguous();
  at::Tensor advantages = at::zeros_like(contiguous);
  at::Tensor contributes = at::empty({pairs}, rewards.options().dtype(at::kBool));
  const float* const r = contiguous.const_data_ptr<float>();
  float* const a = advantages.mutable_data_ptr<float>();
  bool* const mask = contributes.mutable_data_ptr<bool>();

  for (int64_t pair = 0; pair < pairs; ++pair) {
    const float* const row = r + pair * group;
    double sum = 0;
    float low = row[0], high = row[0];
    for (int64_t g = 0; g < group; ++g) {
      TORCH_CHECK_VALUE(std::isfinite(row[g]), "rewards: got ", row[g], " at (", pair, ", ", g,
                        "), accepted are finite values");
      sum += row[g];
      low = std::min(low, row[g]);
      high = std::max(high, row[g]);
    }
    mask[pair] = low != high;  // exact where std == 0 is not: rounding leaves equal rewards a tiny spread
    if (low == high) continue;
    const double mean = sum / group;
    double squares = 0;
    for (int64_t g = 0; g < group; ++g) squares += (row[g] - mean) * (row[g] - mean);
    const double scale = 1 / (std::sqrt(squares / (population ? group : group - 1)) + eps);
    for (int64_t g = 0; g < group; ++g) a[pair * group + g] = static_cast<float>((row[g] - mean) * scale);
  }

  const int64_t count = std::count(mask, mask + pairs, true);
  return {advantages, contributes, at::scalar_tensor(count, rewards.options().dtype(at::kLong))};
}

}  // namespace

TORCH_LIBRARY(saga_kernels, library) {
  library.def("group_advantage(Tensor rewards, float eps, bool population) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(saga_kernels, CPU, library) { library.impl("group_advantage", &group_advantage); }

// Python needs a module to import; loading it runs the registrations above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
