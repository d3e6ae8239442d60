// NF4 as bitsandbytes lays it out: what the CUDA kernels, and tests on a CPU, share.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define NF4_SHARED __host__ __device__
#define NF4_DEVICE __device__ __forceinline__
#else
#define NF4_SHARED
#define NF4_DEVICE inline
#endif

namespace saga {

constexpr int warp = 32;
constexpr int block = 64;    // weights that share an absmax
constexpr int nested = 256;  // blocks that share an absmax of their own

#define NF4_QUANTILES                                                                                   \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,      \
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,   \
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,            \
      0.7229568362236023f, 1.0f

// Codes are scaled before they are rounded: of 20,000 in 1 to 2, the scales with the least rounding error.
constexpr float code_scale_bfloat16 = 1.437f, code_scale_float16 = 1.f;

// A nested (out, in) `saga_kernels.NF4Weight`; one offset (offset_step 0), or one per group (offset_step 1).
struct Weight {
  const uint8_t *packed, *absmax;
  const float *code2, *absmax2, *offset;
  int offset_step, out, in;
};

// Of the table in shared memory: a row for each packed byte, with its pair of codes for each lane, and so in its bank;
// and of the copy of code2 behind it.
constexpr int table_row = warp * 4, table_bytes = 256 * table_row, code2_bytes = 256 * 4;

#ifdef __CUDACC__
// The two codes of byte i of `word`, the first weight in the low half. at: four times the lane.
__device__ __forceinline__ uint32_t look_up(const uint8_t* table, uint32_t word, uint32_t at, int i) {
  const uint32_t row = i == 0 ? word << 7 : word >> (8 * i - 7);
  uint32_t place;  // row & 255 * table_row | at, in the one instruction that it takes
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(place) : "r"(row), "n"(255 * table_row), "r"(at));
  return *reinterpret_cast<const uint32_t*>(table + place);
}

// y = x Wᵀ on x's device: dispatch(T{}, x, w, y) launches for T, the type of x, which it gets contiguous.
template <class Dispatch>
at::Tensor matmul(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax, const at::Tensor& code2,
                  const at::Tensor& absmax2, const at::Tensor& offset, int64_t out_features, Dispatch dispatch) {
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor contiguous = x.contiguous();
  const Weight w{packed.const_data_ptr<uint8_t>(), absmax.const_data_ptr<uint8_t>(), code2.const_data_ptr<float>(),
                 absmax2.const_data_ptr<float>(),  offset.const_data_ptr<float>(),   offset.dim() ? 1 : 0,
                 static_cast<int>(out_features),   static_cast<int>(x.size(1))};
  at::Tensor y = at::empty({x.size(0), out_features}, x.options());
  if (x.scalar_type() == at::kBFloat16)
    dispatch(__nv_bfloat16{}, contiguous, w, y);
  else
    dispatch(__half{}, contiguous, w, y);
  return y;
}
#endif

NF4_SHARED constexpr int smaller(int a, int b) { return a < b ? a : b; }

}  // namespace saga
