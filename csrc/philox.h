// Philox4x32-7 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011): random words as a function of a counter and a key, for host and device.
#pragma once

#include <cstdint>

#include "step_scalars.h"

namespace maxva {

struct PhiloxWords {
  uint32_t x[4];
};

inline constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;
// the fewest that the authors found to pass BigCrush: rounding needs no margin over them
inline constexpr int kPhiloxRounds = 7;

// `keys(round)` gives a round's two keys.
template <typename Keys>
MAXVA_INLINE PhiloxWords philox_rounds(PhiloxWords counter, const Keys& keys) {
  uint32_t x0 = counter.x[0], x1 = counter.x[1], x2 = counter.x[2], x3 = counter.x[3];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    uint32_t key0, key1;
    keys(round, key0, key1);
    const uint64_t a = uint64_t{kPhiloxMultiplier0} * x0;
    const uint64_t b = uint64_t{kPhiloxMultiplier1} * x2;
    x0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ key0;
    x2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ key1;
    x1 = static_cast<uint32_t>(b);
    x3 = static_cast<uint32_t>(a);
  }
  return {{x0, x1, x2, x3}};
}

MAXVA_INLINE PhiloxWords philox(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  return philox_rounds(counter, [&](int round, uint32_t& round_key0, uint32_t& round_key1) {
    round_key0 = key0 + static_cast<uint32_t>(round) * kPhiloxKeyStep0;
    round_key1 = key1 + static_cast<uint32_t>(round) * kPhiloxKeyStep1;
  });
}

}  // namespace maxva
