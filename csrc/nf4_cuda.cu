// y = x @ W.T for few rows of x, with NF4 weights in bitsandbytes' own layout, decoded in registers for tensor cores.
//
// A decode step reads every weight for few rows, so the time per weight must be close to that of reading half a byte.
// Weights are copied to shared memory ahead of use. A table there maps a packed byte to its two codes, with a bank for
// each lane: selecting the codes by permutations takes three times as many instructions. The absmax of a block of 64
// scales the block's sums, which are fewer than its weights.
//
// Codes are rounded once, to bfloat16 or float16, after a scaling that minimises the error, and absmax stays float32.
// So the products are nearer to NF4's own values (0.06 % in bfloat16) than those of weights dequantised to bfloat16
// (0.17 %).
//
// In mma.m16n8k16 lane 4g + t holds the inner positions 2t, 2t + 1, 2t + 8, 2t + 9. The order of a sum is free, so step
// s of a block uses positions 16t + 4s to 16t + 4s + 3 of both factors: per lane eight contiguous bytes of W, sixteen
// of x.

#include "nf4.h"

#include <torch/library.h>

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

namespace {

using namespace saga;

constexpr int warps = 8, threads = warp * warps;
constexpr int strip = 32;  // rows of W per warp: two tiles of 16, so that x is read once for both
constexpr int chunk = 2;   // blocks of a strip that are copied together
constexpr int max_rows = 128, max_parts = 16;

// Shared memory: the table, for each packed byte a pair of codes per lane; code2; each warp's scales of two chunks; and
// each warp's copies of chunks, whose number is the kernel's `slots`.
constexpr int scales_bytes = 2 * chunk * strip * 4, row_bytes = chunk * block / 2, chunk_bytes = strip * row_bytes;
constexpr int fixed_bytes = table_bytes + code2_bytes + warps * scales_bytes;

__constant__ float quantiles[16] = {NF4_QUANTILES};

template <class T>
struct Number;

template <>
struct Number<__nv_bfloat16> {
  static constexpr float code_scale = code_scale_bfloat16;
  static __device__ uint32_t pair(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  }
  static __device__ __nv_bfloat16 of(float value) { return __float2bfloat16_rn(value); }
  static __device__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Number<__half> {
  static constexpr float code_scale = code_scale_float16;
  static __device__ uint32_t pair(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  }
  static __device__ __half of(float value) { return __float2half_rn(value); }
  static __device__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

__device__ void copy_16(const void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}

__device__ void commit() { asm volatile("cp.async.commit_group;"); }

// Waits until at most the last `pending` groups of this thread's copies are in flight.
template <int pending>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// A warp's iteration over W: copies of chunks to shared memory and, with one row per lane, prefetches of the scales'
// parts. Rows past the end repeat the last one; they are computed and not stored.
struct Stream {
  const Weight& w;
  uint8_t* copies;
  float* scales;
  const float* code2;
  int lane;
  uint32_t codes;
  float absmax2, offset;

  // A row of a chunk is two runs of 32 bytes, swapped in every other pair of rows: so lanes use all 32 banks twice.
  __device__ static int place(int row, int j) { return row * row_bytes + ((j ^ row / 2 % 2) * (block / 2)); }

  __device__ void copy(int first_row, int at, int slot) const {
#pragma unroll
    for (int i = 0; i < chunk_bytes / 16; i += warp) {
      const int row = (i + lane) / 4, piece = (i + lane) % 4;
      const int64_t from = static_cast<int64_t>(min(first_row + row, w.out - 1)) * (w.in / 2) + at * row_bytes;
      copy_16(copies + slot * chunk_bytes + place(row, piece / 2) + piece % 2 * 16, w.packed + from + piece * 16);
    }
  }

  __device__ void prefetch_scales(int first_row, int at) {
    const int first = min(first_row + lane, w.out - 1) * (w.in / block) + at * chunk, group = first / nested;
    codes = __ldg(reinterpret_cast<const uint16_t*>(w.absmax + first));
    absmax2 = __ldg(w.absmax2 + group);
    offset = __ldg(w.offset + group * w.offset_step);
  }

  // Stores the prefetched scales in half `half`: per block those of rows g, g + 8, g + 16 and g + 24 side by side.
  template <class T>
  __device__ void store_scales(int half) const {
#pragma unroll
    for (int j = 0; j < chunk; ++j)
      scales[(half * chunk + j) * strip + lane % 8 * 4 + lane / 8] =
          code2[codes >> (8 * j) & 255] * absmax2 + offset * (1.f / Number<T>::code_scale);
  }
};

// A lane's decoded weights of a block: of two tiles the factor of each step, and the scale of four rows.
struct Decoded {
  uint32_t a[2][4][4];
  alignas(16) float scale[4];

  __device__ static Decoded of(const Stream& stream, int slot, int half, int j, const uint8_t* table) {
    const int lane = stream.lane, g = lane / 4, t = lane % 4;
    Decoded found;
    *reinterpret_cast<float4*>(found.scale) =
        *reinterpret_cast<const float4*>(stream.scales + (half * chunk + j) * strip + g * 4);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint2 bytes = *reinterpret_cast<const uint2*>(stream.copies + slot * chunk_bytes +
                                                          Stream::place(8 * r + g, j) + 8 * t);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint32_t word = s < 2 ? bytes.x : bytes.y;
        found.a[r / 2][s][r % 2] = look_up(table, word, 4 * lane, s % 2 * 2);
        found.a[r / 2][s][r % 2 + 2] = look_up(table, word, 4 * lane, s % 2 * 2 + 1);
      }
    }
    return found;
  }

  // sums += scale * (a @ b), of 16 numbers of a row of x.
  template <class T>
  __device__ void multiply(float (&sums)[4], int m, const uint4& left, const uint4& right) const {
    float d[4] = {};
    Number<T>::multiply(d, a[m][0], left.x, left.y);
    Number<T>::multiply(d, a[m][1], left.z, left.w);
    Number<T>::multiply(d, a[m][2], right.x, right.y);
    Number<T>::multiply(d, a[m][3], right.z, right.w);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += scale[2 * m + i / 2] * d[i];
  }
};

// Fills the table, one packed byte per thread with a copy for each lane, and code2.
template <class T>
__device__ void fill(uint8_t* shared, const Weight& w) {
  const int byte = threadIdx.x;
  const uint32_t both = Number<T>::pair(quantiles[byte / 16] * Number<T>::code_scale,
                                        quantiles[byte % 16] * Number<T>::code_scale);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    reinterpret_cast<uint4*>(shared + byte * table_row)[(i + byte) % 8] = make_uint4(both, both, both, both);
  reinterpret_cast<float*>(shared + table_bytes)[byte] = w.code2[byte] * (1.f / Number<T>::code_scale);
}

// The first chunk of part y of gridDim.y.
__device__ int part(int chunks, int y) { return static_cast<int>(static_cast<int64_t>(chunks) * y / gridDim.y); }

// With several parts, writes float32 partial sums for the reduction; else y.
template <class T>
__device__ void store(T* y, float* parts, int rows, int out, int row_of_x, int row_of_w, float value) {
  if (row_of_x >= rows || row_of_w >= out) return;
  const int64_t to = static_cast<int64_t>(row_of_x) * out + row_of_w;
  if (gridDim.y > 1)
    parts[static_cast<int64_t>(blockIdx.y) * rows * out + to] = value;
  else
    y[to] = Number<T>::of(value);
}

// A warp's stream, its memory behind `shared`'s table and code2, `slots` copies of chunks at a time.
template <int slots>
__device__ Stream stream_of(const Weight& w, uint8_t* shared) {
  const int index = threadIdx.x / warp;
  const float* code2 = reinterpret_cast<const float*>(shared + table_bytes);
  float* scales = reinterpret_cast<float*>(shared + table_bytes + code2_bytes + index * scales_bytes);
  return {w, shared + fixed_bytes + index * slots * chunk_bytes, scales, code2, static_cast<int>(threadIdx.x % warp)};
}

// Up to 16 rows: bound by memory, so the warps of a program share the inner dimension of one run of W's rows, and go on
// to the next run with its first chunks in flight. tiles: of 8 rows of x. along_out: warps along W's rows.
template <class T, int tiles, int along_out, int slots>
__global__ void __launch_bounds__(threads, 2)
    few_rows(const T* __restrict__ x, const Weight w, T* __restrict__ y, float* __restrict__ parts, int rows) {
  constexpr int along_in = warps / along_out, height = along_out * strip;
  constexpr int pitch = height + 4;  // padded by four, so that the lanes of a warp use all 32 banks
  extern __shared__ __align__(16) uint8_t shared[];
  float* partial_sums = reinterpret_cast<float*>(shared + fixed_bytes + warps * slots * chunk_bytes);
  Stream stream = stream_of<slots>(w, shared);
  const int lane = stream.lane, g = lane / 4, t = lane % 4;
  const int warp_out = threadIdx.x / warp % along_out, warp_in = threadIdx.x / warp / along_out;
  const int chunks = w.in / (block * chunk), runs = (w.out + height - 1) / height;
  const int begin = part(chunks, blockIdx.y) + warp_in, end = part(chunks, blockIdx.y + 1);

  // The current run and chunk, and the next ones of this warp.
  struct Place {
    int run, at;
  };
  const auto after = [&](const Place& place) {
    return place.at + along_in < end ? Place{place.run, place.at + along_in}
                                     : Place{place.run + static_cast<int>(gridDim.x), begin};
  };
  const auto first_row = [&](const Place& place) { return place.run * height + warp_out * strip; };
  Place ahead{begin < end ? static_cast<int>(blockIdx.x) : runs, begin};
  const auto copy_next = [&](int slot) {
    if (ahead.run < runs) {
      stream.copy(first_row(ahead), ahead.at, slot);
      ahead = after(ahead);
    }
    commit();
  };
  if (ahead.run < runs) stream.prefetch_scales(first_row(ahead), ahead.at);
#pragma unroll
  for (int slot = 0; slot < slots - 1; ++slot) copy_next(slot);
  fill<T>(shared, w);
  __syncthreads();

  int slot = 0, half = 0;
  for (int run = blockIdx.x; run < runs; run += gridDim.x) {
    float sums[2][tiles][4] = {};
    for (int at = begin; at < end; at += along_in) {
      wait<slots - 2>();
      __syncwarp();  // all lanes' copies are complete, and the chunk before is no longer used
      stream.store_scales<T>(half);
      if (const Place next = after({run, at}); next.run < runs) stream.prefetch_scales(first_row(next), next.at);
      copy_next(slot == 0 ? slots - 1 : slot - 1);
      __syncwarp();
#pragma unroll
      for (int j = 0; j < chunk; ++j) {
        const Decoded weights = Decoded::of(stream, slot, half, j, shared);
#pragma unroll
        for (int n = 0; n < tiles; ++n) {
          const T* from = x + min(8 * n + g, rows - 1) * w.in + (at * chunk + j) * block + 16 * t;
          const uint4 left = __ldg(reinterpret_cast<const uint4*>(from));
          const uint4 right = __ldg(reinterpret_cast<const uint4*>(from) + 1);
#pragma unroll
          for (int m = 0; m < 2; ++m) weights.template multiply<T>(sums[m][n], m, left, right);
        }
      }
      slot = slot == slots - 1 ? 0 : slot + 1;
      half ^= 1;
    }

    // The warps along the inner dimension store their sums in shared memory, and all warps add them up.
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < tiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          partial_sums[(warp_in * tiles * 8 + 8 * n + 2 * t + i % 2) * pitch + warp_out * strip + 16 * m + i / 2 * 8 +
                       g] = sums[m][n][i];
    __syncthreads();
    for (int i = threadIdx.x; i < tiles * 8 * height; i += threads) {
      float sum = 0.f;
#pragma unroll
      for (int k = 0; k < along_in; ++k) sum += partial_sums[(k * tiles * 8 + i / height) * pitch + i % height];
      store(y, parts, rows, w.out, i / height, run * height + i % height, sum);
    }
  }
}

// More rows: bound by tensor cores, so each warp has its own rows of W, and all of them read x from shared memory.
// During a block's products the next block's columns of x and the next chunk of W are copied.
template <class T, int tiles>
__global__ void __launch_bounds__(threads, tiles <= 6 ? 2 : 1)
    more_rows(const T* __restrict__ x, const Weight w, T* __restrict__ y, float* __restrict__ parts, int rows) {
  constexpr int line_bytes = block * 2, tile_bytes = tiles * 8 * line_bytes;
  extern __shared__ __align__(16) uint8_t shared[];
  uint8_t* columns = shared + fixed_bytes + warps * 2 * chunk_bytes;
  Stream stream = stream_of<2>(w, shared);
  const int lane = stream.lane, g = lane / 4, t = lane % 4;
  const int first_row = (blockIdx.x * warps + threadIdx.x / warp) * strip;
  const int chunks = w.in / (block * chunk), begin = part(chunks, blockIdx.y), end = part(chunks, blockIdx.y + 1);

  // Sixteen bytes are at their place in the line xor the line, so that eight lanes use all 32 banks.
  const auto copy_columns = [&](int at, int j) {
#pragma unroll
    for (int i = 0; i < tiles * 8 * 8; i += threads) {
      const int piece = (i + threadIdx.x) % 8, line = (i + threadIdx.x) / 8;
      if (tiles * 8 * 8 % threads && line >= tiles * 8) break;
      copy_16(columns + j * tile_bytes + line * line_bytes + (piece ^ line % 8) * 16,
              x + min(line, rows - 1) * w.in + (at * chunk + j) * block + 8 * piece);
    }
  };

  float sums[2][tiles][4] = {};
  const auto multiply = [&](int slot, int half, int j) {
    const Decoded weights = Decoded::of(stream, slot, half, j, shared);
    const uint8_t* tile = columns + j * tile_bytes + g * line_bytes;
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
      const uint4 left = *reinterpret_cast<const uint4*>(tile + n * 8 * line_bytes + (2 * t ^ g) * 16);
      const uint4 right = *reinterpret_cast<const uint4*>(tile + n * 8 * line_bytes + (2 * t + 1 ^ g) * 16);
#pragma unroll
      for (int m = 0; m < 2; ++m) weights.template multiply<T>(sums[m][n], m, left, right);
    }
  };

  if (begin < end) {
    copy_columns(begin, 0);
    stream.copy(first_row, begin, 0);
    stream.prefetch_scales(first_row, begin);
  }
  commit();
  fill<T>(shared, w);

  for (int at = begin, half = 0; at < end; ++at, half ^= 1) {
    wait<0>();
    __syncthreads();  // all threads' copies are complete, and the memory of the next ones is no longer used
    stream.store_scales<T>(half);
    copy_columns(at, 1);
    commit();
    if (at + 1 < end) {
      stream.copy(first_row, at + 1, half ^ 1);
      stream.prefetch_scales(first_row, at + 1);
    }
    commit();
    __syncwarp();
    multiply(half, half, 0);

    wait<1>();  // W's next chunk may still be in flight
    __syncthreads();
    if (at + 1 < end) copy_columns(at + 1, 0);
    commit();
    multiply(half, half, 1);
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < tiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store(y, parts, rows, w.out, 8 * n + 2 * t + i % 2, first_row + 16 * m + i / 2 * 8 + g, sums[m][n][i]);
}

// y = the sum over parts, first to last; four numbers a thread.
template <class T>
__global__ void reduce_parts(const float4* __restrict__ parts, T* __restrict__ y, int count, int64_t quads) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= quads) return;
  float4 sum = parts[i];
  for (int part = 1; part < count; ++part) {
    const float4 more = parts[part * quads + i];
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  }
  reinterpret_cast<uint2*>(y)[i] = make_uint2(Number<T>::pair(sum.x, sum.y), Number<T>::pair(sum.z, sum.w));
}

// The number of parts of the inner dimension with the least estimated time, in nanoseconds: of decoding W on a
// multiprocessor, a program's overhead, and the reduction and its launch.
int parts_of(int programs, int bytes, int chunks, double rate, int multiprocessors) {
  const auto estimate = [&](int parts) {
    const int waves = (programs * parts + multiprocessors - 1) / multiprocessors;
    return waves * (bytes / rate / parts + 800) + (parts > 1 ? 3000 + 100 * parts : 0);
  };
  int best = 1;
  for (int parts = 2; parts <= std::min(max_parts, chunks); ++parts)
    if (estimate(parts) < estimate(best)) best = parts;
  return best;
}

// height: rows of W per program. at_once: programs that fit on a multiprocessor, which loop over further runs.
template <class T>
void launch(void (*kernel)(const T*, Weight, T*, float*, int), const at::Tensor& x, const Weight& w, at::Tensor& y,
            int height, int bytes, double rate, int at_once) {
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const int runs = (w.out + height - 1) / height, chunks = w.in / (block * chunk), rows = static_cast<int>(x.size(0));
  const int multiprocessors = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  const int count = parts_of(runs, height * w.in / 2, chunks, rate, multiprocessors);
  const int programs = at_once ? std::min(runs, std::max(1, at_once * multiprocessors / count)) : runs;
  const at::Tensor parts =
      count == 1 ? at::Tensor() : at::empty({count, rows, w.out}, x.options().dtype(at::kFloat));
  const auto stream = at::cuda::getCurrentCUDAStream();
  T* to = static_cast<T*>(y.mutable_data_ptr());
  kernel<<<dim3(programs, count), threads, bytes, stream>>>(static_cast<const T*>(x.const_data_ptr()), w, to,
                                                            count == 1 ? nullptr : parts.mutable_data_ptr<float>(),
                                                            rows);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (count == 1) return;
  const int64_t quads = y.numel() / 4;
  reduce_parts<T><<<static_cast<unsigned>((quads + 127) / 128), 128, 0, stream>>>(
      reinterpret_cast<const float4*>(parts.const_data_ptr<float>()), to, count, quads);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T, int tiles, int along_out>
void launch_few_rows(const at::Tensor& x, const Weight& w, at::Tensor& y, double rate) {
  constexpr int slots = tiles == 1 ? 3 : 2, height = along_out * strip;
  constexpr int partial_sums = warps / along_out * tiles * 8 * (height + 4) * 4;
  const int bytes = fixed_bytes + warps * slots * chunk_bytes + partial_sums;
  launch<T>(few_rows<T, tiles, along_out, slots>, x, w, y, height, bytes, rate, 2);
}

template <class T, int tiles>
void launch_more_rows(const at::Tensor& x, const Weight& w, at::Tensor& y, double rate) {
  constexpr int bytes = fixed_bytes + warps * 2 * chunk_bytes + 2 * tiles * 8 * block * 2;
  launch<T>(more_rows<T, tiles>, x, w, y, warps * strip, bytes, rate, 0);
}

// The rates are bytes of W per nanosecond and multiprocessor.
template <class T>
void dispatch(const at::Tensor& x, const Weight& w, at::Tensor& y) {
  const int64_t rows = x.size(0);
  if (rows <= 8) return launch_few_rows<T, 1, 1>(x, w, y, 30);
  if (rows <= 16) return launch_few_rows<T, 2, 2>(x, w, y, 25);
  if (rows <= 32) return launch_more_rows<T, 4>(x, w, y, 22);
  if (rows <= 48) return launch_more_rows<T, 6>(x, w, y, 19);
  if (rows <= 64) return launch_more_rows<T, 8>(x, w, y, 16);
  if (rows <= 96) return launch_more_rows<T, 12>(x, w, y, 12);
  return launch_more_rows<T, 16>(x, w, y, 9);
}

at::Tensor nf4_matmul_few(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                          const at::Tensor& code2, const at::Tensor& absmax2, const at::Tensor& offset,
                          int64_t out_features) {
  const int64_t rows = x.size(0), in_features = x.size(1);
  TORCH_CHECK_VALUE(rows > 0 && rows <= max_rows, "x: got ", rows, " rows, accepted are 1 to ", max_rows);
  TORCH_CHECK_VALUE(in_features % (chunk * block) == 0 && out_features % 4 == 0,
                    "packed: got (out, in) of ", out_features, ", ", in_features,
                    ", accepted are multiples of 4 and ", chunk * block);
  return matmul(x, packed, absmax, code2, absmax2, offset, out_features,
                [](auto type, const at::Tensor& x, const Weight& w, at::Tensor& y) {
                  dispatch<decltype(type)>(x, w, y);
                });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(saga_kernels, library) {
  library.def(
      "nf4_matmul_few(Tensor x, Tensor packed, Tensor absmax, Tensor code2, Tensor absmax2, Tensor offset, "
      "int out_features) -> Tensor");
}

TORCH_LIBRARY_IMPL(saga_kernels, CUDA, library) { library.impl("nf4_matmul_few", &nf4_matmul_few); }
