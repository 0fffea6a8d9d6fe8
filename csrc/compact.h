// Compact states: four numbers of one element in one word, and the codes they are kept in. For host
// and device; maxva_kernels/compact.py is the definition.
#pragma once

#include <cstdint>

#include "low_precision.h"
#include "maxva_math.h"
#include "stochastic_rounding.h"

namespace maxva {

// Note [Compact states]
// Slots of a word: 0: r, the momentum in units of |mean| + sd (LaMAdam: the momentum); 1: mean =
// u/w; 2: sd = sqrt(v/w - mean^2); 3: x, which is w folded at 1/2 so that 0 and 1 are both exact.
// kInt8: byte k of an int32; the amsgrad maximum's root is one more byte in a list of its own.
// kBFloat16: bits 16 k and so on of an int64, and a bfloat16.
// A block of kStateBlock elements, or the shorter end of a row of dimension 0, shares four scales
// of kInt8: powers of two whose biased exponents are the bytes of one int32 (r, mean, sd, root).
enum class Packing { kInt8, kBFloat16 };
inline constexpr int kStateBlock = 128;

// Note [Codes]
// y = |value| / scale + 2^-16 is in [2^-16, 1): the leading bits of its float, counted from those
// of 2^-16, are a code of 16 binades whose first one is linear and has an exact 0. Random bits
// below the code round it stochastically. It is worked with in a word's highest byte: y's bits are
// shifted there, and the constant that takes off 2^-16's and adds half of the last random bit comes
// with the random ones.
inline constexpr float kCodeBias = 0x1p-16f;
inline constexpr uint32_t kCodeBiasBits = 0x37800000u;
inline constexpr uint32_t kNotANumberCode = 0xFF000000u;  // of sd and the root, in the highest byte

// The random bits of slot k: its 16-bit window of the element's word.
template <int kSlot>
MAXVA_INLINE uint32_t window(uint32_t word) {
  return kSlot == 0 ? word : word >> (8 * kSlot % 32) | word << ((32 - 8 * kSlot) % 32);
}

// The window in bits 8 to 23, between bytes of `around`.
template <int kSlot, uint32_t kAround>
MAXVA_INLINE uint32_t rounding_bits(uint32_t word) {
#if defined(__CUDA_ARCH__)
  constexpr uint32_t first = kSlot, second = (kSlot + 1) % 4;
  return __byte_perm(word, kAround, 0x7004u | second << 8 | first << 4);
#else
  return (window<kSlot>(word) << 8 & 0x00FFFF00u) | kAround;
#endif
}

// Of a block, or of its amsgrad maxima: what multiplies when decoding.
struct DecodingScale {
  float scale;
#if defined(__CUDACC__)
  float half,
      offset;  // the device's form, one fused multiplication; subnormals are no matter there
#endif
};

MAXVA_INLINE DecodingScale decoding_scale(uint32_t exponent) {
  DecodingScale result;
  result.scale = float_from_bits(exponent << 23);
#if defined(__CUDACC__)
  result.half = 0.5f * result.scale;
  result.offset = -kCodeBias * result.scale;
#endif
  return result;
}

// Of a magnitude whose code stands `kShift` bits above its float's last bits. Both forms are exact.
MAXVA_INLINE float decoded_magnitude(uint32_t shifted_code, const DecodingScale& scale) {
#if defined(__CUDA_ARCH__)
  // 2^-15's bits have none of the code's: an or, for twice the value
  return ::fma(float_from_bits(shifted_code | 0x38000000u), scale.half, scale.offset);
#else
  return (float_from_bits(shifted_code + kCodeBiasBits) - kCodeBias) * scale.scale;
#endif
}

MAXVA_INLINE float with_sign_of(float magnitude, uint32_t sign) {
  return float_from_bits(bits_of(magnitude) | (sign & 0x80000000u));
}

// `top`: has the code in its highest byte, and anything below.
MAXVA_INLINE float decoded_signed(uint32_t top, const DecodingScale& scale) {
  return with_sign_of(decoded_magnitude(top >> 4 & 0x07F00000u, scale), top);
}

MAXVA_INLINE float decoded_unsigned(uint32_t top, const DecodingScale& scale) {
  const float value = decoded_magnitude(top >> 5 & 0x07F80000u, scale);
  return top >= kNotANumberCode ? float_from_bits(0x7FC00000u) : value;
}

// w of the folded x: x's sign says which half.
MAXVA_INLINE float unfolded(float magnitude, uint32_t sign) {
  return static_cast<int32_t>(sign) < 0 ? 1.0f - magnitude : magnitude;
}

// |x|, and what has x's sign.
MAXVA_INLINE float folded(float w) { return w <= 0.5f ? w : 1.0f - w; }
MAXVA_INLINE uint32_t fold_sign(float w) { return bits_of(0.5f - w); }

MAXVA_INLINE float folded_weight(float w) { return with_sign_of(folded(w), fold_sign(w)); }

// The momentum from what is stored of it.
template <Algorithm kAlgorithm>
MAXVA_INLINE float momentum(float r, float mean, float sd) {
  return kAlgorithm == Algorithm::kMAdam ? r * (std::fabs(mean) + sd) : r;
}

// The reverse.
template <Algorithm kAlgorithm, typename Ops>
MAXVA_INLINE float in_units(float m, float mean, float sd) {
  if (kAlgorithm == Algorithm::kLaMAdam) return m;
  const float unit = std::fabs(mean) + sd;
  const float ratio = Ops::divide(m, unit);
  return unit == 0.0f ? 0.0f : ratio;
}

MAXVA_INLINE int32_t magnitude_bits(float x) {
  return static_cast<int32_t>(bits_of(x) & 0x7FFFFFFFu);
}

MAXVA_INLINE bool is_finite(float x) { return magnitude_bits(x) < 0x7F800000; }

// The scale's exponent for a block with this largest magnitude, whose quotient is then in [13/32,
// 13/16); 1 for 0. The bound is out of reach of a mean whose variance is finite.
MAXVA_INLINE uint32_t scale_exponent(uint32_t largest_bits) {
  const uint32_t exponent = (largest_bits + 0xB00000u) >> 23;
  return exponent < 254u ? exponent : 254u;
}

MAXVA_INLINE float inverse_scale(uint32_t exponent) {
  return float_from_bits((254u - exponent) << 23);
}

// The code in the highest byte, anything below.
template <int kSlot>
MAXVA_INLINE uint32_t encoded_magnitude(float y, uint32_t word) {
  return (bits_of(y) << 4) + rounding_bits<kSlot, 0x88000080u>(word);
}

template <int kSlot, typename Ops>
MAXVA_INLINE uint32_t encoded_signed(float value, float inverse, uint32_t word) {
  const float y = Ops::fma(std::fabs(value), inverse, kCodeBias);
  return encoded_magnitude<kSlot>(y, word) | (bits_of(value) & 0x80000000u);
}

// value: NaN, or finite.
template <typename Ops>
MAXVA_INLINE uint32_t encoded_unsigned(float value, float inverse, uint32_t word) {
  const float y = Ops::fma(value, inverse, kCodeBias);
  const uint32_t code = (bits_of(y) << 5) + rounding_bits<3, 0x10000080u>(word);
  return value == value ? code : kNotANumberCode;
}

// Never w = 0, so that a coordinate that has been observed does not take a first step again.
MAXVA_INLINE uint32_t encoded_weight(float w, uint32_t word) {
  const uint32_t code =
      encoded_magnitude<0>(folded(w) + kCodeBias, word) | (fold_sign(w) & 0x80000000u);
  return code > 0x01000000u ? code : 0x01000000u;
}

// x rounded to bfloat16 as slot kSlot of its element, in the upper half.
template <int kSlot>
MAXVA_INLINE uint32_t bfloat16_bits(float x, uint32_t word) {
  BFloat16 rounded;
  from_compute(x, window<kSlot>(word), rounded);
  return uint32_t{rounded.bits} << 16;
}

// Four codes, each in a highest byte, in one word.
MAXVA_INLINE uint32_t packed_bytes(uint32_t r, uint32_t mean, uint32_t sd, uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(__byte_perm(r, mean, 0x0073), __byte_perm(sd, x, 0x0073), 0x5410);
#else
  return r >> 24 | (mean >> 16 & 0xFF00u) | (sd >> 8 & 0xFF0000u) | (x & 0xFF000000u);
#endif
}

}  // namespace maxva
