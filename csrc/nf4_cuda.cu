// Few rows times NF4 weights, decoded on their way into tensor cores: y = x @ W.T in bitsandbytes' own layout.
//
// A decode step reads every weight for a handful of rows, so a weight may cost little more than its half byte. What
// bounds it is the integer pipe (byte permutations run at half rate), not memory: so a packed byte is looked up as the
// two codes it stands for, in a table that every lane has its own bank of, at one permutation and one load a byte. The
// absmax of a block of 64 does not touch the weights: it scales the block's sums, which are fewer.
//
// Codes are rounded once, to bfloat16 or float16, after a scaling that makes the error least, and absmax stays float32.
// So the products are nearer to NF4's own values (0.06 % in bfloat16) than those of weights dequantised to bfloat16
// (0.17 %).
//
// mma.m16n8k16 wants of lane 4g + t the inner positions 2t, 2t + 1, 2t + 8, 2t + 9. A sum has no order, so step s of a
// block gives it 16t + 4s to 16t + 4s + 3 of both factors: eight contiguous bytes of W a lane, sixteen numbers of x.

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

constexpr int warp = 32, warps = 8, threads = warp * warps;
constexpr int block = 64;      // weights that share an absmax
constexpr int nested = 256;    // blocks that share an absmax of their own
constexpr int strip = 32;      // rows of W a warp takes: two tiles of 16, so that x is read once for both
constexpr int table_row = 256; // bytes between two packed bytes' pairs of codes; half of it holds a copy a lane
constexpr int table_bytes = 256 * table_row;
constexpr int max_rows = 128, max_parts = 16;

__constant__ float quantiles[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

template <class T>
struct Number;

template <>
struct Number<__nv_bfloat16> {
  static constexpr float stretch = 1.437f;  // of 20,000 between 1 and 2 the one whose codes round with least error
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
  static constexpr float stretch = 1.f;
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

// An (out, in) weight as `saga_kernels.NF4Weight` has it, nested; its offset is one, or one a group (offset_step 1).
struct Weight {
  const uint8_t *packed, *absmax;
  const float *code2, *absmax2, *offset;
  int offset_step, out, in;
};

// `chunk` blocks of a lane's four rows of W on their way: eight bytes of each, the codes of absmax, and their scale.
template <int chunk>
struct Ahead {
  uint2 bytes[4][chunk];
  uint32_t codes[4];
  float absmax2[4], offset[4];

  __device__ void load(const Weight& w, const int (&row)[4], int first, int t) {
    const int blocks = w.in / block;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int at = row[r] * blocks + first * chunk;
      const uint8_t* packed = w.packed + static_cast<int64_t>(at) * (block / 2) + 8 * t;
#pragma unroll
      for (int j = 0; j < chunk; ++j)  // each byte is read once: it need not stay in a cache
        asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                     : "=r"(bytes[r][j].x), "=r"(bytes[r][j].y)
                     : "l"(packed + j * (block / 2)));
      codes[r] = chunk == 4   ? __ldg(reinterpret_cast<const uint32_t*>(w.absmax + at))
                 : chunk == 2 ? __ldg(reinterpret_cast<const uint16_t*>(w.absmax + at))
                              : __ldg(w.absmax + at);
      const int group = at / nested;
      absmax2[r] = __ldg(w.absmax2 + group);
      offset[r] = __ldg(w.offset + group * w.offset_step);
    }
  }
};

// The two codes of byte i of `word`, the first weight in the low half. at: four times the lane.
__device__ uint32_t look_up(const uint8_t* table, uint32_t word, uint32_t at, int i) {
  return *reinterpret_cast<const uint32_t*>(table + __byte_perm(word, at, 0x5504 | i << 4));
}

// A block's weights of a lane, looked up: of two tiles the factor of each step, and the scale of four rows.
struct Decoded {
  uint32_t a[2][4][4];
  float scale[4];

  template <class T, int chunk>
  __device__ static Decoded of(const Ahead<chunk>& now, int j, const uint8_t* table, const float* code2, int lane) {
    Decoded found;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      found.scale[r] =
          code2[now.codes[r] >> (8 * j) & 255] * now.absmax2[r] + now.offset[r] * (1.f / Number<T>::stretch);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint32_t word = s < 2 ? now.bytes[r][j].x : now.bytes[r][j].y;
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

// The table, a packed byte a thread, which stands there once for each lane; and code2.
template <class T>
__device__ void fill(uint8_t* table, float* code2, const Weight& w) {
  const int byte = threadIdx.x;
  const uint32_t both = Number<T>::pair(quantiles[byte / 16] * Number<T>::stretch,
                                        quantiles[byte % 16] * Number<T>::stretch);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    reinterpret_cast<uint4*>(table + byte * table_row)[(i + byte) % 8] = make_uint4(both, both, both, both);
  code2[byte] = w.code2[byte] * (1.f / Number<T>::stretch);
}

// The part of `chunks` that blockIdx.y has of gridDim.y: where it begins, or the next begins.
__device__ int part(int chunks, int y) { return static_cast<int>(static_cast<int64_t>(chunks) * y / gridDim.y); }

// Where there are parts they are float32, to be added up; else y is written.
template <class T>
__device__ void store(T* y, float* parts, int rows, int out, int row_of_x, int row_of_w, float value) {
  if (row_of_x >= rows || row_of_w >= out) return;
  const int64_t to = static_cast<int64_t>(row_of_x) * out + row_of_w;
  if (gridDim.y > 1)
    parts[static_cast<int64_t>(blockIdx.y) * rows * out + to] = value;
  else
    y[to] = Number<T>::of(value);
}

// Up to 16 rows: bound by memory, so the warps of a program share the inner dimension of one run of W's rows, and go on
// to the next run with its first bytes on their way. tiles: of 8 rows of x. along_out: warps along W's rows.
template <class T, int tiles, int along_out, int chunk>
__global__ void __launch_bounds__(threads, tiles == 1 ? 2 : 1)
    few_rows(const T* __restrict__ x, const Weight w, T* __restrict__ y, float* __restrict__ parts, int rows) {
  constexpr int along_in = warps / along_out, height = along_out * strip;
  constexpr int pitch = height + 4;  // four more, and the lanes of a warp meet 32 banks
  extern __shared__ __align__(16) uint8_t shared[];
  float* code2 = reinterpret_cast<float*>(shared + table_bytes);
  float* laid = code2 + 256;
  const int lane = threadIdx.x % warp, g = lane / 4, t = lane % 4;
  const int warp_out = threadIdx.x / warp % along_out, warp_in = threadIdx.x / warp / along_out;
  const int chunks = w.in / (block * chunk), runs = (w.out + height - 1) / height;
  const int begin = part(chunks, blockIdx.y) + warp_in, end = part(chunks, blockIdx.y + 1);

  int row[4];  // rows past the end are the last one again, computed and not stored
  Ahead<chunk> next;
  const auto start = [&](int run) {
#pragma unroll
    for (int r = 0; r < 4; ++r) row[r] = min(run * height + warp_out * strip + 8 * r + g, w.out - 1);
    next.load(w, row, begin, t);
  };
  if (begin < end) start(blockIdx.x);
  fill<T>(shared, code2, w);
  __syncthreads();

  for (int run = blockIdx.x; run < runs; run += gridDim.x) {
    float sums[2][tiles][4] = {};
    for (int at = begin; at < end; at += along_in) {
      const Ahead<chunk> now = next;
      if (at + along_in < end)
        next.load(w, row, at + along_in, t);
      else if (run + gridDim.x < runs)
        start(run + gridDim.x);
#pragma unroll
      for (int j = 0; j < chunk; ++j) {
        const Decoded weights = Decoded::of<T, chunk>(now, j, shared, code2, lane);
#pragma unroll
        for (int n = 0; n < tiles; ++n) {
          const T* from = x + min(8 * n + g, rows - 1) * w.in + (at * chunk + j) * block + 16 * t;
          const uint4 left = __ldg(reinterpret_cast<const uint4*>(from));
          const uint4 right = __ldg(reinterpret_cast<const uint4*>(from) + 1);
#pragma unroll
          for (int m = 0; m < 2; ++m) weights.template multiply<T>(sums[m][n], m, left, right);
        }
      }
    }

    // The warps along the inner dimension lay their sums side by side, and all add them up.
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < tiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          laid[(warp_in * tiles * 8 + 8 * n + 2 * t + i % 2) * pitch + warp_out * strip + 16 * m + i / 2 * 8 + g] =
              sums[m][n][i];
    __syncthreads();
    for (int i = threadIdx.x; i < tiles * 8 * height; i += threads) {
      float sum = 0.f;
#pragma unroll
      for (int k = 0; k < along_in; ++k) sum += laid[(k * tiles * 8 + i / height) * pitch + i % height];
      store(y, parts, rows, w.out, i / height, run * height + i % height, sum);
    }
  }
}

// More rows: bound by tensor cores, so each warp has rows of W of its own, and x comes through shared memory, where all
// of them read it. While a chunk is worked on the next one is copied.
template <class T, int tiles, int chunk>
__global__ void __launch_bounds__(threads)
    more_rows(const T* __restrict__ x, const Weight w, T* __restrict__ y, float* __restrict__ parts, int rows) {
  constexpr int row_bytes = block * 2, tile_bytes = tiles * 8 * row_bytes;
  extern __shared__ __align__(16) uint8_t shared[];
  float* code2 = reinterpret_cast<float*>(shared + table_bytes);
  uint8_t* copies = shared + table_bytes + 256 * 4;
  const int lane = threadIdx.x % warp, g = lane / 4, t = lane % 4;
  const int first_row = (blockIdx.x * warps + threadIdx.x / warp) * strip;
  const int chunks = w.in / (block * chunk), begin = part(chunks, blockIdx.y), end = part(chunks, blockIdx.y + 1);

  int row[4];  // rows past the end are the last one again, computed and not stored
#pragma unroll
  for (int r = 0; r < 4; ++r) row[r] = min(first_row + 8 * r + g, w.out - 1);

  // Sixteen bytes stand where their place in the row, combined with the row, says, so that eight lanes meet 32 banks.
  const auto copy = [&](int at) {
#pragma unroll
    for (int i = 0; i < chunk * tiles * 8 * 8; i += threads) {
      const int piece = (i + threadIdx.x) % 8, line = (i + threadIdx.x) / 8 % (tiles * 8);
      const int j = (i + threadIdx.x) / 8 / (tiles * 8);
      if (tiles * 8 * 8 * chunk % threads && i + threadIdx.x >= tiles * 8 * 8 * chunk) break;
      const T* from = x + min(line, rows - 1) * w.in + (at * chunk + j) * block + 8 * piece;
      const uint8_t* to = copies + (at % 2 * chunk + j) * tile_bytes + line * row_bytes + ((piece ^ line % 8) * 16);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                       static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                   "l"(from));
    }
    asm volatile("cp.async.commit_group;");
  };

  Ahead<chunk> next;
  if (begin < end) {
    copy(begin);
    next.load(w, row, begin, t);
  }
  fill<T>(shared, code2, w);

  float sums[2][tiles][4] = {};
  for (int at = begin; at < end; ++at) {
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();  // what this thread and the others copied is there, and the other half is done with
    const Ahead<chunk> now = next;
    if (at + 1 < end) {
      copy(at + 1);
      next.load(w, row, at + 1, t);
    }
#pragma unroll
    for (int j = 0; j < chunk; ++j) {
      const Decoded weights = Decoded::of<T, chunk>(now, j, shared, code2, lane);
      const uint8_t* tile = copies + (at % 2 * chunk + j) * tile_bytes + g * row_bytes;
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
        const uint4 left = *reinterpret_cast<const uint4*>(tile + n * 8 * row_bytes + ((2 * t ^ g) * 16));
        const uint4 right = *reinterpret_cast<const uint4*>(tile + n * 8 * row_bytes + ((2 * t + 1 ^ g) * 16));
#pragma unroll
        for (int m = 0; m < 2; ++m) weights.template multiply<T>(sums[m][n], m, left, right);
      }
    }
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
__global__ void add_up(const float4* __restrict__ parts, T* __restrict__ y, int count, int64_t quads) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= quads) return;
  float4 sum = parts[i];
  for (int part = 1; part < count; ++part) {
    const float4 more = parts[part * quads + i];
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  }
  reinterpret_cast<uint2*>(y)[i] = make_uint2(Number<T>::pair(sum.x, sum.y), Number<T>::pair(sum.z, sum.w));
}

// Into how many parts the inner dimension is cut: as estimated in nanoseconds, from bytes of W a multiprocessor decodes
// in one, what a program takes besides, and what adding up and its launch take.
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

// height: rows of W a program has. at_once: programs a multiprocessor has room for, which go on to further runs.
template <class T>
void launch(void (*kernel)(const T*, Weight, T*, float*, int), const at::Tensor& x, const Weight& w, at::Tensor& y,
            int height, int chunk, int bytes, double rate, int at_once) {
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
  add_up<T><<<static_cast<unsigned>((quads + 127) / 128), 128, 0, stream>>>(
      reinterpret_cast<const float4*>(parts.const_data_ptr<float>()), to, count, quads);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

constexpr int fixed_bytes = table_bytes + 256 * 4;

template <class T, int tiles, int along_out, int chunk>
void few(const at::Tensor& x, const Weight& w, at::Tensor& y, double rate) {
  constexpr int height = along_out * strip, laid = warps / along_out * tiles * 8 * (height + 4) * 4;
  launch<T>(few_rows<T, tiles, along_out, chunk>, x, w, y, height, chunk, fixed_bytes + laid, rate, tiles == 1 ? 2 : 1);
}

template <class T, int tiles, int chunk>
void more(const at::Tensor& x, const Weight& w, at::Tensor& y, double rate) {
  constexpr int copies = 2 * chunk * tiles * 8 * block * 2;
  launch<T>(more_rows<T, tiles, chunk>, x, w, y, warps * strip, chunk, fixed_bytes + copies, rate, 0);
}

// The rates are bytes of W that a multiprocessor works through in a nanosecond.
template <class T>
void dispatch(const at::Tensor& x, const Weight& w, at::Tensor& y) {
  const int64_t rows = x.size(0);
  if (rows <= 8) return few<T, 1, 1, 2>(x, w, y, 30);
  if (rows <= 16) return few<T, 2, 2, 4>(x, w, y, 25);
  if (rows <= 32) return more<T, 4, 2>(x, w, y, 18);
  if (rows <= 48) return more<T, 6, 2>(x, w, y, 15);
  if (rows <= 64) return more<T, 8, 2>(x, w, y, 12);
  if (rows <= 96) return more<T, 12, 1>(x, w, y, 9);
  return more<T, 16, 1>(x, w, y, 7);
}

at::Tensor nf4_matmul_few(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                          const at::Tensor& code2, const at::Tensor& absmax2, const at::Tensor& offset,
                          int64_t out_features) {
  const int64_t rows = x.size(0), in_features = x.size(1);
  TORCH_CHECK_VALUE(rows > 0 && rows <= max_rows, "x: got ", rows, " rows, accepted are 1 to ", max_rows);
  TORCH_CHECK_VALUE(in_features % (4 * block) == 0 && out_features % 4 == 0,
                    "packed: got (out, in) of ", out_features, ", ", in_features,
                    ", accepted are multiples of 4 and ", 4 * block);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor contiguous = x.contiguous();
  const Weight w{packed.const_data_ptr<uint8_t>(), absmax.const_data_ptr<uint8_t>(), code2.const_data_ptr<float>(),
                 absmax2.const_data_ptr<float>(),  offset.const_data_ptr<float>(),   offset.dim() ? 1 : 0,
                 static_cast<int>(out_features),   static_cast<int>(in_features)};
  at::Tensor y = at::empty({rows, out_features}, x.options());
  if (x.scalar_type() == at::kBFloat16)
    dispatch<__nv_bfloat16>(contiguous, w, y);
  else
    dispatch<__half>(contiguous, w, y);
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(saga_kernels, library) {
  library.def(
      "nf4_matmul_few(Tensor x, Tensor packed, Tensor absmax, Tensor code2, Tensor absmax2, Tensor offset, "
      "int out_features) -> Tensor");
}

TORCH_LIBRARY_IMPL(saga_kernels, CUDA, library) { library.impl("nf4_matmul_few", &nf4_matmul_few); }
