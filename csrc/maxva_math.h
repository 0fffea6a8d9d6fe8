// The MaxVA update of one coordinate: the only C++ statement of the formula, shared by the CPU and
// CUDA kernels and mirrored line by line in triton_kernels/maxva_math.py. Needs neither torch nor
// CUDA. Symbols are the paper's, tilde dropped; equation numbers are those of Zhu et al.
#pragma once

#include <cmath>

#include "step_scalars.h"

namespace maxva {

enum class Algorithm { kMAdam, kLaMAdam };

// a * b + c with one rounding: the same bits from every compiler, ISA and device that has the
// instruction (contraction is switched off in the build, so the source alone decides).
struct FusedMultiplyAdd {
  template <typename T>
  MAXVA_INLINE static T fma(T a, T b, T c) {
#if defined(__CUDA_ARCH__)
    return ::fma(a, b, c);
#else
    return std::fma(a, b, c);
#endif
  }
  template <typename T>
  MAXVA_INLINE static T divide(T a, T b) {
    return a / b;
  }
  // a <= b: never more than 1, and 1 where a == b.
  template <typename T>
  MAXVA_INLINE static T share(T a, T b) {
    return a / b;
  }
  // Whether divide() by it means something.
  template <typename T>
  MAXVA_INLINE static bool divides(T x) {
    return x != T(0);
  }
  template <typename T>
  MAXVA_INLINE static T root(T x) {
#if defined(__CUDA_ARCH__)
    return ::sqrt(x);
#else
    return std::sqrt(x);
#endif
  }
};

// For CPUs without the instruction, where std::fma is a slow library call.
struct SeparateMultiplyAdd : FusedMultiplyAdd {
  template <typename T>
  MAXVA_INLINE static T fma(T a, T b, T c) {
    return a * b + c;
  }
  // two roundings can leave b an ulp below a
  template <typename T>
  MAXVA_INLINE static T share(T a, T b) {
    const T ratio = a / b;
    return ratio < T(1) ? ratio : T(1);
  }
};

// The gradient that MaxVA observes: clipped, negated to maximize, with L2 decay.
template <typename Ops, typename T>
MAXVA_INLINE T observed_gradient(T g, T theta, const Scalars<T>& s) {
  const T clipped = s.g_factor * g;
  return s.l2 == T(0) ? clipped : Ops::fma(s.l2, theta, clipped);
}

// beta_t in its bounds, as c = 1 - beta_t.
template <typename T>
MAXVA_INLINE T clipped(T c, T w, const Scalars<T>& s) {
#if defined(__CUDA_ARCH__)
  c = ::fmax(::fmin(c, s.c_max), s.c_min);  // as below, NaN too
#else
  c = c < s.c_max ? c : s.c_max;  // 0/0 compares false and becomes beta_low
  c = c > s.c_min ? c : s.c_min;
#endif
  return w == T(0) ? s.c_init : c;  // the first observation of this coordinate, whatever the step
}

// Chooses beta_t by Eq. 6, clips it, and moves u, v, w by Eq. 2-4. Works with c = 1 - beta_t.
//
// Note [Multiplied through by w]
// With mean = u/w and var = v/w - mean^2, Eq. 6 is multiplied by (w * range)^2, which leaves one
// division: range * w * (g - mean) = g * w * range - u * range, (range * w)^2 * var =
// v * w * range^2 - (u * range)^2; s.delta has range^2 in it. `range` is a power of two near
// c_init^-1/2 (w never falls below c_init), so that no product underflows where v itself does not.
// It costs range at the other end: float32 gradients have to stay below 1.8e19 / range, which is
// 5.8e17 with betas[1] = 0.999.
//
// Returns c.
template <typename Ops, typename T>
MAXVA_INLINE T observe(T g, T& u, T& v, T& w, const Scalars<T>& s) {
  const T us = u * s.range;
  const T deviation = Ops::fma(g, w * s.range, -us);
  const T d = deviation * deviation;
  const T excess = Ops::fma(v, w * s.range_squared, -(us * us));
  const T var = excess > T(0) ? excess : T(0);
  const T numerator = w * Ops::fma(s.delta, w, d - var);
  const T c = clipped(Ops::divide(numerator, numerator + (d + var)), w, s);
  u = Ops::fma(c, g - u, u);
  v = Ops::fma(c, Ops::fma(g, g, -v), v);
  w = Ops::fma(c, T(1) - w, w);
  return c;
}

// As observe(), of mean = u/w and var = v/w - mean^2 instead of u and v: Eq. 2-4 as the weighted
// update of a mean and a variance, which survives that states are rounded from step to step. s is
// of compact states: delta and range have no factor.
template <typename Ops, typename T>
MAXVA_INLINE T observe_centered(T g, T& mean, T& var, T& w, const Scalars<T>& s) {
  const T deviation = g - mean;
  const T d = deviation * deviation;
  const T numerator = Ops::fma(w, d - var, s.delta);
  const T c = clipped(Ops::divide(numerator, numerator + (d + var)), w, s);
  w = Ops::fma(c, T(1) - w, w);
  const T lambda = Ops::share(c, w);
  mean = Ops::fma(lambda, deviation, mean);
  var = (T(1) - lambda) * Ops::fma(lambda, d, var);
  return c;
}

// x / (sqrt(vhat + eps_inside) + eps) as numerator_scale * x / denominator, one division per use.
template <typename Ops, typename T>
struct Normalizer {
  T numerator_scale, denominator;
  bool may_be_zero = true;

  // The caller knows that eps is not 0.
  MAXVA_INLINE void never_by_zero() { may_be_zero = false; }

  MAXVA_INLINE T operator()(T x) const {
    // divided first, chosen after: a division under a condition would not vectorise
    const T ratio = Ops::divide(x * numerator_scale, denominator);
    return may_be_zero && !Ops::divides(denominator)
               ? T(0)
               : ratio;  // eps = 0: v is 0, so is x, and so is the update
  }
};

// See Note [Multiplied through by w]: with ws = w * range,
// sqrt(v/w) + eps = (sqrt(v * w * range^2) + eps * ws) / ws.
template <bool kAmsgrad, typename Ops, typename T>
MAXVA_INLINE Normalizer<Ops, T> normalizer(T v, T w, T vmax, const Scalars<T>& s) {
  if constexpr (kAmsgrad) {
    return {T(1), Ops::root(vmax + s.eps_inside) + s.eps};
  } else {
    const T ws = w * s.range;
    const T radicand = s.eps_inside == T(0) ? v : Ops::fma(s.eps_inside, w, v);
    const T root = Ops::root(radicand * (w * s.range_squared));
    return {ws, Ops::fma(s.eps, ws, root)};
  }
}

// amsgrad: the maximum of the bias-corrected second moment v/w.
template <bool kAmsgrad, typename T>
MAXVA_INLINE void track_maximum(T v, T w, T& vmax) {
  if constexpr (kAmsgrad) {
    const T vhat = v / w;
    vmax = vmax > vhat ? vmax : vhat;
  }
}

// Moves the momentum m: of the gradient in MAdam (Alg. 1), of the normalised one in LaMAdam (Alg.
// 2).
template <Algorithm kAlgorithm, typename Ops, typename T>
MAXVA_INLINE void accumulate_momentum(T g, T& m, const Normalizer<Ops, T>& normalize,
                                      const Scalars<T>& s) {
  const T x = kAlgorithm == Algorithm::kMAdam ? g : normalize(g);
  m = Ops::fma(s.one_minus_alpha, x - m, m);
}

// The update direction before bias correction, from states that have been moved.
template <Algorithm kAlgorithm, typename Ops, typename T>
MAXVA_INLINE T direction(T g, T m, const Normalizer<Ops, T>& normalize, const Scalars<T>& s) {
  const T x = kAlgorithm == Algorithm::kMAdam ? g : normalize(g);
  const T looked_ahead = s.nesterov_x == T(0) ? m : Ops::fma(s.nesterov_x, x, s.nesterov_m * m);
  return kAlgorithm == Algorithm::kMAdam ? normalize(looked_ahead) : looked_ahead;
}

// The update whose norm the trust ratio compares with that of theta.
template <typename Ops, typename T>
MAXVA_INLINE T layer_update(T theta, T direction, const Scalars<T>& s) {
  return Ops::fma(s.decoupled, theta, s.bias_correction * direction);
}

// How far the update moves a parameter, without decoupled decay.
template <typename T>
MAXVA_INLINE T step_length(T direction, const Scalars<T>& s) {
  return std::fabs(s.step_size * direction);
}

// Not to be stored where s.eta is 0: that keeps the bits, whatever the update is.
template <typename Ops, typename T>
MAXVA_INLINE T moved_parameter(T theta, T direction, const Scalars<T>& s) {
  const T decayed = Ops::fma(-s.decay, theta, theta);
  return Ops::fma(-s.step_size, direction, decayed);
}

}  // namespace maxva
