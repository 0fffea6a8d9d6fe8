// Compact states: four numbers of one element in one word, and the codes they are kept in. For host
// and device; maxva_kernels/compact.py is the definition.
#pragma once

#include <cstdint>

#include "low_precision.h"
#include "maxva_math.h"
#include "stochastic_rounding.h"

namespace maxva {

// Note [Compact states]
// Slots of a word: 0: m; 1: mean = u/w; 2: var = v/w - mean^2; 3: x, which is w folded at 1/2 so
// that 0 and 1 are both exact. The amsgrad maximum is in a list of its own.
// kBFloat16: bits 16 k and so on of an int64; the maximum a bfloat16.
// kInt8: byte k of an int32, and a byte. Its codes span 16 binades, so it has sd = sqrt(var) and
// the maximum's root instead, and of MAdam r = m / (|mean| + sd).
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

// Constants that a GPU thread takes from memory: an instruction has room for one immediate, and the
// compiler would load the other each time.
struct CodeConstants {
  uint32_t twice_bias = 0x38000000u;  // 2^-15's bits, which have none of a code's
  uint32_t around_signed = 0x88000080u, around_unsigned = 0x10000080u;  // see Note [Codes]
};

// Window k of an element's word: 16 random bits, the bytes k and k + 1 (mod 4).
template <int kWindow>
MAXVA_INLINE uint32_t window(uint32_t word) {
#if defined(__CUDA_ARCH__)
  constexpr uint32_t first = kWindow, second = (kWindow + 1) % 4;
  return __byte_perm(word, 0, 0x4400u | second << 4 | first);
#else
  if (kWindow == 2) return word >> 16;
  return (kWindow == 3 ? word >> 24 | word << 8 : word >> (8 * kWindow)) & 0xFFFFu;
#endif
}

// The window in bits 8 to 23, between bytes of `around`.
template <int kWindow>
MAXVA_INLINE uint32_t rounding_bits(uint32_t word, uint32_t around) {
#if defined(__CUDA_ARCH__)
  constexpr uint32_t first = kWindow, second = (kWindow + 1) % 4;
  return __byte_perm(word, around, 0x7004u | second << 8 | first << 4);
#else
  const uint32_t shifted = kWindow == 0   ? word << 8
                           : kWindow == 1 ? word
                           : kWindow == 2 ? word >> 8
                                          : word >> 16 | word << 16;
  return (shifted & 0x00FFFF00u) | around;
#endif
}

// Of a block, or of its amsgrad maxima: what multiplies when decoding. half and offset are the
// device's form, one fused multiplication; subnormals are no matter there.
struct DecodingScale {
  float scale, half, offset;
};

MAXVA_INLINE DecodingScale decoding_scale(uint32_t exponent) {
  const float scale = float_from_bits(exponent << 23);
  return {scale, 0.5f * scale, -kCodeBias * scale};
}

// `shifted_code`: a code where its bits are in a float. Both forms are exact.
MAXVA_INLINE float decoded_magnitude(uint32_t shifted_code, const DecodingScale& scale,
                                     const CodeConstants& constants) {
#if defined(__CUDA_ARCH__)
  // an or, for twice the value
  return ::fma(float_from_bits(shifted_code | constants.twice_bias), scale.half, scale.offset);
#else
  return (float_from_bits(shifted_code + kCodeBiasBits) - kCodeBias) * scale.scale;
#endif
}

MAXVA_INLINE float with_sign_of(float magnitude, uint32_t sign) {
  return float_from_bits(bits_of(magnitude) | (sign & 0x80000000u));
}

// The magnitude in byte kSlot of a word.
template <int kSlot>
MAXVA_INLINE float decoded_magnitude_at(uint32_t word, const DecodingScale& scale,
                                        const CodeConstants& constants) {
  const uint32_t shifted = kSlot == 3 ? word >> 4 : word << (20 - 8 * kSlot % 24);
  return decoded_magnitude(shifted & 0x07F00000u, scale, constants);
}

template <int kSlot>
MAXVA_INLINE float decoded_signed(uint32_t word, const DecodingScale& scale,
                                  const CodeConstants& constants = {}) {
  const float magnitude = decoded_magnitude_at<kSlot>(word, scale, constants);
  return with_sign_of(magnitude, word << (24 - 8 * kSlot));
}

// In byte 2.
MAXVA_INLINE float decoded_unsigned(uint32_t word, const DecodingScale& scale,
                                    const CodeConstants& constants = {}) {
  const uint32_t shifted_code = word << 3 & 0x07F80000u;
  const float value = decoded_magnitude(shifted_code, scale, constants);
#if defined(__CUDA_ARCH__)
  // what decoded_magnitude has made, too
  const bool nan = (shifted_code | constants.twice_bias) >= (0x38000000u | 252u << 19);
#else
  const bool nan = shifted_code >= 252u << 19;
#endif
  return nan ? float_from_bits(0x7FC00000u) : value;
}

// w of the folded x: x's sign says which half.
MAXVA_INLINE float unfolded(float magnitude, uint32_t sign) {
  return static_cast<int32_t>(sign) < 0 ? 1.0f - magnitude : magnitude;
}

// |x|, and what has x's sign.
MAXVA_INLINE float folded(float w) {
#if defined(__CUDA_ARCH__)
  return ::fminf(w, 1.0f - w);
#else
  return w < 1.0f - w ? w : 1.0f - w;
#endif
}
MAXVA_INLINE uint32_t fold_sign(float w) { return bits_of(0.5f - w); }

MAXVA_INLINE float folded_weight(float w) { return with_sign_of(folded(w), fold_sign(w)); }

// kInt8: the momentum from what is stored of it.
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
  return Ops::divides(unit) ? ratio : 0.0f;
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
template <int kWindow>
MAXVA_INLINE uint32_t encoded_magnitude(float y, uint32_t word, const CodeConstants& constants) {
  return (bits_of(y) << 4) + rounding_bits<kWindow>(word, constants.around_signed);
}

template <int kWindow, typename Ops>
MAXVA_INLINE uint32_t encoded_signed(float value, float inverse, uint32_t word,
                                     const CodeConstants& constants = {}) {
  const float y = Ops::fma(std::fabs(value), inverse, kCodeBias);
  return encoded_magnitude<kWindow>(y, word, constants) | (bits_of(value) & 0x80000000u);
}

// value: finite, >= 0.
template <typename Ops>
MAXVA_INLINE uint32_t encoded_unsigned(float value, float inverse, uint32_t word,
                                       const CodeConstants& constants = {}) {
  const float y = Ops::fma(value, inverse, kCodeBias);
  return (bits_of(y) << 5) + rounding_bits<3>(word, constants.around_unsigned);
}

// As above; NaN has its own code.
template <typename Ops>
MAXVA_INLINE uint32_t encoded_unsigned_or_nan(float value, float inverse, uint32_t word) {
  const uint32_t code = encoded_unsigned<Ops>(value, inverse, word);
  return value == value ? code : kNotANumberCode;
}

// Never w = 0, so that a coordinate that has been observed does not take a first step again.
MAXVA_INLINE uint32_t encoded_weight(float w, uint32_t word, const CodeConstants& constants = {}) {
  const uint32_t magnitude = encoded_magnitude<0>(folded(w) + kCodeBias, word, constants);
  const uint32_t code = magnitude | (fold_sign(w) & 0x80000000u);
  return code > 0x01000000u ? code : 0x01000000u;
}

// x rounded to bfloat16, in the upper half with anything below: from_compute, without a detour over
// 16 bits.
template <int kWindow>
MAXVA_INLINE uint32_t bfloat16_bits(float x, uint32_t word) {
  const uint32_t rounded = bits_of(x) + window<kWindow>(word);
  return x == x ? rounded : 0x7FC00000u;
}

// Two such upper halves in one word.
MAXVA_INLINE uint32_t packed_halves(uint32_t first, uint32_t second) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(first, second, 0x7632);
#else
  return first >> 16 | (second & 0xFFFF0000u);
#endif
}

// m and mean, and var and x, of kBFloat16.
MAXVA_INLINE uint32_t first_half_of_word(float m, float mean, uint32_t word) {
  return packed_halves(bfloat16_bits<1>(m, word), bfloat16_bits<2>(mean, word));
}
MAXVA_INLINE uint32_t second_half_of_word(float var, float w, uint32_t word) {
  // not asked for NaN: only a loaded w can be, and it has made mean and var NaN
  const uint32_t x = bits_of(folded_weight(w)) + window<0>(word);
  return packed_halves(bfloat16_bits<3>(var, word), x);
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
