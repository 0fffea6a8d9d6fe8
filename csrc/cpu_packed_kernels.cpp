// The CPU kernels of compact states: a block is decoded and observed in one loop and moved in
// another, which also encodes bfloat16; int8 is encoded afterwards, when its scales are known.
#include <algorithm>
#include <iterator>
#include <type_traits>

#include "compact.h"
#include "cpu_blocks.h"

namespace maxva {
namespace {

static_assert(kBlock == kStateBlock);

// Note [Whole blocks]
// All loops run over a whole block, so that their length is known; the shorter end of a row is
// copied into buffers with zeros behind it. Those change no maximum of the block: a state and a
// gradient of 0 stay 0. (Unrolled, the loops would outgrow the cache of decoded instructions.)
#if defined(__clang__)
#define MAXVA_WHOLE_BLOCK MAXVA_VECTORIZE
#else
#define MAXVA_WHOLE_BLOCK MAXVA_VECTORIZE _Pragma("GCC unroll 1")
#endif

// What a block's states are in between.
struct Moments {
  // of kInt8 then r, mean and sd, see finish_block, and the root of vmax
  alignas(64) float m[kBlock];
  alignas(64) float mean[kBlock];
  alignas(64) float var[kBlock];
  alignas(64) float w[kBlock];
  alignas(64) float vmax[kBlock];  // with amsgrad
};

// Of a block of kInt8.
struct DecodingScales {
  DecodingScale r, mean, sd, x = decoding_scale(127);

  explicit DecodingScales(uint32_t exponents)
      : r(decoding_scale(exponents & 0xFFu)),
        mean(decoding_scale(exponents >> 8 & 0xFFu)),
        sd(decoding_scale(exponents >> 16 & 0xFFu)) {}
};

template <Packing kPacking, Algorithm kAlgorithm>
MAXVA_INLINE void decode(const uint32_t* __restrict packed, int64_t i, const DecodingScales& scales,
                         float& m, float& mean, float& var, float& w) {
  if constexpr (kPacking == Packing::kInt8) {
    const uint32_t word = packed[i];
    mean = decoded_signed<1>(word, scales.mean);
    const float sd = decoded_unsigned(word, scales.sd);
    m = momentum<kAlgorithm>(decoded_signed<0>(word, scales.r), mean, sd);
    var = sd * sd;
    w = unfolded(decoded_magnitude_at<3>(word, scales.x, {}), word);
  } else {
    // the word's halves as they are: the lower one is first in memory
    const uint32_t low = packed[2 * i], high = packed[2 * i + 1];
    m = float_from_bits(low << 16);
    mean = float_from_bits(low & 0xFFFF0000u);
    var = float_from_bits(high << 16);
    w = unfolded(float_from_bits(high & 0x7FFF0000u), high);
  }
}

template <Packing kPacking>
using StoredMaximum = std::conditional_t<kPacking == Packing::kInt8, uint8_t, BFloat16>;

template <Packing kPacking>
MAXVA_INLINE void decode_maximum(const StoredMaximum<kPacking>* __restrict maximum,
                                 uint32_t exponent, float* __restrict vmax) {
  const DecodingScale scale = decoding_scale(exponent);
  MAXVA_WHOLE_BLOCK
  for (int64_t i = 0; i < kBlock; ++i) {
    if constexpr (kPacking == Packing::kInt8) {
      const float root = decoded_unsigned(uint32_t{maximum[i]} << 16, scale);
      vmax[i] = root * root;
    } else {
      vmax[i] = to_compute(maximum[i]);
    }
  }
}

// The bits of the largest magnitudes of r, mean and sd: of inf or NaN where one is not finite.
struct Largest {
  int32_t r = 0, mean = 0, sd = 0;

  MAXVA_INLINE bool finite() const { return std::max({r, mean, sd}) < 0x7F800000; }
};

// Leaves in the buffers what kInt8 encodes: r, mean, sd.
template <Algorithm kAlgorithm, typename Ops>
MAXVA_INLINE Largest finish_block(Moments& moments) {
  float* __restrict m = moments.m;
  const float* __restrict mean = moments.mean;
  float* __restrict sd = moments.var;
  int32_t of_r = 0, of_mean = 0, of_sd = 0;
  MAXVA_WHOLE_BLOCK
  for (int64_t i = 0; i < kBlock; ++i) {
    const float sd_i = std::sqrt(sd[i]);
    const float r = in_units<kAlgorithm, Ops>(m[i], mean[i], sd_i);
    m[i] = r;
    sd[i] = sd_i;
    of_r = std::max(of_r, magnitude_bits(r));
    of_mean = std::max(of_mean, magnitude_bits(mean[i]));
    of_sd = std::max(of_sd, magnitude_bits(sd_i));
  }
  return {of_r, of_mean, of_sd};
}

// Where an element has no code: r = mean = 0 and sd NaN. Returns the maxima of the others.
inline Largest without_nonfinite(Moments& moments) {
  float *const r = moments.m, *const mean = moments.mean, *const sd = moments.var;
  Largest largest;
  for (int64_t i = 0; i < kBlock; ++i) {
    if (!is_finite(r[i]) || !is_finite(mean[i]) || !is_finite(sd[i])) {
      r[i] = mean[i] = 0.0f;
      sd[i] = NAN;
      continue;
    }
    largest.r = std::max(largest.r, magnitude_bits(r[i]));
    largest.mean = std::max(largest.mean, magnitude_bits(mean[i]));
    largest.sd = std::max(largest.sd, magnitude_bits(sd[i]));
  }
  return largest;
}

// kFinite: so are r, mean and sd of all elements.
template <bool kFinite, typename Ops>
MAXVA_INLINE void encode_int8(const Moments& moments, uint32_t exponents,
                              const uint32_t* __restrict words, uint32_t* __restrict packed) {
  const float for_r = inverse_scale(exponents & 0xFFu);
  const float for_mean = inverse_scale(exponents >> 8 & 0xFFu);
  const float for_sd = inverse_scale(exponents >> 16 & 0xFFu);
  const float* __restrict r = moments.m;
  const float* __restrict mean = moments.mean;
  const float* __restrict sd = moments.var;
  const float* __restrict w = moments.w;
  MAXVA_WHOLE_BLOCK
  for (int64_t i = 0; i < kBlock; ++i) {
    const uint32_t sd_code = kFinite ? encoded_unsigned<Ops>(sd[i], for_sd, words[i])
                                     : encoded_unsigned_or_nan<Ops>(sd[i], for_sd, words[i]);
    packed[i] = packed_bytes(encoded_signed<1, Ops>(r[i], for_r, words[i]),
                             encoded_signed<2, Ops>(mean[i], for_mean, words[i]), sd_code,
                             encoded_weight(w[i], words[i]));
  }
}

// Returns the exponent of the scale.
template <Packing kPacking, typename Ops>
MAXVA_INLINE uint32_t encode_maximum(float* __restrict vmax, const uint32_t* __restrict words,
                                     StoredMaximum<kPacking>* __restrict maximum) {
  if constexpr (kPacking == Packing::kInt8) {
    float* __restrict root = vmax;
    MAXVA_WHOLE_BLOCK
    for (int64_t i = 0; i < kBlock; ++i) {
      const float x = std::sqrt(root[i]);
      root[i] = x < INFINITY ? x : NAN;
    }
    // in a loop of its own: GCC does not vectorise one that chooses, too
    int32_t largest = 0;
    MAXVA_WHOLE_BLOCK
    for (int64_t i = 0; i < kBlock; ++i) {
      const int32_t bits = magnitude_bits(root[i]);
      largest = std::max(largest, bits < 0x7F800000 ? bits : 0);
    }
    const uint32_t exponent = scale_exponent(static_cast<uint32_t>(largest));
    const float inverse = inverse_scale(exponent);
    MAXVA_WHOLE_BLOCK
    for (int64_t i = 0; i < kBlock; ++i) {
      maximum[i] =
          static_cast<uint8_t>(encoded_unsigned_or_nan<Ops>(root[i], inverse, words[i]) >> 24);
    }
    return exponent;
  } else {
    MAXVA_WHOLE_BLOCK
    for (int64_t i = 0; i < kBlock; ++i) {
      maximum[i].bits = static_cast<uint16_t>(bfloat16_bits<3>(vmax[i], words[i]) >> 16);
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

// Decodes and observes. Leaves, unless kPlain, the observed gradient in g and 1 - beta_t in c.
template <bool kPlain, Packing kPacking, Algorithm kAlgorithm, typename Ops>
MAXVA_INLINE void observe_block(const uint32_t* __restrict packed, uint32_t exponents,
                                const float* __restrict g_raw, const float* __restrict theta,
                                float* __restrict g, Moments& moments, float* __restrict c,
                                const Scalars<float>& scalars) {
  const Scalars<float> s = scalars_of<kPlain>(scalars);
  const DecodingScales scales(exponents);
  float* __restrict m = moments.m;
  float* __restrict mean = moments.mean;
  float* __restrict var = moments.var;
  float* __restrict w = moments.w;
  MAXVA_WHOLE_BLOCK
  for (int64_t i = 0; i < kBlock; ++i) {
    const float gi = observed_gradient<Ops>(g_raw[i], kPlain ? 0.0f : theta[i], s);
    float mi, mean_i, var_i, wi;
    decode<kPacking, kAlgorithm>(packed, i, scales, mi, mean_i, var_i, wi);
    const float ci = observe_centered<Ops>(gi, mean_i, var_i, wi, s);
    if constexpr (!kPlain) c[i] = ci, g[i] = gi;
    m[i] = mi, mean[i] = mean_i, var[i] = var_i, w[i] = wi;
  }
}

// Moves m and vmax, and theta unless kPhase is kStates, and encodes what needs no scale. Leaves in
// `update` the one whose norm is wanted in kStates, else (but not with kPlain) the lengths of the
// steps.
template <bool kPlain, Phase kPhase, Packing kPacking, Algorithm kAlgorithm, bool kAmsgrad,
          typename Ops>
MAXVA_INLINE void move_block(const float* __restrict g, float* __restrict theta, Moments& moments,
                             const uint32_t* __restrict words, uint32_t* __restrict packed,
                             float* __restrict update, const Scalars<float>& scalars) {
  const Scalars<float> s = scalars_of<kPlain>(scalars);
  float* __restrict m = moments.m;
  float* __restrict vmax = moments.vmax;
  const float* __restrict mean = moments.mean;
  const float* __restrict var = moments.var;
  const float* __restrict w = moments.w;
  MAXVA_WHOLE_BLOCK
  for (int64_t i = 0; i < kBlock; ++i) {
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
    if constexpr (kPacking == Packing::kInt8) {
      m[i] = mi;
    } else if constexpr (kPhase != Phase::kStates) {
      packed[2 * i] = first_half_of_word(mi, mean[i], words[i]);
      packed[2 * i + 1] = second_half_of_word(var[i], w[i], words[i]);
    }
    if constexpr (kAmsgrad) vmax[i] = maximum;
  }
}

// Note [Blocks ahead]
// The loops over one block are longer than the window in which a core looks ahead, so that it would
// begin each block by waiting for memory. Between them it is told what the block after the next
// will read: a list at a time, as it can wait for a few lines only. These are hints: where rows end
// in shorter blocks they are of about that block, and addresses behind a list's end do no harm.
constexpr int64_t kBlocksAhead = 2;

// first: the current block's first element in the list, whose elements have `size` bytes.
MAXVA_INLINE void fetch_ahead(const void* list, int64_t first, int64_t size) {
#if defined(__GNUC__)
  constexpr uintptr_t kCacheLine = 64;
  const auto begin = reinterpret_cast<uintptr_t>(list) + (first + kBlocksAhead * kBlock) * size;
  for (uintptr_t at = begin; at < begin + kBlock * size; at += kCacheLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(at));
  }
#endif
}

// A block of a list that is worked on in place, or, where it is shorter, in a buffer.
template <typename S, int64_t kPerElement = 1>
struct WholeBlock {
  alignas(64) S buffer[kBlock * kPerElement];

  MAXVA_INLINE S* load(void* list, int64_t first, int64_t n) {
    S* const data = static_cast<S*>(list) + first * kPerElement;
    if (n == kBlock) return data;
    std::fill(std::copy_n(data, n * kPerElement, buffer), std::end(buffer), S{});
    return buffer;
  }
  MAXVA_INLINE void store(void* list, int64_t first, int64_t n) const {
    if (n == kBlock) return;
    std::copy_n(buffer, n * kPerElement, static_cast<S*>(list) + first * kPerElement);
  }
};

template <Packing kPacking, Algorithm kAlgorithm, bool kAmsgrad, typename Ops>
MAXVA_INLINE SumsOfSquares update_blocks(const PackedView& view, const Scalars<float>& scalars,
                                         Phase phase) {
  constexpr bool kInt8 = kPacking == Packing::kInt8;
  const Scalars<float> s = scalars;  // a copy that no store through a pointer can change
  SumsOfSquares sums{0, 0};
  ChunkStatistics<float> statistics;
  BlockBuffer<Ops, float> theta_buffer, g_buffer, observed, update_buffer;
  WholeBlock<uint32_t, kInt8 ? 1 : 2> packed_block_of;
  WholeBlock<StoredMaximum<kPacking>> maximum_block_of;
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
    const bool copy = n < kBlock;
    float* const theta = theta_buffer.load(moved_dtype, moved, first, n, frozen || copy);
    const float* g_raw = g_buffer.load(view.g_dtype, view.g, first, n, copy);
    if (copy) {
      std::fill(theta_buffer.values + n, std::end(theta_buffer.values), 0.0f);
      std::fill(g_buffer.values + n, std::end(g_buffer.values), 0.0f);
    }
    if (view.grad_scale) {
      divide_block(g_raw, static_cast<float>(*view.grad_scale), observed.values, kBlock);
      // kStates leaves the scaled gradient for kParameters, which writes it back
      if (!states) BlockBuffer<Ops, float>::store(observed.values, view.g_dtype, view.g, first, n);
      load_block<Ops>(observed.values, g_buffer.values, kBlock);
      g_raw = g_buffer.values;
    }
    fetch_ahead(view.g, first, size_of(view.g_dtype));
    uint32_t* const packed = packed_block_of.load(view.packed, first, n);
    const uint32_t exponents = kInt8 ? view.scale[block] : 0;
    StoredMaximum<kPacking>* maximum = nullptr;
    if constexpr (kAmsgrad) {
      fetch_ahead(view.maximum, first, sizeof(StoredMaximum<kPacking>));
      maximum = maximum_block_of.load(view.maximum, first, n);
      decode_maximum<kPacking>(maximum, exponents >> 24, moments.vmax);
    }
    plain ? observe_block<true, kPacking, kAlgorithm, Ops>(packed, exponents, g_raw, theta,
                                                           observed.values, moments, c, s)
          : observe_block<false, kPacking, kAlgorithm, Ops>(packed, exponents, g_raw, theta,
                                                            observed.values, moments, c, s);
    fetch_ahead(view.packed, first, kInt8 ? 4 : 8);
    const uint32_t* words = nullptr;
    // made while the divider is busy with the loops around it; with int8's longer loops that is
    // slower
    if (!kInt8 && !states) words = random_block<Ops>(*view.random, first, n, words_buffer);
    fetch_ahead(moved, first, size_of(moved_dtype));
    if (plain) {
      move_block<true, Phase::kWhole, kPacking, kAlgorithm, kAmsgrad, Ops>(
          g_raw, theta, moments, words, packed, update, s);
    } else if (states) {
      move_block<false, Phase::kStates, kPacking, kAlgorithm, kAmsgrad, Ops>(
          observed.values, theta, moments, words, packed, update, s);
      sums.theta += sum_of_squares_of(theta, n);
      sums.update += sum_of_squares_of(update, n);
    } else {
      move_block<false, Phase::kWhole, kPacking, kAlgorithm, kAmsgrad, Ops>(
          observed.values, theta, moments, words, packed, update, s);
    }
    if (collect) Ops::add_statistics(c, update, g_raw, n, s, statistics);
    if (states) continue;
    uint32_t encoded = 0;
    if constexpr (kInt8) {
      words = random_block<Ops>(*view.random, first, n, words_buffer);
      Largest largest = finish_block<kAlgorithm, Ops>(moments);
      const bool finite = largest.finite();
      if (!finite) largest = without_nonfinite(moments);
      encoded = scale_exponent(largest.r) | scale_exponent(largest.mean) << 8 |
                scale_exponent(largest.sd) << 16;
      if (finite) {
        encode_int8<true, Ops>(moments, encoded, words, packed);
      } else {
        encode_int8<false, Ops>(moments, encoded, words, packed);
      }
    }
    if constexpr (kAmsgrad) {
      encoded |= encode_maximum<kPacking, Ops>(moments.vmax, words, maximum) << 24;
    }
    if constexpr (kInt8) view.scale[block] = encoded;
    packed_block_of.store(view.packed, first, n);
    if constexpr (kAmsgrad) maximum_block_of.store(view.maximum, first, n);
    if (frozen) continue;
    if (view.random->on) {
      auto* __restrict to = static_cast<BFloat16*>(view.theta) + first;
      MAXVA_VECTORIZE
      for (int64_t i = 0; i < n; ++i) from_compute(theta[i], words[i], to[i]);
      continue;
    }
    if (copy && moved != view.theta) {
      BlockBuffer<Ops, float>::store(theta, DType::kFloat32, view.master, first, n);
    }
    if (view.master || theta == theta_buffer.values) {
      BlockBuffer<Ops, float>::store(theta, view.theta_dtype, view.theta, first, n);
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
