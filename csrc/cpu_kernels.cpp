// The CPU kernels: plain loops over maxva_math.h that the compiler vectorises, compiled once per
// instruction set and chosen at run time by what the processor has.
#include "cpu_kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "low_precision.h"

#if defined(__x86_64__)
#define MAXVA_X86 1
#include <immintrin.h>
#endif

namespace maxva {
namespace {

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

template <typename T, typename S>
MAXVA_INLINE void load_block(const S* __restrict from, T* __restrict to, int64_t n) {
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(to_compute(from[i]));
}

template <typename T, typename S>
MAXVA_INLINE void store_block(const T* __restrict from, S* __restrict to, int64_t n) {
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) from_compute(static_cast<computed_t<S>>(from[i]), to[i]);
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
template <typename T>
struct BlockBuffer {
  alignas(64) T values[kBlock];

  MAXVA_INLINE T* load(DType dtype, void* data, int64_t offset, int64_t n, bool copy = false) {
    if (dtype == kComputeDType<T> && !copy) return static_cast<T*>(data) + offset;
    with_type(dtype, data, offset, [&](auto* from) { load_block(from, values, n); });
    return values;
  }

  MAXVA_INLINE static void store(const T* block, DType dtype, void* data, int64_t offset,
                                 int64_t n) {
    with_type(dtype, data, offset, [&](auto* to) { store_block(block, to, n); });
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

// Note [Random words]
// Rounding takes the low 16 bits of a word. Those of a Philox call are kept as four uint16 in a
// row; kCallsAtOnce calls are made whether all are needed or not, so that no loop has a remainder.
constexpr int64_t kCallsAtOnce = 8;

// The calls first, first + 1, ...: at least `calls` of them.
inline void random_calls(const RandomBits& random, int64_t first, int64_t calls,
                         uint16_t* __restrict low) {
  MAXVA_VECTORIZE
  for (int64_t k = 0; k < calls; ++k) {
    const PhiloxWords of_call = random.words(first + k);
    for (int j = 0; j < 4; ++j) low[4 * k + j] = static_cast<uint16_t>(of_call.x[j]);
  }
}

#if defined(MAXVA_X86)
// As above, in 64-bit lanes of one call each: one instruction, which GCC does not find, gives both
// halves of a product. Only the lower halves of x0 to x3 are words.
__attribute__((target("avx2"))) inline void random_calls_avx2(const RandomBits& random,
                                                              int64_t first, int64_t calls,
                                                              uint16_t* __restrict low) {
  constexpr int kLanes = 4, kVectors = kCallsAtOnce / kLanes;
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  const __m256i key_step0 = _mm256_set1_epi64x(kPhiloxKeyStep0);
  const __m256i key_step1 = _mm256_set1_epi64x(kPhiloxKeyStep1);
  for (int64_t k = 0; k < calls; k += kCallsAtOnce) {
    __m256i x0[kVectors], x1[kVectors], x2[kVectors], x3[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      const __m256i call = _mm256_add_epi64(_mm256_set1_epi64x(first + k + j * kLanes),
                                            _mm256_set_epi64x(3, 2, 1, 0));
      x0[j] = call;
      x1[j] = _mm256_srli_epi64(call, 32);
      x2[j] = _mm256_set1_epi64x(random.parameter);
      x3[j] = _mm256_set1_epi64x(random.t);
    }
    __m256i key0 = _mm256_set1_epi64x(random.key0), key1 = _mm256_set1_epi64x(random.key1);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int j = 0; j < kVectors; ++j) {
        const __m256i a = _mm256_mul_epu32(x0[j], multiplier0);
        const __m256i b = _mm256_mul_epu32(x2[j], multiplier1);
        x0[j] = _mm256_xor_si256(_mm256_srli_epi64(b, 32), _mm256_xor_si256(x1[j], key0));
        x2[j] = _mm256_xor_si256(_mm256_srli_epi64(a, 32), _mm256_xor_si256(x3[j], key1));
        x1[j] = b;
        x3[j] = a;
      }
      key0 = _mm256_add_epi32(key0, key_step0);
      key1 = _mm256_add_epi32(key1, key_step1);
    }
    for (int j = 0; j < kVectors; ++j) {
      // the low 16 bits of x0, x1, x2, x3 from the lane's lowest to its highest
      const __m256i x01 = _mm256_blend_epi16(x0[j], _mm256_slli_epi64(x1[j], 16), 0b10101010);
      const __m256i x23 = _mm256_blend_epi16(x2[j], _mm256_slli_epi64(x3[j], 16), 0b10101010);
      const __m256i of_calls = _mm256_blend_epi16(x01, _mm256_slli_epi64(x23, 32), 0b11001100);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + 4 * (k + j * kLanes)), of_calls);
    }
  }
}
#endif

// Random bits of elements [i, i + n) of a tensor.
template <typename Ops>
MAXVA_INLINE const uint16_t* random_block(const RandomBits& random, int64_t i, int64_t n,
                                          uint16_t* __restrict low) {
  if (!random.in_a_row) {
    for (int64_t k = 0; k < n; ++k) low[k] = static_cast<uint16_t>(random.word(i + k));
    return low;
  }
  const int64_t first = (i + random.offset) / 4, skipped = (i + random.offset) % 4;
  Ops::random_calls(random, first, (skipped + n + 3) / 4, low);
  return low + skipped;
}

// Elements [i, i + n) of a tensor, at most a block.
template <typename Ops, typename T>
MAXVA_INLINE void store_stochastically(const T* __restrict from, BFloat16* __restrict to,
                                       const RandomBits& random, int64_t i, int64_t n) {
  alignas(64) uint16_t low[kBlock + 4 * kCallsAtOnce];
  const uint16_t* __restrict of_block = random_block<Ops>(random, i, n, low);
  MAXVA_VECTORIZE
  for (int64_t k = 0; k < n; ++k) from_compute(static_cast<float>(from[k]), of_block[k], to[k]);
}

template <typename Ops, typename T>
MAXVA_INLINE void gradient_block(const T* __restrict g_raw, const T* __restrict theta,
                                 T* __restrict g, int64_t n, const Scalars<T>& s) {
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) g[i] = observed_gradient<Ops>(g_raw[i], theta[i], s);
}

// Note [Variants]
// What most steps do not use (L2, nesterov, eps inside the root; clipping and maximize) costs an
// eighth of the instructions. With kPlain its scalars are constants, and the compiler drops it.
// With kCollect a block also leaves what statistics are made of. All variants give the same bits.

// Leaves the observed gradient in g, unless it is g_raw itself (kPlain), and 1 - beta_t in c.
template <bool kPlain, bool kCollect, typename Ops, typename T>
MAXVA_INLINE void observe_block(const T* __restrict g_raw, const T* __restrict theta,
                                T* __restrict g, T* __restrict u, T* __restrict v, T* __restrict w,
                                T* __restrict c, int64_t n, const Scalars<T>& scalars) {
  Scalars<T> s = scalars;
  if constexpr (kPlain) s.g_factor = T(1), s.l2 = T(0);
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    const T gi = observed_gradient<Ops>(g_raw[i], kPlain ? T(0) : theta[i], s);
    T ui = u[i], vi = v[i], wi = w[i];
    const T ci = observe<Ops>(gi, ui, vi, wi, s);
    if constexpr (kCollect) c[i] = ci;
    if constexpr (!kPlain) g[i] = gi;
    u[i] = ui, v[i] = vi, w[i] = wi;
  }
}

// With kCollect leaves the lengths of the steps in `length`.
template <bool kPlain, bool kCollect, Algorithm kAlgorithm, bool kAmsgrad, typename Ops, typename T>
MAXVA_INLINE void whole_block(const T* __restrict g, T* __restrict theta, T* __restrict m,
                              const T* __restrict v, const T* __restrict w, T* __restrict vmax,
                              T* __restrict length, int64_t n, const Scalars<T>& scalars) {
  Scalars<T> s = scalars;
  if constexpr (kPlain) s.nesterov_x = T(0), s.eps_inside = T(0);
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    T mi = m[i], maximum = kAmsgrad ? vmax[i] : T(0);
    track_maximum<kAmsgrad>(v[i], w[i], maximum);
    const Normalizer<T> normalize = normalizer<kAmsgrad, Ops>(v[i], w[i], maximum, s);
    accumulate_momentum<kAlgorithm, Ops>(g[i], mi, normalize, s);
    const T step = direction<kAlgorithm, Ops>(g[i], mi, normalize, s);
    theta[i] = moved_parameter<Ops>(theta[i], step, s);
    if constexpr (kCollect) length[i] = step_length(step, s);
    m[i] = mi;
    if constexpr (kAmsgrad) vmax[i] = maximum;
  }
}

// As whole_block, but leaves theta and returns the update whose norm is wanted.
template <Algorithm kAlgorithm, bool kAmsgrad, typename Ops, typename T>
MAXVA_INLINE void states_block(const T* __restrict g, const T* __restrict theta, T* __restrict m,
                               const T* __restrict v, const T* __restrict w, T* __restrict vmax,
                               T* __restrict update, int64_t n, const Scalars<T>& s) {
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    T mi = m[i], maximum = kAmsgrad ? vmax[i] : T(0);
    track_maximum<kAmsgrad>(v[i], w[i], maximum);
    const Normalizer<T> normalize = normalizer<kAmsgrad, Ops>(v[i], w[i], maximum, s);
    accumulate_momentum<kAlgorithm, Ops>(g[i], mi, normalize, s);
    update[i] = layer_update<Ops>(theta[i], direction<kAlgorithm, Ops>(g[i], mi, normalize, s), s);
    m[i] = mi;
    if constexpr (kAmsgrad) vmax[i] = maximum;
  }
}

template <Algorithm kAlgorithm, bool kAmsgrad, typename Ops, typename T>
MAXVA_INLINE void parameters_block(const T* __restrict g, T* __restrict theta,
                                   const T* __restrict m, const T* __restrict v,
                                   const T* __restrict w, const T* __restrict vmax,
                                   T* __restrict length, int64_t n, const Scalars<T>& s) {
  MAXVA_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    const T maximum = kAmsgrad ? vmax[i] : T(0);
    const Normalizer<T> normalize = normalizer<kAmsgrad, Ops>(v[i], w[i], maximum, s);
    const T step = direction<kAlgorithm, Ops>(g[i], m[i], normalize, s);
    theta[i] = moved_parameter<Ops>(theta[i], step, s);
    length[i] = step_length(step, s);
  }
}

template <Algorithm kAlgorithm, bool kAmsgrad, typename Ops, typename T>
MAXVA_INLINE SumsOfSquares update_chunk(const ChunkView& chunk, const Scalars<T>& scalars,
                                        Phase phase) {
  const Scalars<T> s = scalars;  // a copy that no store through a pointer can change
  SumsOfSquares sums{0, 0};
  ChunkStatistics<T> statistics;
  BlockBuffer<T> theta_buffer, g_buffer, observed, update_buffer;
  alignas(64) T c[kBlock] = {};
  T* const update = update_buffer.values;  // or the lengths of the steps
  auto* const m = static_cast<T*>(chunk.m);
  auto* const u = static_cast<T*>(chunk.u);
  auto* const v = static_cast<T*>(chunk.v);
  auto* const w = static_cast<T*>(chunk.w);
  auto* const vmax = static_cast<T*>(chunk.vmax);
  void* const moved = chunk.master ? chunk.master : chunk.theta;
  const DType moved_dtype = chunk.master ? DType::kFloat32 : chunk.theta_dtype;
  const bool frozen = s.eta == T(0);  // lr = 0: a copy is moved, and not stored
  const bool collect = chunk.statistics != nullptr;
  const bool plain_gradient = s.g_factor == T(1) && s.l2 == T(0);
  const bool plain_direction = s.nesterov_x == T(0) && s.eps_inside == T(0);
  for (int64_t b = 0; b < chunk.n; b += kBlock) {
    const int64_t n = chunk.n - b < kBlock ? chunk.n - b : kBlock;
    T* const theta = theta_buffer.load(moved_dtype, moved, b, n, frozen);
    const T* g_raw = g_buffer.load(chunk.g_dtype, chunk.g, b, n);
    if (chunk.grad_scale) {
      divide_block(g_raw, static_cast<T>(*chunk.grad_scale), observed.values, n);
      // kStates leaves the scaled gradient for kParameters, which writes it back
      if (phase != Phase::kStates) {
        BlockBuffer<T>::store(observed.values, chunk.g_dtype, chunk.g, b, n);
      }
      load_block(observed.values, g_buffer.values, n);
      g_raw = g_buffer.values;
    }
    const T* g = observed.values;
    T* const vmax_b = kAmsgrad ? vmax + b : nullptr;
    if (phase == Phase::kParameters) {
      gradient_block<Ops>(g_raw, theta, observed.values, n, s);
      parameters_block<kAlgorithm, kAmsgrad, Ops>(g, theta, m + b, v + b, w + b, vmax_b, update, n,
                                                  s);
    } else if (plain_gradient) {
      g = g_raw;
      if (collect) {
        observe_block<true, true, Ops>(g, theta, observed.values, u + b, v + b, w + b, c, n, s);
      } else {
        observe_block<true, false, Ops>(g, theta, observed.values, u + b, v + b, w + b, c, n, s);
      }
    } else if (collect) {
      observe_block<false, true, Ops>(g_raw, theta, observed.values, u + b, v + b, w + b, c, n, s);
    } else {
      observe_block<false, false, Ops>(g_raw, theta, observed.values, u + b, v + b, w + b, c, n, s);
    }
    if (phase == Phase::kStates) {
      states_block<kAlgorithm, kAmsgrad, Ops>(g, theta, m + b, v + b, w + b, vmax_b, update, n, s);
      sums.theta += sum_of_squares_of(theta, n);
      sums.update += sum_of_squares_of(update, n);
    } else if (phase == Phase::kWhole) {
      if (plain_direction && collect) {
        whole_block<true, true, kAlgorithm, kAmsgrad, Ops>(g, theta, m + b, v + b, w + b, vmax_b,
                                                           update, n, s);
      } else if (plain_direction) {
        whole_block<true, false, kAlgorithm, kAmsgrad, Ops>(g, theta, m + b, v + b, w + b, vmax_b,
                                                            update, n, s);
      } else if (collect) {
        whole_block<false, true, kAlgorithm, kAmsgrad, Ops>(g, theta, m + b, v + b, w + b, vmax_b,
                                                            update, n, s);
      } else {
        whole_block<false, false, kAlgorithm, kAmsgrad, Ops>(g, theta, m + b, v + b, w + b, vmax_b,
                                                             update, n, s);
      }
    }
    if (collect) Ops::add_statistics(c, update, g_raw, n, s, statistics);
    if (frozen || phase == Phase::kStates) continue;
    if (chunk.random && chunk.random->on) {
      Ops::store_stochastically(theta, static_cast<BFloat16*>(chunk.theta) + b, *chunk.random,
                                chunk.first + b, n);
    } else if (chunk.master || theta == theta_buffer.values) {
      BlockBuffer<T>::store(theta, chunk.theta_dtype, chunk.theta, b, n);
    }
  }
  if (collect) {
    double totals[kStatistics] = {};
    statistics.total(totals);
    if (!(totals[kGradientSquares] > 1e-30 && totals[kGradientSquares] < 1e30)) {
      // some squares may be outside of float's range; kStates has not divided g in place
      const double scale = chunk.grad_scale && phase == Phase::kStates ? *chunk.grad_scale : 1;
      totals[kGradientSquares] =
          Ops::sum_of_squares(chunk.g, chunk.g_dtype, chunk.n) / (scale * scale);
    }
    for (int k = first_statistic(phase); k < end_of_statistics(phase); ++k) {
      chunk.statistics[k] = totals[k];
    }
  }
  return sums;
}

MAXVA_INLINE double sum_of_squares_chunk(const void* g, DType dtype, int64_t n) {
  double sum = 0;
  with_type(dtype, const_cast<void*>(g), 0, [&](auto* x) { sum = sum_of_squares_of(x, n); });
  return sum;
}

// Entry points of one instruction set: thin functions with a target, everything else inlined; but
// what few steps use is a function of its own, so that it is not compiled into every variant.
#define MAXVA_ISA(name, target, Fma, calls)                                                        \
  struct Ops_##name : Fma {                                                                        \
    static constexpr auto random_calls = calls;                                                    \
    target MAXVA_NO_INLINE static double sum_of_squares(const void* g, DType dtype, int64_t n) {   \
      return sum_of_squares_chunk(g, dtype, n);                                                    \
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
  };                                                                                               \
  template <Algorithm kAlgorithm, bool kAmsgrad, typename T>                                       \
  target SumsOfSquares update_##name(const ChunkView& chunk, const Scalars<T>& s, Phase phase) {   \
    return update_chunk<kAlgorithm, kAmsgrad, Ops_##name>(chunk, s, phase);                        \
  }                                                                                                \
  const CpuKernels kernels_##name = {                                                              \
      #name,                                                                                       \
      {{update_##name<Algorithm::kMAdam, false>, update_##name<Algorithm::kMAdam, true>},          \
       {update_##name<Algorithm::kLaMAdam, false>, update_##name<Algorithm::kLaMAdam, true>}},     \
      {{update_##name<Algorithm::kMAdam, false>, update_##name<Algorithm::kMAdam, true>},          \
       {update_##name<Algorithm::kLaMAdam, false>, update_##name<Algorithm::kLaMAdam, true>}},     \
      Ops_##name::sum_of_squares};

#if defined(__FP_FAST_FMAF) || defined(__aarch64__) || defined(__FMA__)
MAXVA_ISA(baseline, , FusedMultiplyAdd, maxva::random_calls)
#else
MAXVA_ISA(baseline, , SeparateMultiplyAdd, maxva::random_calls)
#endif

#if defined(MAXVA_X86)
// 512-bit vectors have to be asked for: the default tuning stops at 256
#if defined(__clang__)
#define MAXVA_AVX512 "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"
#else
#define MAXVA_AVX512 "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512"
#endif
MAXVA_ISA(avx2, __attribute__((target("avx2,fma"))), FusedMultiplyAdd, random_calls_avx2)
MAXVA_ISA(avx512, __attribute__((target(MAXVA_AVX512))), FusedMultiplyAdd, random_calls_avx2)

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
#endif

}  // namespace

const CpuKernels& cpu_kernels_for(const char* isa) {
  const std::string name = isa;
#if defined(MAXVA_X86)
  if ((name.empty() || name == "avx512") && has_avx512()) return kernels_avx512;
  if ((name.empty() || name == "avx2") && has_avx2()) return kernels_avx2;
#endif
  if (name.empty() || name == "baseline") return kernels_baseline;
  throw std::runtime_error(std::string(kIsaVariable) + "=" + name +
                           ": this processor or build has no such kernels; use baseline, avx2 or "
                           "avx512, or unset it");
}

const CpuKernels& cpu_kernels() {
  const char* isa = std::getenv(kIsaVariable);
  return cpu_kernels_for(isa ? isa : "");
}

}  // namespace maxva
