// csrc/nf4_wgmma.h run on a CPU: the instructions emulated, and the rules by which a GPU may run them checked.
//
// Every thread of a cluster is a fiber, which goes on until it waits for others; which one goes on next is drawn. What
// is asynchronous happens as late as it may (when it is waited for) or at once, as `late` says of copies (1) and of
// products (2), and what is read too early, or written too early, makes the result wrong. wgmma is computed by the PTX ISA's own tables of who holds what
// and where it lies, which know nothing of the kernel's. The first rule that is broken is told: a tensor core
// that reads what no thread has published, a copy that is not aligned, sums that are not those of the instruction before.

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "nf4_wgmma.h"

namespace {

using namespace saga;
using wgmma::steps;

float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }

struct BFloat16 {
  static constexpr float code_scale = code_scale_bfloat16;
  static uint32_t of(float value) {  // to the nearest, ties to even
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  }
  static float value(uint32_t bits) { return from_bits(bits << 16); }
};

struct Float16 {
  static constexpr float code_scale = code_scale_float16;
  static uint32_t of(float value) { return std::bit_cast<uint16_t>(static_cast<_Float16>(value)); }
  static float value(uint32_t bits) { return static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(bits))); }
};

struct Copy {
  uint8_t* to;
  const void* from;
  int bytes;
};

struct Product {
  float* d;
  const uint32_t* a;
  uint64_t right;
  int columns;
  bool accumulate;
};

struct Program;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Program* program;
  int thread;
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
  std::vector<Copy> copies;               // not yet
  std::vector<Product> begun;             // those of a warpgroup are those of each of its threads
  std::vector<int> unpublished;           // sixteens of bytes that it wrote
  bool fenced = false, committed = true;
  float sent;
};

struct Barrier {
  int waiting = 0, generation = 0;
};

constexpr int room = 232448;  // bytes of shared memory that a program may have

struct Program {
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* shared;
  std::vector<int> written_by;  // of every 16 bytes: the thread that wrote them and has not published it, or -1
  int tile, part, done = 0;
  std::vector<Barrier> warps, groups;
  Barrier all;
};

struct Cluster {
  const int parts, threads;
  const int late;
  std::mt19937 random;
  std::vector<Program> programs;
  std::vector<Fiber> fibers;
  Barrier all;
  ucontext_t scheduler;
  Fiber* now = nullptr;
  std::string broken;  // the first rule that was

  Cluster(int parts, int threads, int late, uint32_t seed)
      : parts(parts), threads(threads), late(late), random(seed), programs(parts), fibers(parts * threads) {}
} *cluster;

void broken(const char* rule) {
  if (cluster->broken.empty()) cluster->broken = rule;
}

void meet(Barrier& barrier, int count) {
  const int generation = barrier.generation;
  if (++barrier.waiting == count) {
    barrier.waiting = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) swapcontext(&cluster->now->context, &cluster->scheduler);
}

Fiber& me() { return *cluster->now; }
Program& mine() { return *me().program; }
Fiber& of_program(int thread) { return cluster->fibers[mine().part * cluster->threads + thread]; }

void written(const uint8_t* to, int bytes) {
  const int64_t at = to - mine().shared;
  for (int64_t i = at / 16; i <= (at + bytes - 1) / 16; ++i) {
    mine().written_by[i] = me().thread;
    me().unpublished.push_back(i);
  }
}

void carry_out(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.to + copy.bytes > mine().shared + room) return broken("a write outside of shared memory");
    std::memcpy(copy.to, copy.from, copy.bytes);
    written(copy.to, copy.bytes);
  }
}

// One wgmma.mma_async.m64nNk16 of the warpgroup that `group` is the number of.
template <class T>
void multiply(int group, size_t which) {
  const Product first = of_program(128 * group).begun[which];
  static float a[64][16], b[16][256], d[64][256];  // a fiber's stack is small
  // PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16": a warp has 16 rows. Element i of a lane, of eight:
  // row lane / 4, and + 8 for i = 2, 3, 6, 7; column 2 (lane % 4) + i % 2, and + 8 for i >= 4. Element i of D: row
  // lane / 4, and + 8 where i / 2 is odd; column 8 (i / 4) + 2 (lane % 4) + i % 2.
  for (int thread = 0; thread < 128; ++thread) {
    const Product& product = of_program(128 * group + thread).begun.at(which);
    if (product.right != first.right || product.accumulate != first.accumulate) broken("a warpgroup that disagrees");
    const int row = thread / 32 * 16 + thread % 32 / 4, pair = thread % 4 * 2;
    for (int i = 0; i < 8; ++i)
      a[row + (i / 2 % 2 ? 8 : 0)][pair + i % 2 + (i >= 4 ? 8 : 0)] =
          T::value(product.a[i / 2] >> (i % 2 ? 16 : 0) & 0xFFFF);
    for (int i = 0; i < first.columns / 2; ++i)
      d[row + (i / 2 % 2 ? 8 : 0)][i / 4 * 8 + pair + i % 2] = first.accumulate ? product.d[i] : 0.f;
  }
  // "Matrix descriptor format": bits 0-13 the address / 16, 32-45 the stride between units of 8 rows / 16, 49-51 the
  // base offset, 62-63 the swizzle. "Canonical layouts", K-major, 128 bytes: Swizzle<3, 4, 3> of ((8, n), (T, 2k)) :
  // ((8T, SBO), (1, T)), T = 8 numbers: bits 4-6 of an address are xored with its bits 7-9.
  const uint64_t address = (first.right & 0x3FFF) * 16, stride = (first.right >> 32 & 0x3FFF) * 16;
  if (first.right >> 62 != 1 || (first.right >> 49 & 7) != 0) broken("another swizzle than of 128 bytes");
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < first.columns; ++n) {
      const uint64_t plain = address + n / 8 * stride + n % 8 * 128 + k * 2, at = plain ^ (plain >> 7 & 7) << 4;
      if (at + 2 > room) return broken("a read outside of shared memory");
      if (mine().written_by[at / 16] >= 0) broken("a tensor core reads what was not published");
      uint16_t bits;
      std::memcpy(&bits, mine().shared + at, 2);
      b[k][n] = T::value(bits);
    }
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < first.columns; ++n)
      for (int k = 0; k < 16; ++k) d[m][n] += a[m][k] * b[k][n];
  for (int thread = 0; thread < 128; ++thread) {
    const Product& product = of_program(128 * group + thread).begun[which];
    const int row = thread / 32 * 16 + thread % 32 / 4, pair = thread % 4 * 2;
    for (int i = 0; i < first.columns / 2; ++i) product.d[i] = d[row + (i / 2 % 2 ? 8 : 0)][i / 4 * 8 + pair + i % 2];
  }
}

template <class T>
struct Emulated {
  static constexpr float code_scale = T::code_scale;
  static int thread() { return me().thread; }
  static int tile() { return mine().tile; }
  static int part() { return mine().part; }
  static int parts() { return cluster->parts; }
  static uint8_t* shared() { return mine().shared; }
  static uint32_t address(const void* at) {
    return static_cast<uint32_t>(static_cast<const uint8_t*>(at) - mine().shared);
  }
  static float quantile(int code) {
    static constexpr float quantiles[] = {NF4_QUANTILES};
    return quantiles[code];
  }
  static uint32_t pair(float low, float high) { return T::of(low) | T::of(high) << 16; }

  template <int bytes>
  static void copy(uint32_t to, const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % bytes || to % bytes) broken("a copy that is not aligned");
    const Copy copy{mine().shared + to, from, bytes};
    if (cluster->late & 1)
      me().copies.push_back(copy);
    else
      carry_out({copy});
  }
  static void commit() { me().groups.push_back(std::exchange(me().copies, {})); }
  template <int pending>
  static void wait() {
    auto& groups = me().groups;
    while (groups.size() > pending) {
      carry_out(groups.front());
      groups.erase(groups.begin());
    }
  }
  static void publish() {
    for (const int i : std::exchange(me().unpublished, {}))
      if (mine().written_by[i] == me().thread) mine().written_by[i] = -1;
  }
  static void sync() { meet(mine().all, cluster->threads); }
  static void sync_cluster() { meet(cluster->all, cluster->threads * cluster->parts); }

  struct Words {
    uint32_t low, high;
  };
  static Words load_8(const uint8_t* from) {
    if (address(from) % 8) broken("a load that is not aligned");
    Words words;
    std::memcpy(&words, from, 8);
    return words;
  }
  static void store_8(uint16_t* to, uint32_t low, uint32_t high) {
    if (reinterpret_cast<uintptr_t>(to) % 8) broken("a store that is not aligned");
    std::memcpy(to, &low, 4);
    std::memcpy(to + 2, &high, 4);
  }
  static void store_16(uint8_t* to, uint32_t four_times) {
    for (int i = 0; i < 4; ++i) std::memcpy(to + 4 * i, &four_times, 4);
    written(to, 16);
  }
  static uint32_t look_up(const uint8_t* table, uint32_t word, uint32_t at, int i) {
    uint32_t codes;
    std::memcpy(&codes, table + (word >> 8 * i & 255) * table_row + at, 4);
    return codes;
  }
  static float from_lane(float value, int lane) {
    me().sent = value;
    Barrier& warp_meets = mine().warps[me().thread / warp];
    meet(warp_meets, warp);
    const float found = of_program(me().thread / warp * warp + lane).sent;
    meet(warp_meets, warp);
    return found;
  }
  static void add_16(float (&sum)[4], const float* from, int rank) {
    const float* there = reinterpret_cast<const float*>(
        cluster->programs[rank].shared + (reinterpret_cast<const uint8_t*>(from) - mine().shared));
    if (address(from) % 16) broken("a load that is not aligned");
    for (int i = 0; i < 4; ++i) sum[i] += there[i];
  }

  static void fence() { me().fenced = true; }
  static void commit_products() { me().committed = true; }
  template <int columns>
  static void multiply(float (&d)[columns / 2], const uint32_t (&a)[4], uint64_t right, bool accumulate) {
    if (!me().fenced) broken("a product without a fence before it");
    if (accumulate && (me().begun.empty() || me().begun.back().d != d)) broken("sums of another instruction");
    me().begun.push_back({d, a, right, columns, accumulate});
    me().committed = false;
    if (!accumulate) std::fill(d, d + columns / 2, from_bits(0x7FC00000));  // no one may read them now
    if (!(cluster->late & 2)) compute(me().begun.size() - 1);
  }
  template <int columns>
  static void wait_for_products(float (&d)[columns / 2], uint32_t (&a)[steps][4]) {
    if (!me().committed) broken("products that were not committed");
    if (me().begun.empty() || me().begun.back().d != d || me().begun.back().a != a[steps - 1])
      broken("a wait for other products than were begun");
    if (cluster->late & 2)
      for (size_t i = 0; i < me().begun.size(); ++i) compute(i);
    meet(mine().groups[me().thread / 128], 128);
    me().begun.clear();
    me().fenced = false;
  }
  // By the first thread of the warpgroup, when all have come to it.
  static void compute(size_t which) {
    Barrier& group = mine().groups[me().thread / 128];
    meet(group, 128);
    if (me().thread % 128 == 0) ::multiply<T>(me().thread / 128, which);
    meet(group, 128);
  }
};

struct Call {
  const uint16_t* x;
  Weight w;
  uint16_t* y;
  int rows;
} call;

template <class T, int columns, int groups>
void body() {
  wgmma::multiply<Emulated<T>, columns, groups>(call.x, call.w, call.y, call.rows);
  if (++mine().done == cluster->threads) std::memset(mine().shared, 0xFF, room);  // it is another program's
  me().done = true;
  for (;;) swapcontext(&me().context, &cluster->scheduler);
}

void begin(Fiber& fiber, Program& program, int thread, void (*body)()) {
  fiber.program = &program;
  fiber.thread = thread;
  fiber.stack.resize(64 << 10);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  makecontext(&fiber.context, body, 0);
}

template <class T, int columns, int groups>
std::string run(int parts, int late, uint32_t seed) {
  using S = wgmma::Shape<columns, groups>;
  if (S::bytes + wgmma::unit_bytes > room) return "too much shared memory";
  std::string said;
  for (int tile = 0; tile * S::height < call.w.out && said.empty(); ++tile) {
    Cluster all(parts, S::threads, late, seed + tile);
    cluster = &all;
    for (int part = 0; part < parts; ++part) {
      Program& program = all.programs[part];
      program.memory = std::make_unique<uint8_t[]>(room + 1024);
      program.shared = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(program.memory.get()) + 1023) & ~1023ull);
      std::memset(program.shared, 0xFF, room);  // NaN, until it is written
      program.written_by.assign(room / 16, -1);
      program.tile = tile, program.part = part;
      program.warps.resize(S::threads / warp), program.groups.resize(groups);
    }
    for (int i = 0; i < parts * S::threads; ++i)
      begin(all.fibers[i], all.programs[i / S::threads], i % S::threads, body<T, columns, groups>);
    std::vector<Fiber*> live;
    for (Fiber& fiber : all.fibers) live.push_back(&fiber);
    while (!live.empty()) {
      std::shuffle(live.begin(), live.end(), all.random);
      const uint32_t awake = all.random();  // warpgroups; the others wait, so that some get ahead
      for (Fiber* fiber : live) {
        if (!(awake >> (fiber - all.fibers.data()) / 128 % 32 & 1)) continue;
        all.now = fiber;
        swapcontext(&all.scheduler, &fiber->context);
      }
      std::erase_if(live, [](const Fiber* fiber) { return fiber->done; });
    }
    said = all.broken;
  }
  return said;
}

template <class T>
std::string run_of(int parts, int late, uint32_t seed) {
  if (call.rows <= 32) return run<T, 32, 4>(parts, late, seed);
  if (call.rows <= 64) return run<T, 64, 4>(parts, late, seed);
  if (call.rows <= 96) return run<T, 96, 2>(parts, late, seed);
  return run<T, 128, 2>(parts, late, seed);
}

}  // namespace

// y (rows, out), in `bfloat16` or float16. Returns the rule that was broken first, or nothing.
extern "C" const char* nf4_wgmma(const uint16_t* x, const uint8_t* packed, const uint8_t* absmax, const float* code2,
                                 const float* absmax2, const float* offset, int offset_step, int out, int in, int rows,
                                 uint16_t* y, bool bfloat16, int parts, int late, uint32_t seed) {
  static std::string said;
  call = {x, {packed, absmax, code2, absmax2, offset, offset_step, out, in}, y, rows};
  said = bfloat16 ? run_of<BFloat16>(parts, late, seed) : run_of<Float16>(parts, late, seed);
  return said.c_str();
}
