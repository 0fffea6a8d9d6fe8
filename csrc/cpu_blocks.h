// What the CPU kernels are made of: blocks of storage in the compute type, sums over them, random
// words, and the instruction sets that kernels are compiled for.
#pragma once

#include <type_traits>

#include "cpu_kernels.h"
#include "low_precision.h"

#if defined(__x86_64__)
#define MAXVA_X86 1
#include <immintrin.h>
#endif

namespace maxva {

// Note [Blocks]
// A chunk is worked through in blocks that stay in the first-level cache: storage types are
// converted into buffers, so that the formula is compiled for float and double alone, and the
// formula runs as two short loops. One long loop would be bound by latency: a division, a root and
// a division in a row outrun the window in which a core reorders instructions.
constexpr int64_t kBlock = 128;

// The lists never overlap. (omp simd would give each lane its own copy of every local, which GCC
// then fails to take apart again.)
#if defined(__clang__)
#define MAXVA_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define MAXVA_VECTORIZE _Pragma("GCC ivdep")
#endif

#if defined(_MSC_VER)
#define MAXVA_NO_INLINE __declspec(noinline)
#else
#define MAXVA_NO_INLINE __attribute__((noinline))
#endif

template <typename S>
using computed_t = decltype(to_compute(S{}));

inline void load_float16(const Float16* __restrict from, float* __restrict to, int64_t n) {
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) to[i] = to_compute(from[i]);
}

inline void store_float16(const float* __restrict from, Float16* __restrict to, int64_t n) {
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) from_compute(from[i], to[i]);
}

#if defined(MAXVA_X86)
// As above, by the processor's own conversions (F16C), which keep more of a NaN than that it is
// one.
__attribute__((target("avx2,f16c"))) inline void load_float16_avx2(const Float16* __restrict from,
                                                                   float* __restrict to,
                                                                   int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  for (; i < n; ++i) to[i] = _cvtsh_ss(from[i].bits);
}

__attribute__((target("avx2,f16c"))) inline void store_float16_avx2(const float* __restrict from,
                                                                    Float16* __restrict to,
                                                                    int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  for (; i < n; ++i) to[i].bits = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}
#endif

template <typename Ops, typename T, typename S>
MAXVA_INLINE void load_block(const S* __restrict from, T* __restrict to, int64_t n) {
  if constexpr (std::is_same_v<S, Float16> && std::is_same_v<T, float>) {
    Ops::load_float16(from, to, n);
  } else {
    MAXVA_VECTORIZE
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(to_compute(from[i]));
  }
}

template <typename Ops, typename T, typename S>
MAXVA_INLINE void store_block(const T* __restrict from, S* __restrict to, int64_t n) {
  if constexpr (std::is_same_v<S, Float16> && std::is_same_v<T, float>) {
    Ops::store_float16(from, to, n);
  } else {
    MAXVA_VECTORIZE
    for (int64_t i = 0; i < n; ++i) from_compute(static_cast<computed_t<S>>(from[i]), to[i]);
  }
}

// Calls fn with a typed pointer to element `offset`.
template <typename F>
MAXVA_INLINE void with_type(DType dtype, void* data, int64_t offset, const F& fn) {
  switch (dtype) {
    case DType::kFloat32: return fn(static_cast<float*>(data) + offset);
    case DType::kFloat64: return fn(static_cast<double*>(data) + offset);
    case DType::kBFloat16: return fn(static_cast<BFloat16*>(data) + offset);
    case DType::kFloat16: return fn(static_cast<Float16*>(data) + offset);
  }
}

template <typename T>
constexpr DType kComputeDType = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;

// A block of storage seen in the compute type: in place where it has that type, else a buffer.
template <typename Ops, typename T>
struct BlockBuffer {
  alignas(64) T values[kBlock];

  MAXVA_INLINE T* load(DType dtype, void* data, int64_t offset, int64_t n, bool copy = false) {
    if (dtype == kComputeDType<T> && !copy) return static_cast<T*>(data) + offset;
    with_type(dtype, data, offset, [&](auto* from) { load_block<Ops>(from, values, n); });
    return values;
  }

  MAXVA_INLINE static void store(const T* block, DType dtype, void* data, int64_t offset,
                                 int64_t n) {
    with_type(dtype, data, offset, [&](auto* to) { store_block<Ops>(block, to, n); });
  }
};

template <typename S>
MAXVA_INLINE double sum_of_squares_of(const S* __restrict g, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const double x = to_compute(g[i]);
    sum += x * x;
  }
  return sum;
}

template <typename T>
MAXVA_INLINE void divide_block(const T* __restrict from, T divisor, T* __restrict to, int64_t n) {
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] / divisor;
}

// The sums of statistics.h over a chunk, in lanes that are added up at its end: a sum in one
// variable would wait for each of its additions.
template <typename T>
struct ChunkStatistics {
  static constexpr int kLanes = 16;
  using Count = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  alignas(64) T squares[kLanes] = {}, sums[kLanes] = {}, steps[kLanes] = {};
  alignas(64) Count at_beta_min[kLanes] = {}, at_beta_max[kLanes] = {};

  template <typename Ops>
  MAXVA_INLINE void add_one(T c, T length, T g, int lane, T c_min, T c_max) {
    squares[lane] = Ops::fma(g, g, squares[lane]);
    sums[lane] += c;
    steps[lane] += length;
    at_beta_min[lane] += c == c_max;
    at_beta_max[lane] += c == c_min;
  }

  // Of a block, at most: 1 - beta_t in c, step lengths, gradients.
  template <typename Ops>
  MAXVA_INLINE void add(const T* __restrict c, const T* __restrict length,
                        const T* __restrict g_raw, int64_t n, const Scalars<T>& s) {
    const T c_min = s.c_min, c_max = s.c_max;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      MAXVA_VECTORIZE
      for (int k = 0; k < kLanes; ++k) {
        add_one<Ops>(c[i + k], length[i + k], g_raw[i + k], k, c_min, c_max);
      }
    }
    for (int k = 0; i < n; ++i, ++k) add_one<Ops>(c[i], length[i], g_raw[i], k, c_min, c_max);
  }

  MAXVA_INLINE void total(double* statistics) const {
    for (int k = 0; k < kLanes; ++k) {
      statistics[kGradientSquares] += double(squares[k]);
      statistics[kOneMinusBeta] += double(sums[k]);
      statistics[kAtBetaMin] += double(at_beta_min[k]);
      statistics[kAtBetaMax] += double(at_beta_max[k]);
      statistics[kStepSize] += double(steps[k]);
    }
  }
};

// The end of a chunk of gradients g: writes those of `statistics` that the phase sets.
template <typename Ops, typename T>
MAXVA_INLINE void leave_statistics(const ChunkStatistics<T>& statistics, Phase phase, const void* g,
                                   DType g_dtype, int64_t n, const double* grad_scale,
                                   double* of_chunk) {
  double totals[kStatistics] = {};
  statistics.total(totals);
  if (!(totals[kGradientSquares] > 1e-30 && totals[kGradientSquares] < 1e30)) {
    // some squares may be outside of float's range; kStates has not divided g in place
    const double scale = grad_scale && phase == Phase::kStates ? *grad_scale : 1;
    totals[kGradientSquares] = Ops::sum_of_squares(g, g_dtype, n) / (scale * scale);
  }
  for (int k = first_statistic(phase); k < end_of_statistics(phase); ++k) of_chunk[k] = totals[k];
}

// Note [Random words]
// kCallsAtOnce Philox calls are made whether all are needed or not, so that no loop has a
// remainder; a block's words need room for one more such turn. The calls of a block count up from
// `first` in the counter's lowest word, without a carry, so that of its first two rounds half is
// the same for all of them.
constexpr int64_t kCallsAtOnce = 8;
constexpr int64_t kBlockWords = kBlock + 4 * kCallsAtOnce;

// The calls first, first + 1, ...: at least `calls` of them.
inline void random_calls(const RandomBits& random, int64_t first, int64_t calls,
                         uint32_t* __restrict words) {
  MAXVA_VECTORIZE
  for (int64_t k = 0; k < calls; ++k) {
    const PhiloxWords of_call = random.words(first + k);
    for (int j = 0; j < 4; ++j) words[4 * k + j] = of_call.x[j];
  }
}

#if defined(MAXVA_X86)
// What the calls of a block have in common after two rounds: with a = kPhiloxMultiplier0 * the
// lowest word and, of the first round's x2, b = kPhiloxMultiplier1 * (a's upper half ^ first_x2),
// they are x0 = b's upper half ^ x0, x1 = b's lower half, x2 = a's lower half ^ x2, and x3.
struct TwoRounds {
  uint32_t first_x2, x0, x2, x3;

  TwoRounds(const RandomBits& random, int64_t first) {
    const uint64_t b = uint64_t{kPhiloxMultiplier1} * random.parameter;
    const uint32_t of_high_word = static_cast<uint32_t>(first >> 32) ^ random.key0;
    const uint64_t a =
        uint64_t{kPhiloxMultiplier0} * (static_cast<uint32_t>(b >> 32) ^ of_high_word);
    first_x2 = random.t ^ random.key1;
    x0 = static_cast<uint32_t>(b) ^ (random.key0 + kPhiloxKeyStep0);
    x2 = static_cast<uint32_t>(a >> 32) ^ (random.key1 + kPhiloxKeyStep1);
    x3 = static_cast<uint32_t>(a);
  }
};

// As random_calls, in 64-bit lanes of one call each: one instruction, which GCC does not find,
// gives both halves of a product. Only the lower halves of x0 to x3 are words.
__attribute__((target("avx2"))) inline void random_calls_avx2(const RandomBits& random,
                                                              int64_t first, int64_t calls,
                                                              uint32_t* __restrict words) {
  constexpr int kLanes = 4, kVectors = kCallsAtOnce / kLanes, kLast = kPhiloxRounds - 1;
  constexpr int kSwapHalves = 0b10110001, kUpperHalves = 0b10101010;
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  __m256i key0[kPhiloxRounds], key1[kPhiloxRounds];
  for (uint32_t round = 2; round < kPhiloxRounds; ++round) {
    key0[round] = _mm256_set1_epi64x(random.key0 + round * kPhiloxKeyStep0);
    key1[round] = _mm256_set1_epi64x(random.key1 + round * kPhiloxKeyStep1);
  }
  const TwoRounds two(random, first);
  const __m256i first_x2 = _mm256_set1_epi64x(two.first_x2), two_x0 = _mm256_set1_epi64x(two.x0),
                two_x2 = _mm256_set1_epi64x(two.x2), two_x3 = _mm256_set1_epi64x(two.x3);
  for (int64_t k = 0; k < calls; k += kCallsAtOnce) {
    __m256i x0[kVectors], x1[kVectors], x2[kVectors], x3[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      const __m256i call = _mm256_add_epi64(_mm256_set1_epi64x(first + k + j * kLanes),
                                            _mm256_set_epi64x(3, 2, 1, 0));
      const __m256i a = _mm256_mul_epu32(call, multiplier0);
      const __m256i b =
          _mm256_mul_epu32(_mm256_xor_si256(_mm256_srli_epi64(a, 32), first_x2), multiplier1);
      x0[j] = _mm256_xor_si256(_mm256_srli_epi64(b, 32), two_x0);
      x1[j] = b;
      x2[j] = _mm256_xor_si256(a, two_x2);
      x3[j] = two_x3;
    }
    for (int round = 2; round < kLast; ++round) {
      for (int j = 0; j < kVectors; ++j) {
        const __m256i a = _mm256_mul_epu32(x0[j], multiplier0);
        const __m256i b = _mm256_mul_epu32(x2[j], multiplier1);
        x0[j] = _mm256_xor_si256(_mm256_srli_epi64(b, 32), _mm256_xor_si256(x1[j], key0[round]));
        x2[j] = _mm256_xor_si256(_mm256_srli_epi64(a, 32), _mm256_xor_si256(x3[j], key1[round]));
        x1[j] = b;
        x3[j] = a;
      }
    }
    for (int j = 0; j < kVectors; ++j) {
      // x0 and x1, x2 and x3, side by side
      const __m256i b = _mm256_shuffle_epi32(_mm256_mul_epu32(x2[j], multiplier1), kSwapHalves);
      const __m256i a = _mm256_shuffle_epi32(_mm256_mul_epu32(x0[j], multiplier0), kSwapHalves);
      const __m256i with_x0 = _mm256_xor_si256(b, _mm256_xor_si256(x1[j], key0[kLast]));
      const __m256i with_x2 = _mm256_xor_si256(a, _mm256_xor_si256(x3[j], key1[kLast]));
      const __m256i x01 = _mm256_blend_epi32(with_x0, b, kUpperHalves);
      const __m256i x23 = _mm256_blend_epi32(with_x2, a, kUpperHalves);
      const __m256i calls02 = _mm256_unpacklo_epi64(x01, x23);
      const __m256i calls13 = _mm256_unpackhi_epi64(x01, x23);
      auto* const to = reinterpret_cast<__m256i*>(words + 4 * (k + j * kLanes));
      _mm256_storeu_si256(to, _mm256_permute2x128_si256(calls02, calls13, 0x20));
      _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(calls02, calls13, 0x31));
    }
  }
}

// As above, with twice the lanes, and both of a round's exclusive ors in one instruction.
__attribute__((target("avx512f"))) inline void random_calls_avx512(const RandomBits& random,
                                                                   int64_t first, int64_t calls,
                                                                   uint32_t* __restrict words) {
  static_assert(kCallsAtOnce == 8);
  constexpr int kXorOfThree = 0x96, kLast = kPhiloxRounds - 1;
  constexpr __mmask16 kLowerHalves = 0x5555;
  const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0);
  const __m512i multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
  const __m512i first_half = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i second_half = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  __m512i key0[kPhiloxRounds], key1[kPhiloxRounds];
  for (uint32_t round = 2; round < kPhiloxRounds; ++round) {
    key0[round] = _mm512_set1_epi64(random.key0 + round * kPhiloxKeyStep0);
    key1[round] = _mm512_set1_epi64(random.key1 + round * kPhiloxKeyStep1);
  }
  const TwoRounds two(random, first);
  const __m512i first_x2 = _mm512_set1_epi64(two.first_x2), two_x0 = _mm512_set1_epi64(two.x0),
                two_x2 = _mm512_set1_epi64(two.x2), two_x3 = _mm512_set1_epi64(two.x3);
  for (int64_t k = 0; k < calls; k += kCallsAtOnce) {
    const __m512i call =
        _mm512_add_epi64(_mm512_set1_epi64(first + k), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    __m512i a = _mm512_mul_epu32(call, multiplier0);
    __m512i b = _mm512_mul_epu32(_mm512_xor_si512(_mm512_srli_epi64(a, 32), first_x2), multiplier1);
    __m512i x0 = _mm512_xor_si512(_mm512_srli_epi64(b, 32), two_x0), x1 = b;
    __m512i x2 = _mm512_xor_si512(a, two_x2), x3 = two_x3;
    for (int round = 2; round < kLast; ++round) {
      a = _mm512_mul_epu32(x0, multiplier0);
      b = _mm512_mul_epu32(x2, multiplier1);
      x0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), x1, key0[round], kXorOfThree);
      x2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), x3, key1[round], kXorOfThree);
      x1 = b;
      x3 = a;
    }
    // x0 and x1, x2 and x3, side by side
    b = _mm512_ror_epi64(_mm512_mul_epu32(x2, multiplier1), 32);
    a = _mm512_ror_epi64(_mm512_mul_epu32(x0, multiplier0), 32);
    const __m512i x01 =
        _mm512_mask_ternarylogic_epi32(b, kLowerHalves, x1, key0[kLast], kXorOfThree);
    const __m512i x23 =
        _mm512_mask_ternarylogic_epi32(a, kLowerHalves, x3, key1[kLast], kXorOfThree);
    _mm512_storeu_si512(words + 4 * k, _mm512_permutex2var_epi64(x01, first_half, x23));
    _mm512_storeu_si512(words + 4 * k + 16, _mm512_permutex2var_epi64(x01, second_half, x23));
  }
}
#endif

// Random words of elements [i, i + n) of a tensor, at most a block; `words` has kBlockWords.
template <typename Ops>
MAXVA_INLINE const uint32_t* random_block(const RandomBits& random, int64_t i, int64_t n,
                                          uint32_t* __restrict words) {
  const int64_t first = (i + random.offset) / 4, skipped = (i + random.offset) % 4;
  const int64_t calls = (skipped + n + 3) / 4;
  if (!random.in_a_row || (first >> 32) != ((first + calls) >> 32)) {
    for (int64_t k = 0; k < n; ++k) words[k] = random.word(i + k);
    return words;
  }
  Ops::random_calls(random, first, calls, words);
  return words + skipped;
}

// Elements [i, i + n) of a tensor, at most a block.
template <typename Ops, typename T>
MAXVA_INLINE void store_stochastically(const T* __restrict from, BFloat16* __restrict to,
                                       const RandomBits& random, int64_t i, int64_t n) {
  alignas(64) uint32_t words[kBlockWords];
  const uint32_t* __restrict of_block = random_block<Ops>(random, i, n, words);
  MAXVA_VECTORIZE
  for (int64_t k = 0; k < n; ++k) from_compute(static_cast<float>(from[k]), of_block[k], to[k]);
}

template <typename Ops, typename T>
MAXVA_INLINE void gradient_block(const T* __restrict g_raw, const T* __restrict theta,
                                 T* __restrict g, int64_t n, const Scalars<T>& s) {
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) g[i] = observed_gradient<Ops>(g_raw[i], theta[i], s);
}

template <typename Ops>
MAXVA_INLINE double sum_of_squares_chunk(const void* g, DType dtype, int64_t n) {
  double sum = 0;
  if (dtype == DType::kFloat16) {
    alignas(64) float block[kBlock];
    for (int64_t b = 0; b < n; b += kBlock) {
      const int64_t of_block = n - b < kBlock ? n - b : kBlock;
      load_block<Ops>(static_cast<const Float16*>(g) + b, block, of_block);
      sum += sum_of_squares_of(block, of_block);
    }
    return sum;
  }
  with_type(dtype, const_cast<void*>(g), 0, [&](auto* x) { sum = sum_of_squares_of(x, n); });
  return sum;
}

// Operations of one instruction set, Ops_<name>: thin functions with a target, everything else
// inlined; but what few steps use is a function of its own, so that it is not compiled into every
// variant.
#define MAXVA_OPS(name, target, Fma, calls, load, store)                                           \
  struct Ops_##name : Fma {                                                                        \
    static constexpr auto random_calls = calls;                                                    \
    static constexpr auto load_float16 = load;                                                     \
    static constexpr auto store_float16 = store;                                                   \
    target MAXVA_NO_INLINE static double sum_of_squares(const void* g, DType dtype, int64_t n) {   \
      return sum_of_squares_chunk<Ops_##name>(g, dtype, n);                                        \
    }                                                                                              \
    template <typename T>                                                                          \
    target MAXVA_NO_INLINE static void store_stochastically(const T* from, BFloat16* to,           \
                                                            const RandomBits& random, int64_t i,   \
                                                            int64_t n) {                           \
      maxva::store_stochastically<Ops_##name>(from, to, random, i, n);                             \
    }                                                                                              \
    template <typename T>                                                                          \
    target MAXVA_NO_INLINE static void add_statistics(const T* c, const T* update, const T* g_raw, \
                                                      int64_t n, const Scalars<T>& s,              \
                                                      ChunkStatistics<T>& statistics) {            \
      statistics.template add<Ops_##name>(c, update, g_raw, n, s);                                 \
    }                                                                                              \
  };

#if defined(__FP_FAST_FMAF) || defined(__aarch64__) || defined(__FMA__)
MAXVA_OPS(baseline, , FusedMultiplyAdd, maxva::random_calls, maxva::load_float16,
          maxva::store_float16)
#else
MAXVA_OPS(baseline, , SeparateMultiplyAdd, maxva::random_calls, maxva::load_float16,
          maxva::store_float16)
#endif

#if defined(MAXVA_X86)
#define MAXVA_AVX2 __attribute__((target("avx2,fma")))
// 512-bit vectors have to be asked for: the default tuning stops at 256
#if defined(__clang__)
#define MAXVA_AVX512 __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")))
#else
#define MAXVA_AVX512 \
  __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")))
#endif
MAXVA_OPS(avx2, MAXVA_AVX2, FusedMultiplyAdd, random_calls_avx2, load_float16_avx2,
          store_float16_avx2)
MAXVA_OPS(avx512, MAXVA_AVX512, FusedMultiplyAdd, random_calls_avx512, load_float16_avx2,
          store_float16_avx2)
#endif
#undef MAXVA_OPS

// Expands define(name, target) for every instruction set of this build.
#if defined(MAXVA_X86)
#define MAXVA_FOR_EACH_ISA(define) \
  define(baseline, ) define(avx2, MAXVA_AVX2) define(avx512, MAXVA_AVX512)
#else
#define MAXVA_FOR_EACH_ISA(define) define(baseline, )
#endif

#define MAXVA_DECLARE(name, target) extern const PackedKernels packed_kernels_##name;
MAXVA_FOR_EACH_ISA(MAXVA_DECLARE)  // cpu_packed_kernels.cpp
#undef MAXVA_DECLARE

}  // namespace maxva
