// The scalars of one parameter tensor's step: from a group's hyper-parameters and what is known on
// the device (step count, lr, clip factor), in double, rounded once to the compute type.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define MAXVA_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define MAXVA_INLINE __forceinline
#else
// Inlined into callers that are compiled for another ISA; a separate copy would not be.
#define MAXVA_INLINE __attribute__((always_inline)) inline
#endif

namespace maxva {

// One row per parameter group, in this order, as maxva_kernels/hyper.py packs it.
struct Hyper {
  double lr;  // ignored where the group's lr is a tensor
  double alpha, beta_low, beta_high, beta_init;
  double eps, weight_decay, delta;
  double bias_correction, adam_w_mode, nesterov, maximize, eps_inside_sqrt, trust_ratio;  // 0 or 1
};
inline constexpr int kHyperFields = sizeof(Hyper) / sizeof(double);

// kWhole does everything in one pass. The trust ratio needs the norm of the whole tensor's update
// first: kStates moves the states and sums squares, kParameters then moves the parameters.
enum class Phase { kWhole, kStates, kParameters };

// {skip, clip factor, gradient norm}: written on the device, read by the update, never by the host.
enum ControlField { kSkip, kClipFactor, kGradNorm, kControlFields };

template <typename T>
struct Scalars {
  T g_factor;                // clip factor, negative to maximize
  T l2, decoupled;           // lambda of the decay in use, the other is 0
  T one_minus_alpha;         //
  T nesterov_m, nesterov_x;  // (alpha, 1 - alpha), without nesterov (1, 0)
  T c_init, c_min, c_max;    // 1 - beta_init, 1 - beta_high, 1 - beta_low
  T range, range_squared;    // see Note [Multiplied through by w]
  T delta;                   // times range_squared
  T eps, eps_inside;         // eps outside or inside the root, the other is 0
  T bias_correction;         // 1 / (1 - alpha^t)
  T step_size, decay;        // eta r / (1 - alpha^t), eta r lambda
  T eta;                     // lr
};

// t: the number of updates including this one; trust: r of LAMB, 1 without; centered: for
// observe_centered, which needs no range.
template <typename T>
MAXVA_INLINE Scalars<T> make_scalars(const Hyper& h, double lr, double t, double clip_factor,
                                     double trust, bool centered = false) {
  const double bias = h.bias_correction != 0 && h.alpha != 0 ? 1.0 / (1.0 - pow(h.alpha, t)) : 1.0;
  const double c_init = 1.0 - h.beta_init;
  const double lambda_decoupled = h.adam_w_mode != 0 ? h.weight_decay : 0.0;
  const bool nesterov = h.nesterov != 0;
  Scalars<T> s;
  s.g_factor = T(h.maximize != 0 ? -clip_factor : clip_factor);
  s.l2 = T(h.adam_w_mode != 0 ? 0.0 : h.weight_decay);
  s.decoupled = T(lambda_decoupled);
  s.one_minus_alpha = T(1.0 - h.alpha);
  s.nesterov_m = T(nesterov ? h.alpha : 1.0);
  s.nesterov_x = T(nesterov ? 1.0 - h.alpha : 0.0);
  s.c_init = T(c_init);
  s.c_min = T(1.0 - h.beta_high);
  s.c_max = T(1.0 - h.beta_low);
  const double range = centered ? 1.0 : scalbn(1.0, -ilogb(c_init) / 2);
  s.delta = T(h.delta * range * range);
  s.range = T(range);
  s.range_squared = T(range * range);
  s.eps = T(h.eps_inside_sqrt != 0 ? 0.0 : h.eps);
  s.eps_inside = T(h.eps_inside_sqrt != 0 ? h.eps : 0.0);
  s.bias_correction = T(bias);
  s.step_size = T(lr * trust * bias);
  s.decay = T(lr * trust * lambda_decoupled);
  s.eta = T(lr);
  return s;
}

// r of LAMB: 1 where it is off, where there is no decay or where a norm is 0.
MAXVA_INLINE double trust_ratio(const Hyper& h, double theta_sum_of_squares,
                                double update_sum_of_squares) {
  const bool on = h.trust_ratio != 0 && h.weight_decay != 0 && theta_sum_of_squares != 0 &&
                  update_sum_of_squares != 0;
  return on ? sqrt(theta_sum_of_squares / update_sum_of_squares) : 1.0;
}

}  // namespace maxva
