// Batched group advantage for GPUs: one warp a group, in one launch and without a host sync. Schema: advantage.cpp.

#include <torch/library.h>

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <tuple>

namespace {

constexpr int warp = 32, max_warps = 32, max_group = 1024, values_per_lane = max_group / warp;

template <typename Combine>
__device__ float across_warp(float value, Combine combine) {
#pragma unroll
  for (int distance = warp / 2; distance > 0; distance /= 2)  // xor keeps the order fixed: every lane, every run agrees
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// A single block strides over all groups. The op is launch-bound at every real size, and one block can count its
// contributing groups in shared memory: no atomics, and no second launch to zero a counter.
template <int values>
__global__ void group_advantage_kernel(const float* __restrict__ rewards, float* __restrict__ advantages,
                                       bool* __restrict__ contributes, int64_t* __restrict__ count, int64_t pairs,
                                       int group, float eps, float degrees) {
  const auto add = [](float x, float y) { return x + y; };
  const auto minimum = [](float x, float y) { return fminf(x, y); };
  const auto maximum = [](float x, float y) { return fmaxf(x, y); };
  const int lane = threadIdx.x % warp, row = threadIdx.x / warp, warps = blockDim.x / warp;
  __shared__ int64_t warp_counts[max_warps];

  int64_t warp_count = 0;
  for (int64_t pair = row; pair < pairs; pair += warps) {
    float r[values], sum = 0.f, low = INFINITY, high = -INFINITY;
#pragma unroll
    for (int i = 0; i < values; ++i) {
      const int g = i * warp + lane;
      if (g >= group) break;
      r[i] = rewards[pair * group + g];
      sum += r[i];
      low = fminf(low, r[i]);
      high = fmaxf(high, r[i]);
    }
    const float mean = across_warp(sum, add) / group;
    const bool differs = across_warp(low, minimum) != across_warp(high, maximum);
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < values; ++i) {
      if (i * warp + lane >= group) break;
      squares += (r[i] - mean) * (r[i] - mean);
    }
    const float scale = differs ? 1.f / (sqrtf(across_warp(squares, add) / degrees) + eps) : 0.f;
#pragma unroll
    for (int i = 0; i < values; ++i) {
      const int g = i * warp + lane;
      if (g >= group) break;
      advantages[pair * group + g] = differs ? (r[i] - mean) * scale : 0.f;
    }
    if (lane == 0) contributes[pair] = differs;
    warp_count += differs;
  }

  if (lane == 0) warp_counts[row] = warp_count;
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t total = 0;
    for (int w = 0; w < warps; ++w) total += warp_counts[w];
    *count = total;
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_advantage(const at::Tensor& rewards, double eps, bool population) {
  const int64_t pairs = rewards.size(0), group = rewards.size(1);
  TORCH_CHECK_VALUE(group <= max_group, "rewards: got groups of ", group, ", accepted are at most ", max_group,
                    " on a GPU");
  const c10::cuda::CUDAGuard guard(rewards.device());
  const at::Tensor contiguous = rewards.contiguous();
  at::Tensor advantages = at::empty_like(contiguous);
  at::Tensor contributes = at::empty({pairs}, rewards.options().dtype(at::kBool));
  at::Tensor count = at::empty({}, rewards.options().dtype(at::kLong));
  const float degrees = static_cast<float>(population ? group : std::max<int64_t>(1, group - 1));
  const int threads = warp * static_cast<int>(std::clamp<int64_t>(pairs, 1, max_warps));

  // A lane holds its share of the group in registers; short groups, the rule, get the kernel that holds one value.
  const auto kernel = group <= warp ? group_advantage_kernel<1>
                      : group <= 8 * warp ? group_advantage_kernel<8>
                                          : group_advantage_kernel<values_per_lane>;
  kernel<<<1, threads, 0, at::cuda::getCurrentCUDAStream()>>>(
      contiguous.const_data_ptr<float>(), advantages.mutable_data_ptr<float>(), contributes.mutable_data_ptr<bool>(),
      count.mutable_data_ptr<int64_t>(), pairs, static_cast<int>(group), static_cast<float>(eps), degrees);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {advantages, contributes, count};
}

}  // namespace

TORCH_LIBRARY_IMPL(saga_kernels, CUDA, library) { library.impl("group_advantage", &group_advantage); }
