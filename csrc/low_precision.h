// bfloat16 and float16 in memory to float and back, to the nearest even, in integer and float
// operations that every compiler vectorises for any ISA.
#pragma once

#include <cstdint>
#include <cstring>

#include "step_scalars.h"

namespace maxva {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MAXVA_INLINE float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

MAXVA_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

MAXVA_INLINE float to_compute(BFloat16 x) { return float_from_bits(uint32_t{x.bits} << 16); }

MAXVA_INLINE float to_compute(Float16 x) {
  const uint32_t sign = (uint32_t{x.bits} & 0x8000u) << 16;
  const uint32_t magnitude = (uint32_t{x.bits} & 0x7FFFu) << 13;
  // the exponent is rebased by an exact multiplication, which handles subnormals too
  const float finite = float_from_bits(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7F800000u;
  return float_from_bits(sign | (magnitude >= 0x0F800000u ? special : bits_of(finite)));
}

MAXVA_INLINE float to_compute(float x) { return x; }
MAXVA_INLINE double to_compute(double x) { return x; }

MAXVA_INLINE void from_compute(float x, BFloat16& out) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out.bits = static_cast<uint16_t>(nan ? 0x7FC0u : rounded);
}

MAXVA_INLINE void from_compute(float x, Float16& out) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // normal: rebase the exponent by -112, round away the 13 low bits; 65520 and above carry into inf
  const uint32_t rebased = magnitude - 0x38000000u;
  const uint32_t normal = (rebased + 0xFFFu + ((rebased >> 13) & 1u)) >> 13;
  const uint32_t clamped = normal < 0x7C00u ? normal : 0x7C00u;
  // subnormal: beside 0.5 the last mantissa bit is 2^-24, the float16 subnormal step
  const uint32_t subnormal = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : clamped;
  out.bits = static_cast<uint16_t>(sign | (magnitude > 0x7F800000u ? 0x7E00u : finite));
}

MAXVA_INLINE void from_compute(float x, float& out) { out = x; }
MAXVA_INLINE void from_compute(double x, double& out) { out = x; }

}  // namespace maxva
