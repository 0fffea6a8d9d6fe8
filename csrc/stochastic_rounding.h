// Stochastic rounding of bfloat16 parameters and of compact states (compact.h): which random bits
// an element gets, and what they do.
// Mirrored by triton_kernels/stochastic_rounding.py and maxva_kernels/rounding.py.
#pragma once

#include <cstdint>

#include "low_precision.h"
#include "philox.h"

namespace maxva {

// One row per parameter, in this order, as maxva_kernels/rounding.py packs it.
struct Rounding {
  int64_t seed = 0;
  int64_t parameter = -1;  // index among all parameters of the optimizer; -1: round to the nearest
  int64_t offset = 0, inner_local = 1, inner_global = 1;  // see Note [Random bits]
  int64_t theta = 0;  // 1: of the parameter, too; 0: of its compact states only
};
inline constexpr int kRoundingFields = sizeof(Rounding) / sizeof(int64_t);

// Note [Random bits]
// An element's random word depends on the seed, its parameter, the number of its update and its
// place in the whole parameter, so on nothing that threads, chunks or shards could change. Word
// e % 4 of philox(counter {e / 4 low, e / 4 high, parameter, t}, key {seed low, seed high}) belongs
// to element e; element i of a shard, in memory order, is element
// (i / inner_local) * inner_global + offset + i % inner_local of the whole.
struct RandomBits {
  uint32_t key0, key1, parameter, t;
  int64_t offset, inner_local, inner_global;
  bool on;        // for theta
  bool in_a_row;  // e is i + offset

  MAXVA_INLINE PhiloxWords words(int64_t call) const {
    return philox({{static_cast<uint32_t>(call), static_cast<uint32_t>(call >> 32), parameter, t}},
                  key0, key1);
  }

  MAXVA_INLINE uint32_t word(int64_t i) const {
    const int64_t e =
        in_a_row ? i + offset : (i / inner_local) * inner_global + offset + i % inner_local;
    const PhiloxWords of_call = words(e / 4);
    const uint32_t low = e % 2 ? of_call.x[1] : of_call.x[0];
    const uint32_t high = e % 2 ? of_call.x[3] : of_call.x[2];
    return e % 4 < 2 ? low : high;
  }

  // Of elements i to i + 3.
  MAXVA_INLINE PhiloxWords four_words(int64_t i) const {
    if (in_a_row && (i + offset) % 4 == 0) return words((i + offset) / 4);
    PhiloxWords result;
    for (int k = 0; k < 4; ++k) result.x[k] = word(i + k);
    return result;
  }
};

// t: the number of updates including this one.
MAXVA_INLINE RandomBits make_random_bits(const Rounding& rounding, int64_t numel, double t) {
  RandomBits bits;
  bits.key0 = static_cast<uint32_t>(rounding.seed);
  bits.key1 = static_cast<uint32_t>(rounding.seed >> 32);
  bits.parameter = static_cast<uint32_t>(rounding.parameter);
  bits.t = static_cast<uint32_t>(t);
  bits.offset = rounding.offset;
  bits.inner_local = rounding.inner_local;
  bits.inner_global = rounding.inner_global;
  bits.on = rounding.parameter >= 0 && rounding.theta != 0;
  bits.in_a_row = rounding.inner_local == rounding.inner_global || numel <= rounding.inner_local;
  return bits;
}

// Up with the probability that is x's distance to the bfloat16 below: unbiased. Exact values stay.
MAXVA_INLINE void from_compute(float x, uint32_t random, BFloat16& out) {
  const uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out.bits = static_cast<uint16_t>(nan ? 0x7FC0u : (bits + (random & 0xFFFFu)) >> 16);
}

}  // namespace maxva
