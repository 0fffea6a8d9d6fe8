// The CPU kernels: plain loops over maxva_math.h that the compiler vectorises, compiled once per
// instruction set and chosen at run time by what the processor has.
#include "cpu_kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu_blocks.h"

#if defined(MAXVA_X86)
#include <cpuid.h>
#endif

namespace maxva {
namespace {

// Note [Variants]
// What most steps do not use (L2, nesterov, eps inside the root; clipping and maximize) costs an
// eighth of the instructions. With kPlain its scalars are constants, and the compiler drops it.
// With kCollect a block also leaves what statistics are made of. All variants give the same bits.

// So many elements, at most, are added to the statistics in one call, which has its own costs.
constexpr int64_t kCollected = 4 * kBlock;
static_assert((kBlock & (kBlock - 1)) == 0);  // a remainder is a mask, not a division per block

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
    const Normalizer<Ops, T> normalize = normalizer<kAmsgrad, Ops>(v[i], w[i], maximum, s);
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
    const Normalizer<Ops, T> normalize = normalizer<kAmsgrad, Ops>(v[i], w[i], maximum, s);
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
    const Normalizer<Ops, T> normalize = normalizer<kAmsgrad, Ops>(v[i], w[i], maximum, s);
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
  BlockBuffer<Ops, T> theta_buffer, g_buffer, observed;
  alignas(64) T c_of_blocks[kCollected] = {}, update_of_blocks[kCollected];
  auto* const m = static_cast<T*>(chunk.m);
  auto* const u = static_cast<T*>(chunk.u);
  auto* const v = static_cast<T*>(chunk.v);
  auto* const w = static_cast<T*>(chunk.w);
  auto* const vmax = static_cast<T*>(chunk.vmax);
  void* const moved = chunk.master ? chunk.master : chunk.theta;
  const DType moved_dtype = chunk.master ? DType::kFloat32 : chunk.theta_dtype;
  const bool frozen = s.eta == T(0);  // lr = 0: a copy is moved, and not stored
  const bool collect = chunk.statistics != nullptr;
  // statistics are of several blocks at a time where these gradients lie in a row
  const int64_t collected =
      chunk.g_dtype == kComputeDType<T> && !chunk.grad_scale ? kCollected : kBlock;
  const bool plain_gradient = s.g_factor == T(1) && s.l2 == T(0);
  const bool plain_direction = s.nesterov_x == T(0) && s.eps_inside == T(0);
  for (int64_t b = 0; b < chunk.n; b += kBlock) {
    const int64_t n = chunk.n - b < kBlock ? chunk.n - b : kBlock;
    const int64_t waiting = b & (collected - 1);
    T* const c = c_of_blocks + waiting;
    T* const update = update_of_blocks + waiting;  // or the lengths of the steps
    T* const theta = theta_buffer.load(moved_dtype, moved, b, n, frozen);
    const T* g_raw = g_buffer.load(chunk.g_dtype, chunk.g, b, n);
    if (chunk.grad_scale) {
      divide_block(g_raw, static_cast<T>(*chunk.grad_scale), observed.values, n);
      // kStates leaves the scaled gradient for kParameters, which writes it back
      if (phase != Phase::kStates) {
        BlockBuffer<Ops, T>::store(observed.values, chunk.g_dtype, chunk.g, b, n);
      }
      load_block<Ops>(observed.values, g_buffer.values, n);
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
    if (collect && (waiting + kBlock == collected || b + n == chunk.n)) {
      Ops::add_statistics(c_of_blocks, update_of_blocks, g_raw - waiting, waiting + n, s,
                          statistics);
    }
    if (frozen || phase == Phase::kStates) continue;
    if (chunk.random && chunk.random->on) {
      Ops::store_stochastically(theta, static_cast<BFloat16*>(chunk.theta) + b, *chunk.random,
                                chunk.first + b, n);
    } else if (chunk.master || theta == theta_buffer.values) {
      BlockBuffer<Ops, T>::store(theta, chunk.theta_dtype, chunk.theta, b, n);
    }
  }
  if (collect) {
    leave_statistics<Ops>(statistics, phase, chunk.g, chunk.g_dtype, chunk.n, chunk.grad_scale,
                          chunk.statistics);
  }
  return sums;
}

#define MAXVA_KERNELS(name, target)                                                              \
  template <Algorithm kAlgorithm, bool kAmsgrad, typename T>                                     \
  target SumsOfSquares update_##name(const ChunkView& chunk, const Scalars<T>& s, Phase phase) { \
    return update_chunk<kAlgorithm, kAmsgrad, Ops_##name>(chunk, s, phase);                      \
  }                                                                                              \
  const CpuKernels kernels_##name = {                                                            \
      #name,                                                                                     \
      {{update_##name<Algorithm::kMAdam, false>, update_##name<Algorithm::kMAdam, true>},        \
       {update_##name<Algorithm::kLaMAdam, false>, update_##name<Algorithm::kLaMAdam, true>}},   \
      {{update_##name<Algorithm::kMAdam, false>, update_##name<Algorithm::kMAdam, true>},        \
       {update_##name<Algorithm::kLaMAdam, false>, update_##name<Algorithm::kLaMAdam, true>}},   \
      Ops_##name::sum_of_squares,                                                                \
      &packed_kernels_##name};

MAXVA_FOR_EACH_ISA(MAXVA_KERNELS)

#if defined(MAXVA_X86)
// Asked for by hand: not every compiler that is supported knows this one's name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
#endif

// Not read in a step: another thread may change the environment then.
std::string isa_in_use = [] {
  const char* const isa = std::getenv(kIsaVariable);
  return std::string(isa ? isa : "");
}();

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

const CpuKernels& cpu_kernels() { return cpu_kernels_for(isa_in_use.c_str()); }

void use_cpu_kernels(const char* isa) { isa_in_use = cpu_kernels_for(isa).isa; }

}  // namespace maxva
