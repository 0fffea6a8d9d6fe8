// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
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
inline constexpr int kPhiloxRounds = 10;

MAXVA_INLINE PhiloxWords philox(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  uint32_t x0 = counter.x[0], x1 = counter.x[1], x2 = counter.x[2], x3 = counter.x[3];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = uint64_t{kPhiloxMultiplier0} * x0;
    const uint64_t b = uint64_t{kPhiloxMultiplier1} * x2;
    x0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ key0;
    x2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ key1;
    x1 = static_cast<uint32_t>(b);
    x3 = static_cast<uint32_t>(a);
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  return {{x0, x1, x2, x3}};
}

}  // namespace maxva
