// The CPU kernels of compact states: a block is decoded into buffers, moved by the loops of
// maxva_math.h, and encoded with the scales found on the way.
#include <algorithm>

#include "compact.h"
#include "cpu_blocks.h"

namespace maxva {
namespace {

static_assert(kBlock == kStateBlock);

// What a block's states are in between; sd is the variance until the block is encoded.
struct Moments {
  alignas(64) float m[kBlock], mean[kBlock], sd[kBlock], w[kBlock];
  alignas(64) float root[kBlock];  // amsgrad: of vmax, which it is until the block is encoded
};

template <Algorithm kAlgorithm>
MAXVA_INLINE void decode_int8(const uint32_t* __restrict packed, uint32_t exponents,
                              Moments& moments, int64_t n) {
  const DecodingScale of_r = decoding_scale(exponents & 0xFFu);
  const DecodingScale of_mean = decoding_scale(exponents >> 8 & 0xFFu);
  const DecodingScale of_sd = decoding_scale(exponents >> 16 & 0xFFu);
  const DecodingScale one = decoding_scale(127);
  float* __restrict m = moments.m;
  float* __restrict mean = moments.mean;
  float* __restrict var = moments.sd;
  float* __restrict w = moments.w;
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t word = packed[i];
    const float mean_i = decoded_signed(word << 16, of_mean);
    const float sd = decoded_unsigned(word << 8, of_sd);
    m[i] = momentum<kAlgorithm>(decoded_signed(word << 24, of_r), mean_i, sd);
    mean[i] = mean_i;
    var[i] = sd * sd;
    w[i] = unfolded(std::fabs(decoded_signed(word, one)), word);
  }
}

// The word's halves are worked with as they are: the lower one is first in memory.
template <Algorithm kAlgorithm>
MAXVA_INLINE void decode_bfloat16(const uint32_t* __restrict packed, Moments& moments, int64_t n) {
  float* __restrict m = moments.m;
  float* __restrict mean = moments.mean;
  float* __restrict var = moments.sd;
  float* __restrict w = moments.w;
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t low = packed[2 * i], high = packed[2 * i + 1];
    const float mean_i = float_from_bits(low & 0xFFFF0000u), sd = float_from_bits(high << 16);
    m[i] = momentum<kAlgorithm>(float_from_bits(low << 16), mean_i, sd);
    mean[i] = mean_i;
    var[i] = sd * sd;
    w[i] = unfolded(float_from_bits(high & 0x7FFF0000u), high);
  }
}

template <Packing kPacking>
MAXVA_INLINE void decode_maximum(const void* maximum, int64_t first, uint32_t exponent,
                                 float* __restrict vmax, int64_t n) {
  if constexpr (kPacking == Packing::kInt8) {
    const DecodingScale scale = decoding_scale(exponent);
    const uint8_t* __restrict from = static_cast<const uint8_t*>(maximum) + first;
    MAXVA_VECTORIZE
    for (int64_t i = 0; i < n; ++i) {
      const float root = decoded_unsigned(uint32_t{from[i]} << 24, scale);
      vmax[i] = root * root;
    }
  } else {
    const BFloat16* __restrict from = static_cast<const BFloat16*>(maximum) + first;
    MAXVA_VECTORIZE
    for (int64_t i = 0; i < n; ++i) {
      const float root = to_compute(from[i]);
      vmax[i] = root * root;
    }
  }
}

// Leaves in the buffers what is encoded, returns the exponents of its scales.
template <Algorithm kAlgorithm, typename Ops>
MAXVA_INLINE uint32_t scale_block(Moments& moments, int64_t n) {
  float* __restrict m = moments.m;
  float* __restrict mean = moments.mean;
  float* __restrict sd = moments.sd;
  int32_t of_r = 0, of_mean = 0, of_sd = 0;
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    const float sd_i = std::sqrt(sd[i]);
    const float r = in_units<kAlgorithm, Ops>(m[i], mean[i], sd_i);
    const bool finite = is_finite(r) & is_finite(mean[i]) & is_finite(sd_i);
    m[i] = finite ? r : 0.0f;
    mean[i] = finite ? mean[i] : 0.0f;
    sd[i] = finite ? sd_i : float_from_bits(0x7FC00000u);
    of_r = std::max(of_r, magnitude_bits(m[i]));
    of_mean = std::max(of_mean, magnitude_bits(mean[i]));
    of_sd = std::max(of_sd, finite ? magnitude_bits(sd_i) : 0);
  }
  return scale_exponent(of_r) | scale_exponent(of_mean) << 8 | scale_exponent(of_sd) << 16;
}

template <typename Ops>
MAXVA_INLINE void encode_int8(const Moments& moments, uint32_t exponents,
                              const uint32_t* __restrict words, uint32_t* __restrict packed,
                              int64_t n) {
  const float for_r = inverse_scale(exponents & 0xFFu);
  const float for_mean = inverse_scale(exponents >> 8 & 0xFFu);
  const float for_sd = inverse_scale(exponents >> 16 & 0xFFu);
  const float* __restrict r = moments.m;
  const float* __restrict mean = moments.mean;
  const float* __restrict sd = moments.sd;
  const float* __restrict w = moments.w;
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    packed[i] = packed_bytes(encoded_signed<1, Ops>(r[i], for_r, words[i]),
                             encoded_signed<2, Ops>(mean[i], for_mean, words[i]),
                             encoded_unsigned<Ops>(sd[i], for_sd, words[i]),
                             encoded_weight(w[i], words[i]));
  }
}

template <Algorithm kAlgorithm, typename Ops>
MAXVA_INLINE void encode_bfloat16(const Moments& moments, const uint32_t* __restrict words,
                                  uint32_t* __restrict packed, int64_t n) {
  const float* __restrict m = moments.m;
  const float* __restrict mean = moments.mean;
  const float* __restrict var = moments.sd;
  const float* __restrict w = moments.w;
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    const float sd = std::sqrt(var[i]), r = in_units<kAlgorithm, Ops>(m[i], mean[i], sd);
    packed[2 * i] = bfloat16_bits<1>(r, words[i]) >> 16 | bfloat16_bits<2>(mean[i], words[i]);
    packed[2 * i + 1] =
        bfloat16_bits<3>(sd, words[i]) >> 16 | bfloat16_bits<0>(folded_weight(w[i]), words[i]);
  }
}

// Returns the exponent of the scale.
template <Packing kPacking, typename Ops>
MAXVA_INLINE uint32_t encode_maximum(float* __restrict root, const uint32_t* __restrict words,
                                     void* maximum, int64_t first, int64_t n) {
  if constexpr (kPacking == Packing::kInt8) {
    int32_t largest = 0;
    MAXVA_VECTORIZE
    for (int64_t i = 0; i < n; ++i) {
      const float x = std::sqrt(root[i]);
      root[i] = is_finite(x) ? x : float_from_bits(0x7FC00000u);
      largest = std::max(largest, is_finite(x) ? magnitude_bits(x) : 0);
    }
    const uint32_t exponent = scale_exponent(largest);
    const float inverse = inverse_scale(exponent);
    uint8_t* __restrict to = static_cast<uint8_t*>(maximum) + first;
    MAXVA_VECTORIZE
    for (int64_t i = 0; i < n; ++i) {
      to[i] = static_cast<uint8_t>(encoded_unsigned<Ops>(root[i], inverse, words[i]) >> 24);
    }
    return exponent;
  } else {
    uint16_t* __restrict to = static_cast<uint16_t*>(maximum) + first;
    MAXVA_VECTORIZE
    for (int64_t i = 0; i < n; ++i) {
      to[i] = static_cast<uint16_t>(bfloat16_bits<3>(std::sqrt(root[i]), words[i]) >> 16);
    }
    return 0;
  }
}

template <bool kPlain>
MAXVA_INLINE Scalars<float> scalars_of(const Scalars<float>& scalars) {
  Scalars<float> s = scalars;
  s.range = s.range_squared = 1.0f;
  if constexpr (kPlain) s.g_factor = 1.0f, s.l2 = s.nesterov_x = s.eps_inside = 0.0f;
  return s;
}

// Leaves the observed gradient in g and 1 - beta_t in c.
template <bool kPlain, typename Ops>
MAXVA_INLINE void observe_block(const float* __restrict g_raw, const float* __restrict theta,
                                float* __restrict g, Moments& moments, float* __restrict c,
                                int64_t n, const Scalars<float>& scalars) {
  const Scalars<float> s = scalars_of<kPlain>(scalars);
  float* __restrict mean = moments.mean;
  float* __restrict var = moments.sd;
  float* __restrict w = moments.w;
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    const float gi = observed_gradient<Ops>(g_raw[i], kPlain ? 0.0f : theta[i], s);
    float mean_i = mean[i], var_i = var[i], wi = w[i];
    c[i] = observe_centered<Ops>(gi, mean_i, var_i, wi, s);
    g[i] = gi;
    mean[i] = mean_i, var[i] = var_i, w[i] = wi;
  }
}

// Moves m and vmax, and theta unless kPhase is kStates. Leaves in `update` the one whose norm is
// wanted in kStates, else (but not with kPlain) the lengths of the steps.
template <bool kPlain, Phase kPhase, Algorithm kAlgorithm, bool kAmsgrad, typename Ops>
MAXVA_INLINE void move_block(const float* __restrict g, float* __restrict theta, Moments& moments,
                             float* __restrict update, int64_t n, const Scalars<float>& scalars) {
  const Scalars<float> s = scalars_of<kPlain>(scalars);
  float* __restrict m = moments.m;
  float* __restrict vmax = moments.root;
  const float* __restrict mean = moments.mean;
  const float* __restrict var = moments.sd;
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    const float vhat = Ops::fma(mean[i], mean[i], var[i]);
    float mi = m[i], maximum = kAmsgrad ? vmax[i] : 0.0f;
    track_maximum<kAmsgrad>(vhat, 1.0f, maximum);
    const auto normalize = normalizer<kAmsgrad, Ops>(vhat, 1.0f, maximum, s);
    accumulate_momentum<kAlgorithm, Ops>(g[i], mi, normalize, s);
    const float step = direction<kAlgorithm, Ops>(g[i], mi, normalize, s);
    if constexpr (kPhase == Phase::kStates) {
      update[i] = layer_update<Ops>(theta[i], step, s);
    } else {
      theta[i] = moved_parameter<Ops>(theta[i], step, s);
      if constexpr (!kPlain) update[i] = step_length(step, s);
    }
    m[i] = mi;
    if constexpr (kAmsgrad) vmax[i] = maximum;
  }
}

template <Packing kPacking, Algorithm kAlgorithm, bool kAmsgrad, typename Ops>
MAXVA_INLINE SumsOfSquares update_blocks(const PackedView& view, const Scalars<float>& scalars,
                                         Phase phase) {
  constexpr bool kInt8 = kPacking == Packing::kInt8;
  const Scalars<float> s = scalars;  // a copy that no store through a pointer can change
  SumsOfSquares sums{0, 0};
  ChunkStatistics<float> statistics;
  BlockBuffer<float> theta_buffer, g_buffer, observed, update_buffer;
  Moments moments;
  alignas(64) float c[kBlock];
  alignas(64) uint32_t words_buffer[kBlockWords];
  float* const update = update_buffer.values;
  void* const moved = view.master ? view.master : view.theta;
  const DType moved_dtype = view.master ? DType::kFloat32 : view.theta_dtype;
  const bool frozen = s.eta == 0.0f, states = phase == Phase::kStates;
  const bool collect = view.statistics != nullptr;
  const bool plain = s.g_factor == 1.0f && s.l2 == 0.0f && s.nesterov_x == 0.0f &&
                     s.eps_inside == 0.0f && !collect && !states;
  const int64_t of_row = blocks_of_row(view.row);
  for (int64_t block = view.first_block; block < view.end_block; ++block) {
    const auto [first, n] = packed_block(block, view.row, of_row);
    float* const theta = theta_buffer.load(moved_dtype, moved, first, n, frozen);
    const float* g_raw = g_buffer.load(view.g_dtype, view.g, first, n);
    if (view.grad_scale) {
      divide_block(g_raw, static_cast<float>(*view.grad_scale), observed.values, n);
      // kStates leaves the scaled gradient for kParameters, which writes it back
      if (!states) BlockBuffer<float>::store(observed.values, view.g_dtype, view.g, first, n);
      load_block(observed.values, g_buffer.values, n);
      g_raw = g_buffer.values;
    }
    auto* const packed = static_cast<uint32_t*>(view.packed) + (kInt8 ? first : 2 * first);
    const uint32_t exponents = kInt8 ? view.scale[block] : 0;
    if constexpr (kInt8) {
      decode_int8<kAlgorithm>(packed, exponents, moments, n);
    } else {
      decode_bfloat16<kAlgorithm>(packed, moments, n);
    }
    if constexpr (kAmsgrad) {
      decode_maximum<kPacking>(view.maximum, first, exponents >> 24, moments.root, n);
    }
    if (plain) {
      observe_block<true, Ops>(g_raw, theta, observed.values, moments, c, n, s);
      move_block<true, Phase::kWhole, kAlgorithm, kAmsgrad, Ops>(observed.values, theta, moments,
                                                                 update, n, s);
    } else {
      observe_block<false, Ops>(g_raw, theta, observed.values, moments, c, n, s);
      if (states) {
        move_block<false, Phase::kStates, kAlgorithm, kAmsgrad, Ops>(observed.values, theta,
                                                                     moments, update, n, s);
        sums.theta += sum_of_squares_of(theta, n);
        sums.update += sum_of_squares_of(update, n);
      } else {
        move_block<false, Phase::kWhole, kAlgorithm, kAmsgrad, Ops>(observed.values, theta, moments,
                                                                    update, n, s);
      }
    }
    if (collect) Ops::add_statistics(c, update, g_raw, n, s, statistics);
    if (states) continue;
    const uint32_t* const words = random_block<Ops>(*view.random, first, n, words_buffer);
    if constexpr (kInt8) {
      uint32_t encoded = scale_block<kAlgorithm, Ops>(moments, n);
      encode_int8<Ops>(moments, encoded, words, packed, n);
      if constexpr (kAmsgrad) {
        encoded |= encode_maximum<kPacking, Ops>(moments.root, words, view.maximum, first, n) << 24;
      }
      view.scale[block] = encoded;
    } else {
      encode_bfloat16<kAlgorithm, Ops>(moments, words, packed, n);
      if constexpr (kAmsgrad) {
        encode_maximum<kPacking, Ops>(moments.root, words, view.maximum, first, n);
      }
    }
    if (frozen) continue;
    if (view.random->on) {
      auto* __restrict to = static_cast<BFloat16*>(view.theta) + first;
      MAXVA_VECTORIZE
      for (int64_t i = 0; i < n; ++i) from_compute(theta[i], words[i], to[i]);
    } else if (view.master || theta == theta_buffer.values) {
      BlockBuffer<float>::store(theta, view.theta_dtype, view.theta, first, n);
    }
  }
  if (collect) {
    const int64_t begin = packed_block(view.first_block, view.row, of_row).first;
    const PackedBlock last = packed_block(view.end_block - 1, view.row, of_row);
    void* g = nullptr;
    with_type(view.g_dtype, view.g, begin, [&](auto* from) { g = from; });
    leave_statistics<Ops>(statistics, phase, g, view.g_dtype, last.first + last.n - begin,
                          view.grad_scale, view.statistics);
  }
  return sums;
}

#define MAXVA_UPDATE(name, packing, algorithm)                          \
  {update_packed_##name<Packing::packing, Algorithm::algorithm, false>, \
   update_packed_##name<Packing::packing, Algorithm::algorithm, true>}
#define MAXVA_KERNELS(name, target)                                                          \
  template <Packing kPacking, Algorithm kAlgorithm, bool kAmsgrad>                           \
  target SumsOfSquares update_packed_##name(const PackedView& view, const Scalars<float>& s, \
                                            Phase phase) {                                   \
    return update_blocks<kPacking, kAlgorithm, kAmsgrad, Ops_##name>(view, s, phase);        \
  }
MAXVA_FOR_EACH_ISA(MAXVA_KERNELS)

}  // namespace

#define MAXVA_TABLE(name, target)                                                \
  const PackedKernels packed_kernels_##name = {                                  \
      {{MAXVA_UPDATE(name, kInt8, kMAdam), MAXVA_UPDATE(name, kInt8, kLaMAdam)}, \
       {MAXVA_UPDATE(name, kBFloat16, kMAdam), MAXVA_UPDATE(name, kBFloat16, kLaMAdam)}}};
MAXVA_FOR_EACH_ISA(MAXVA_TABLE)

}  // namespace maxva
