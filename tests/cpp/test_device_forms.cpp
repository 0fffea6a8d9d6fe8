// The forms that only a GPU compiler sees of the shared headers, with the device's byte permutation
// in plain C++, against the description of the codes in docs/algorithm.md.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <type_traits>

#include "check.h"

// the kernels of the core are linked, too
#define maxva maxva_device
#define __host__
#define __device__
#define __forceinline__ inline
#define __CUDACC__
#define __CUDA_ARCH__ 900

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    result |= uint32_t(bytes >> 8 * (selector >> 4 * k & 7u) & 0xFFu) << 8 * k;
  }
  return result;
}

#include "compact.h"
#undef maxva

namespace {

using namespace maxva_device;

constexpr uint32_t kBiasBits = 0x37800000u;
constexpr CodeConstants kConstants;

uint32_t expected_window(uint32_t word, int k) {
  return static_cast<uint32_t>((uint64_t{word} << 32 | word) >> 8 * k) & 0xFFFFu;
}

// Of a positive quotient: `shift` bits of its float are cut off.
uint32_t expected_code(float y, int shift, uint32_t random) {
  const uint32_t added = random << (shift - 16) | 1u << (shift - 17);
  return ((std::bit_cast<uint32_t>(y) + added) >> shift) - (kBiasBits >> shift);
}

float expected_magnitude(uint32_t code, int shift, int exponent) {
  const float y = std::bit_cast<float>((code << shift) + kBiasBits);
  return std::ldexp(y - 0x1p-16f, exponent - 127);
}

uint32_t expected_half(float x, uint32_t random) {
  return x != x ? 0x7FC0u : (std::bit_cast<uint32_t>(x) + random) >> 16;
}

void test_windows(uint32_t word) {
  const uint32_t found[] = {window<0>(word), window<1>(word), window<2>(word), window<3>(word)};
  const uint32_t around = 0x88000080u;
  const uint32_t placed[] = {rounding_bits<0>(word, around), rounding_bits<1>(word, around),
                             rounding_bits<2>(word, around), rounding_bits<3>(word, around)};
  for (int k = 0; k < 4; ++k) {
    const uint32_t expected = expected_window(word, k);
    CHECK(found[k] == expected, "window %d of %08x is %x", k, word, found[k]);
    CHECK(placed[k] == (expected << 8 | around), "window %d of %08x lies as %x", k, word,
          placed[k]);
  }
}

void test_decoding() {
  for (int exponent = 1; exponent < 255; ++exponent) {
    const DecodingScale scale = decoding_scale(uint32_t(exponent));
    for (uint32_t code = 0; code < 256; ++code) {
      const float magnitude = expected_magnitude(code & 0x7F, 20, exponent);
      const float expected = code >> 7 ? -magnitude : magnitude;
      const float found[] = {decoded_signed<0>(code | 0xABCDEF00u, scale, kConstants),
                             decoded_signed<1>(code << 8 | 0xABCD00EFu, scale, kConstants),
                             decoded_signed<3>(code << 24 | 0xABCDEFu, scale, kConstants)};
      for (const float x : found) {
        CHECK(std::bit_cast<uint32_t>(x) == std::bit_cast<uint32_t>(expected),
              "code %u, scale 2^%d: %a, not %a", code, exponent - 127, x, expected);
      }
      const float unsigned_value = decoded_unsigned(code << 16 | 0xAB00CDEFu, scale, kConstants);
      if (code == 255) {
        CHECK(std::isnan(unsigned_value), "code 255 is %a", unsigned_value);
      } else if (code < 252) {  // no others are written
        CHECK(unsigned_value == expected_magnitude(code, 19, exponent), "code %u, scale 2^%d: %a",
              code, exponent - 127, unsigned_value);
      }
    }
  }
}

void test_encoding(float quotient, bool negative, uint32_t word) {
  const float x = negative ? -quotient : quotient, y = quotient + 0x1p-16f;
  const uint32_t sign = negative ? 0x80u : 0u;
  const uint32_t found[] = {encoded_signed<1, FusedMultiplyAdd>(x, 1.0f, word, kConstants) >> 24,
                            encoded_signed<2, FusedMultiplyAdd>(x, 1.0f, word, kConstants) >> 24};
  for (int k = 0; k < 2; ++k) {
    const uint32_t expected = sign | expected_code(y, 20, expected_window(word, k + 1));
    CHECK(found[k] == expected, "%a, window %d of %08x: %u, not %u", x, k + 1, word, found[k],
          expected);
  }
  const uint32_t code = encoded_unsigned<FusedMultiplyAdd>(quotient, 1.0f, word, kConstants) >> 24;
  CHECK(code == expected_code(y, 19, expected_window(word, 3)), "%a, %08x: %u", x, word, code);
}

void test_weight(float w, uint32_t word) {
  const float x = w <= 0.5f ? w : w - 1.0f;
  const uint32_t sign = w <= 0.5f ? 0u : 0x80u;
  const uint32_t code = encoded_weight(w, word, kConstants) >> 24;
  const uint32_t expected =
      sign | expected_code(std::fabs(x) + 0x1p-16f, 20, expected_window(word, 0));
  CHECK(code == std::max(expected, 1u), "w = %a, %08x: %u, not %u", w, word, code, expected);
  CHECK(std::bit_cast<uint32_t>(folded_weight(w)) ==
            (w == 1.0f ? 0x80000000u : std::bit_cast<uint32_t>(x)),
        "w = %a is folded to %a", w, folded_weight(w));
  CHECK(unfolded(std::fabs(x), sign << 24) == (w <= 0.5f ? w : 1.0f - std::fabs(x)), "w = %a", w);
}

void test_words(float m, float mean, float var, float w, uint32_t word) {
  const uint32_t first = first_half_of_word(m, mean, word);
  const uint32_t second = second_half_of_word(var, w, word);
  CHECK(first == (expected_half(m, expected_window(word, 1)) |
                  expected_half(mean, expected_window(word, 2)) << 16),
        "%a, %a, %08x: %08x", m, mean, word, first);
  CHECK(second == (expected_half(var, expected_window(word, 3)) |
                   expected_half(folded_weight(w), expected_window(word, 0)) << 16),
        "%a, %a, %08x: %08x", var, w, word, second);
  const uint32_t bytes = packed_bytes(0x11ABCDEFu, 0x22ABCDEFu, 0x33ABCDEFu, 0x44ABCDEFu);
  CHECK(bytes == 0x44332211u, "%08x", bytes);
}

// beta_t in its bounds where the division was 0/0, and at a first observation.
void test_clipping() {
  Scalars<float> s{};
  s.c_min = 0.001f, s.c_max = 0.5f, s.c_init = 0.25f;
  const float cases[][3] = {{NAN, 0.5f, 0.5f},  {0.7f, 0.5f, 0.5f},     {0.0f, 0.5f, 0.001f},
                            {0.1f, 0.5f, 0.1f}, {-INFINITY, 1, 0.001f}, {NAN, 0.0f, 0.25f}};
  for (const auto& [c, w, expected] : cases) {
    CHECK(clipped(c, w, s) == expected, "c = %g, w = %g: %g", c, w, clipped(c, w, s));
  }
}

}  // namespace

int main() {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  test_decoding();
  test_clipping();
  for (const uint32_t word : {0u, ~0u, 0x01020304u, 0xFF00FF00u}) test_windows(word);
  constexpr int kCases = 200000;
  for (int k = 0; k < kCases; ++k) {
    const uint32_t word = k % 16 ? uint32_t(random()) : k % 32 ? ~0u : 0u;
    test_windows(word);
    const float quotient = k % 9 ? 0.8125f * std::exp2(-20 * uniform(random)) : 0.0f;
    test_encoding(quotient, k % 2, word);
    const float small = std::exp2(-30 * uniform(random));
    const float w = k % 3 == 0 ? small : k % 3 == 1 ? 1 - small : uniform(random);
    test_weight(k % 7 ? w : k % 14 ? 1.0f : 0.5f, word);
    const float bad[] = {NAN, INFINITY, -INFINITY, -0.0f};
    const float m = k % 5 ? normal(random) : bad[k % 4];
    test_words(m, normal(random), k % 11 ? small : bad[k % 2], w, word);
  }
  std::printf("%d cases, %d failures\n", kCases, maxva::test::failures);
  return maxva::test::failures != 0;
}
