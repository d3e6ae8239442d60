// y = x @ W.T for up to 128 rows of x, with nested NF4 weights in bitsandbytes' own layout, by Hopper's wgmma: the kernel,
// over the instructions of a `Machine`. nf4_wgmma.cu has a GPU's; tests/saga_kernels/wgmma.cpp emulates them.
//
// W is the left factor, decoded in registers by the table of nf4_cuda.cu, and x the right one, in shared memory, so that
// a warpgroup multiplies 64 rows of W with all rows of x. The absmax of a block of 64 weights scales the block's sums.
// While the tensor cores are at a block, the warpgroup decodes the next one.
//
// In wgmma.m64nNk16 lane 4g + t of the left factor holds the inner positions 2t, 2t + 1, 2t + 8, 2t + 9 of rows g and
// g + 8. The order of a sum is free, so step s of a block uses positions 16t + 4s to 16t + 4s + 3 of W: eight contiguous
// bytes a lane. The words of x, pairs of numbers, are permuted likewise where they are copied.
//
// Programs that share rows of W, each with a part of the inner dimension, are a cluster. They add up their sums in the
// order of the parts, reading each other's shared memory.

#pragma once

#include <cstdint>

#include "nf4.h"

namespace saga::wgmma {

constexpr int chunk = 2;       // blocks that are copied together
constexpr int stages = 4;      // chunks in shared memory: the one before, which tensor cores may still read, this one,
constexpr int ahead = 2;       // and as many as are being copied
constexpr int warp_rows = 16;  // of W
constexpr int steps = 4;       // instructions a block: 16 inner positions each
constexpr int most_columns = 128, most_parts = 8;

// Of the right factor: 8 rows of x, each a line of a block's 64 numbers, are the unit in which bytes are swizzled.
constexpr int line_bytes = block * 2, unit_bytes = 8 * line_bytes, step_bytes = line_bytes / steps;

constexpr int row_bytes = chunk * block / 2;

// The place that word `word` of a line of x has in the order in which the tensor cores read a line.
NF4_SHARED constexpr int read_at(int word) {
  const int t = word / 8, s = word / 2 % 4, half = word % 2;
  return 8 * s + 4 * half + t;
}

// Where it lies: sixteen bytes are at their place in the line xor the line.
NF4_SHARED constexpr int x_place(int row, int word) {
  return row * line_bytes + ((read_at(word) / 4 ^ row % 8) * 16) + read_at(word) % 4 * 4;
}

// Where block j of a row of W lies: every other pair of rows has its blocks swapped, so that lanes use all banks.
NF4_SHARED constexpr int w_place(int row, int j) { return row * row_bytes + ((j ^ row / 2 % 2) * (block / 2)); }

// Of a right factor at `address` in shared memory: inner positions contiguous, swizzled in lines of 128 bytes, units of 8
// rows end to end. The second field is unused in this layout.
NF4_SHARED constexpr uint64_t descriptor(uint32_t address) {
  return (address >> 4 & 0x3FFF) | uint64_t{1} << 16 | uint64_t{unit_bytes >> 4} << 32 | uint64_t{1} << 62;
}

// columns: rows of x that are computed. groups: warpgroups of a program, each with 64 rows of W.
template <int columns, int groups>
struct Shape {
  static constexpr int threads = groups * 4 * warp, height = groups * 64, pitch = height + 4;
  static constexpr int x_bytes = columns * line_bytes, w_bytes = height * row_bytes;
  static constexpr int stage_bytes = chunk * x_bytes + w_bytes, table_at = stages * stage_bytes;
  static constexpr int bytes = table_at + table_bytes + code2_bytes;  // and what it takes to align them to a unit
  static_assert(x_bytes % unit_bytes == 0 && stage_bytes % unit_bytes == 0 && columns * pitch * 4 <= table_at);
};

// Of one lane: the decoded left factor of a block, by step.
struct Factor {
  uint32_t a[steps][4];
};

// x: (rows, in). y: (rows, out), of the same 16-bit type, Machine's.
template <class Machine, int columns, int groups>
NF4_DEVICE void multiply(const uint16_t* x, const Weight& w, uint16_t* y, int rows) {
  using S = Shape<columns, groups>;
  constexpr float unscale = 1.f / Machine::code_scale;
  uint8_t* const shared = Machine::shared();
  uint8_t* const table = shared + S::table_at;
  float* const code2 = reinterpret_cast<float*>(table + table_bytes);
  const int thread = Machine::thread(), index = thread / warp, lane = thread % warp, g = lane / 4, t = lane % 4;
  const int top = Machine::tile() * S::height, first_row = top + index * warp_rows;
  const int chunks = w.in / (chunk * block), part = Machine::part(), parts = Machine::parts();
  const int begin = static_cast<int>(static_cast<int64_t>(chunks) * part / parts);
  const int end = static_cast<int>(static_cast<int64_t>(chunks) * (part + 1) / parts);

  const auto stage = [&](int at) { return shared + (at - begin) % stages * S::stage_bytes; };
  const auto of_warp = [&](int at) { return stage(at) + chunk * S::x_bytes + index * warp_rows * row_bytes; };

  // Copies the next chunk. Rows of x past the end are not copied: their sums are of whatever lies there, and not stored.
  // Rows of W past the end repeat the last one. A warp's rows of x are whole units apart, and so are their places.
  constexpr int apart = groups * 4, pieces = row_bytes / 16, at_once = warp / pieces;
  static_assert(apart * line_bytes % unit_bytes == 0 && columns % apart == 0 && warp_rows == 2 * at_once);
  int x_next = index * w.in + begin * chunk * block + 2 * lane;
  const int w_row = smaller(first_row + lane / pieces, w.out - 1);
  const int w_apart = (smaller(w_row + at_once, w.out - 1) - w_row) * (w.in / 2);
  const uint8_t* w_next =
      w.packed + static_cast<int64_t>(w_row) * (w.in / 2) + begin * row_bytes + lane % pieces * 16;
  int next = begin;
  const auto copy_next = [&] {
    if (next < end) {
      const uint32_t to = Machine::address(stage(next)) + x_place(index, lane);
      const uint16_t* from = x + x_next;
#pragma unroll
      for (int i = 0; i < columns / apart; ++i, from += static_cast<int64_t>(apart) * w.in)
        if (index + i * apart < rows)
#pragma unroll
          for (int j = 0; j < chunk; ++j)
            Machine::template copy<4>(to + i * apart * line_bytes + j * S::x_bytes, from + j * block);
      x_next += chunk * block;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = i * at_once + lane / pieces, piece = lane % pieces;
        Machine::template copy<16>(Machine::address(of_warp(next)) + w_place(row, piece / 2) + piece % 2 * 16,
                                   w_next + i * w_apart);
      }
      w_next += row_bytes;
      ++next;
    }
    Machine::commit();
  };

  // Lane 4g + t has the scale of row g + t % 2 * 8 and block t / 2, and what it is made of a chunk ahead.
  uint32_t code = 0;
  float absmax2 = 0.f, offset = 0.f, scale = 0.f;
  const auto prefetch_scale = [&](int at) {
    const int row = smaller(first_row + g + t % 2 * 8, w.out - 1);
    const int from = row * (w.in / block) + at * chunk + t / 2, group = from / nested;
    code = w.absmax[from];
    absmax2 = w.absmax2[group];
    offset = w.offset[group * w.offset_step];
  };

  // Chunk `at` is there, and that before the one before is no longer used.
  const auto advance = [&](int at) {
    Machine::template wait<ahead - 1>();
    Machine::publish();
    Machine::sync();
    copy_next();
    scale = code2[code] * absmax2 + offset * unscale;
    if (at + 1 < end) prefetch_scale(at + 1);
  };

  const auto decode = [&](int at, int j) {
    Factor found;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto [low, high] = Machine::load_8(of_warp(at) + w_place(8 * h + g, j) + 8 * t);
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          found.a[s][2 * i + h] = Machine::look_up(table, s < 2 ? low : high, 4 * lane, s % 2 * 2 + i);
    }
    return found;
  };

  float sums[columns / 2] = {}, d[columns / 2] = {};
  const auto begin_block = [&](const Factor& factor, int at, int j) {
    const uint32_t address = Machine::address(stage(at) + j * S::x_bytes);
    Machine::fence();
#pragma unroll
    for (int s = 0; s < steps; ++s)
      Machine::template multiply<columns>(d, factor.a[s], descriptor(address + s * step_bytes), s > 0);
    Machine::commit_products();
  };
  const auto end_block = [&](Factor& factor, float of_g, float of_g8) {
    Machine::template wait_for_products<columns>(d, factor.a);
#pragma unroll
    for (int i = 0; i < columns / 2; ++i) sums[i] += (i / 2 % 2 ? of_g8 : of_g) * d[i];
  };

#pragma unroll
  for (int i = 0; i < ahead; ++i) copy_next();
  prefetch_scale(begin);
  for (int byte = thread; byte < 256; byte += S::threads) {
    const uint32_t both = Machine::pair(Machine::quantile(byte / 16) * Machine::code_scale,
                                        Machine::quantile(byte % 16) * Machine::code_scale);
#pragma unroll
    for (int i = 0; i < 8; ++i) Machine::store_16(table + byte * table_row + (i + byte) % 8 * 16, both);
    code2[byte] = w.code2[byte] * unscale;
  }

  advance(begin);
  Factor even = decode(begin, 0);
  for (int at = begin; at < end; ++at) {
    float of_row[chunk][2];
#pragma unroll
    for (int j = 0; j < chunk; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) of_row[j][h] = Machine::from_lane(scale, 4 * g + 2 * j + h);
    begin_block(even, at, 0);
    Factor odd = decode(at, 1);
    end_block(even, of_row[0][0], of_row[0][1]);
    begin_block(odd, at, 1);
    if (at + 1 < end) {
      advance(at + 1);
      even = decode(at + 1, 0);
    }
    end_block(odd, of_row[1][0], of_row[1][1]);
  }

  Machine::sync();  // the stages are no longer used, and hold the sums from here on
  float* const partial = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < columns / 2; ++i)
    partial[(i / 4 * 8 + 2 * t + i % 2) * S::pitch + index * warp_rows + i / 2 % 2 * 8 + g] = sums[i];
  Machine::sync_cluster();
  for (int i = part * S::threads + thread; i < columns * S::height / 4; i += parts * S::threads) {
    const int column = i / (S::height / 4), row = i % (S::height / 4) * 4;
    if (column >= rows || top + row >= w.out) continue;
    float sum[4] = {};
    for (int from = 0; from < parts; ++from) Machine::add_16(sum, partial + column * S::pitch + row, from);
    Machine::store_8(y + static_cast<int64_t>(column) * w.out + top + row, Machine::pair(sum[0], sum[1]),
                     Machine::pair(sum[2], sum[3]));
  }
  Machine::sync_cluster();  // until then others read this one's sums
}

}  // namespace saga::wgmma
