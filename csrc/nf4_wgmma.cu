// nf4_wgmma.h on a GPU of compute capability 9.0, whose machine code must be asked for as 9.0a.

#include "nf4_wgmma.h"

#include <torch/library.h>

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <type_traits>

namespace saga::wgmma {
namespace {

__constant__ float quantiles[16] = {NF4_QUANTILES};

// The operands of an instruction with 16, 32, 48 or 64 sums a lane: their names, and what they are.
#define NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 \
  NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_48 \
  NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64 \
  NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_AT(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
#define SUMS_16 SUMS_AT(0)
#define SUMS_32 SUMS_16, SUMS_AT(16)
#define SUMS_48 SUMS_32, SUMS_AT(32)
#define SUMS_64 SUMS_48, SUMS_AT(48)

// d = a @ b, or d + a @ b. a4: the numbers of the operands behind the sums: the left factor, the right one, and whether
// to add.
#define MULTIPLY(columns, type, count, a0, a1, a2, a3, b, add)                                                 \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #add ", 0; wgmma.mma_async.sync.aligned.m64n" #columns        \
               "k16.f32." type "." type " {" NAMES_##count "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b \
               ", p, 1, 1, 0;}"                                                                                \
               : SUMS_##count                                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right), "r"(static_cast<int>(accumulate)))
#define MULTIPLY_OF(type)                                                                       \
  if constexpr (columns == 32) {                                                                \
    MULTIPLY(32, type, 16, 16, 17, 18, 19, 20, 21);                                             \
  } else if constexpr (columns == 64) {                                                         \
    MULTIPLY(64, type, 32, 32, 33, 34, 35, 36, 37);                                             \
  } else if constexpr (columns == 96) {                                                         \
    MULTIPLY(96, type, 48, 48, 49, 50, 51, 52, 53);                                             \
  } else {                                                                                      \
    static_assert(columns == 128);                                                              \
    MULTIPLY(128, type, 64, 64, 65, 66, 67, 68, 69);                                            \
  }

// The instructions of a GPU. T: the type of x and y.
template <class T>
struct Gpu {
  static constexpr bool bfloat16 = std::is_same_v<T, __nv_bfloat16>;
  static constexpr float code_scale = bfloat16 ? code_scale_bfloat16 : code_scale_float16;

  static __device__ int thread() { return threadIdx.x; }
  static __device__ int tile() { return blockIdx.x; }
  static __device__ int part() { return blockIdx.y; }
  static __device__ int parts() { return gridDim.y; }

  // From a multiple of a unit on.
  static __device__ uint8_t* shared() {
    extern __shared__ __align__(1024) uint8_t memory[];
    return memory + (unit_bytes - address(memory) % unit_bytes) % unit_bytes;
  }

  static __device__ uint32_t address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

  static __device__ float quantile(int code) { return quantiles[code]; }

  static __device__ uint32_t pair(float low, float high) {
    if constexpr (bfloat16) {
      const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
      return reinterpret_cast<const uint32_t&>(both);
    } else {
      const __half2 both = __floats2half2_rn(low, high);
      return reinterpret_cast<const uint32_t&>(both);
    }
  }

  // Begins to copy to an address in shared memory; `commit` ends a group of copies, and `wait` waits for all but the last
  // `pending` groups.
  template <int bytes>
  static __device__ void copy(uint32_t to, const void* from) {
    if constexpr (bytes == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(bytes) : "memory");
  }
  static __device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int pending>
  static __device__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
  }

  // What this thread wrote to shared memory may be read by tensor cores, once others have met it in `sync`.
  static __device__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
  static __device__ void sync() { __syncthreads(); }

  // All programs of the cluster, and what they wrote before.
  static __device__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  }

  static __device__ uint2 load_8(const uint8_t* from) { return *reinterpret_cast<const uint2*>(from); }
  static __device__ void store_8(uint16_t* to, uint32_t low, uint32_t high) {
    *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
  }
  static __device__ void store_16(uint8_t* to, uint32_t four_times) {
    *reinterpret_cast<uint4*>(to) = make_uint4(four_times, four_times, four_times, four_times);
  }

  // The two codes of byte i of `word`, the first weight in the low half. at: four times the lane.
  static __device__ uint32_t look_up(const uint8_t* table, uint32_t word, uint32_t at, int i) {
    return saga::look_up(table, word, at, i);
  }

  static __device__ float from_lane(float value, int lane) { return __shfl_sync(0xFFFFFFFF, value, lane); }

  // sum += four floats of program `rank` of the cluster, where this one has `mine`.
  static __device__ void add_16(float (&sum)[4], const float* mine, int rank) {
    uint32_t there;
    float4 more;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(mine)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(more.x), "=f"(more.y), "=f"(more.z), "=f"(more.w)
                 : "r"(there)
                 : "memory");
    sum[0] += more.x, sum[1] += more.y, sum[2] += more.z, sum[3] += more.w;
  }

  // Products are begun after a `fence`, which registers written before need, and are there after `wait_for_products`.
  // Until then the registers of both factors and of the sums are in use: it takes them, so that no other value is put
  // there.
  static __device__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  static __device__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

  template <int columns>
  static __device__ void multiply(float (&d)[columns / 2], const uint32_t (&a)[4], uint64_t right, bool accumulate) {
    if constexpr (bfloat16) {
      MULTIPLY_OF("bf16")
    } else {
      MULTIPLY_OF("f16")
    }
  }

  template <int columns>
  static __device__ void wait_for_products(float (&d)[columns / 2], uint32_t (&a)[steps][4]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < columns / 2; ++i) asm volatile("" : "+f"(d[i])::"memory");
#pragma unroll
    for (int s = 0; s < steps; ++s)
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[s][i])::"memory");
  }
};

template <class T, int columns, int groups>
__global__ void __launch_bounds__(Shape<columns, groups>::threads, 1)
    multiply_on_gpu(const uint16_t* __restrict__ x, const Weight w, uint16_t* __restrict__ y, int rows) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  multiply<Gpu<T>, columns, groups>(x, w, y, rows);
#else
  __trap();  // other GPUs have no such instructions, and `nf4_matmul_wgmma` refuses them
#endif
}

// The number of parts with the least estimated time: of waves of programs, each of which takes its share of a tile and
// an overhead of some chunks. at_once: programs that the card runs at once, by number of parts; 0 if it cannot.
int parts_of(int tiles, int chunks, const std::array<int, most_parts + 1>& at_once) {
  constexpr int overhead = 3;
  const auto estimate = [&](int parts) {
    const int waves = (tiles * parts + at_once[parts] - 1) / at_once[parts];
    return waves * ((chunks + parts - 1) / parts + overhead + (parts > 1));
  };
  int best = 1;
  for (int parts = 2; parts <= std::min(most_parts, chunks); ++parts)
    if (at_once[parts] && estimate(parts) < estimate(best)) best = parts;
  return best;
}

template <class T, int columns, int groups>
void launch(const at::Tensor& x, const Weight& w, at::Tensor& y) {
  using S = Shape<columns, groups>;
  const auto kernel = multiply_on_gpu<T, columns, groups>;
  constexpr int bytes = S::bytes + unit_bytes;
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const int tiles = (w.out + S::height - 1) / S::height;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cudaLaunchConfig_t launch{};
  launch.blockDim = dim3(S::threads);
  launch.dynamicSmemBytes = bytes;
  launch.stream = at::cuda::getCurrentCUDAStream();
  launch.attrs = &cluster;
  launch.numAttrs = 1;
  const auto into = [&](int parts) {
    launch.gridDim = dim3(tiles, parts);
    cluster.val.clusterDim = {1, static_cast<unsigned>(parts), 1};
  };

  static std::mutex mutex;
  static std::map<int, std::array<int, most_parts + 1>> known;  // by device
  int count;
  {
    const std::lock_guard lock(mutex);
    auto [found, is_new] = known.try_emplace(x.get_device());
    if (is_new)
      for (int parts = 1; parts <= most_parts; ++parts) {
        int clusters = 0;
        into(parts);
        C10_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch));
        found->second[parts] = std::max(clusters, parts == 1 ? 1 : 0) * parts;
      }
    count = parts_of(tiles, w.in / (chunk * block), found->second);
  }
  into(count);
  C10_CUDA_CHECK(cudaLaunchKernelEx(&launch, kernel, static_cast<const uint16_t*>(x.const_data_ptr()), w,
                                    static_cast<uint16_t*>(y.mutable_data_ptr()), static_cast<int>(x.size(0))));
}

template <class T>
void dispatch(const at::Tensor& x, const Weight& w, at::Tensor& y) {
  if (x.size(0) <= 32) return launch<T, 32, 4>(x, w, y);
  if (x.size(0) <= 64) return launch<T, 64, 4>(x, w, y);
  if (x.size(0) <= 96) return launch<T, 96, 2>(x, w, y);
  return launch<T, 128, 2>(x, w, y);
}

at::Tensor nf4_matmul_wgmma(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                            const at::Tensor& code2, const at::Tensor& absmax2, const at::Tensor& offset,
                            int64_t out_features) {
  const int64_t rows = x.size(0), in_features = x.size(1);
  TORCH_CHECK_VALUE(rows > 0 && rows <= most_columns, "x: got ", rows, " rows, accepted are 1 to ", most_columns);
  TORCH_CHECK_VALUE(in_features > 0 && in_features % (chunk * block) == 0 && out_features > 0 && out_features % 4 == 0,
                    "packed: got (out, in) of ", out_features, ", ", in_features, ", accepted are multiples of 4 and ",
                    chunk * block);
  const auto* properties = at::cuda::getDeviceProperties(x.get_device());
  TORCH_CHECK_VALUE(properties->major == 9 && properties->minor == 0, "x: got a GPU of compute capability ",
                    properties->major, ".", properties->minor, ", accepted is 9.0");
  return matmul(x, packed, absmax, code2, absmax2, offset, out_features,
                [](auto type, const at::Tensor& x, const Weight& w, at::Tensor& y) {
                  dispatch<decltype(type)>(x, w, y);
                });
}

}  // namespace
}  // namespace saga::wgmma

TORCH_LIBRARY_FRAGMENT(saga_kernels, library) {
  library.def(
      "nf4_matmul_wgmma(Tensor x, Tensor packed, Tensor absmax, Tensor code2, Tensor absmax2, Tensor offset, "
      "int out_features) -> Tensor");
}

TORCH_LIBRARY_IMPL(saga_kernels, CUDA, library) { library.impl("nf4_matmul_wgmma", &saga::wgmma::nf4_matmul_wgmma); }
