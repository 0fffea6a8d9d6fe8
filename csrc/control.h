// The control block's one rule: whether to skip the step, and the clip factor. For host and device.
#pragma once

#include "step_scalars.h"

namespace maxva {

// Whether a control block, if there is one, says to skip the step.
MAXVA_INLINE bool skips(const double* control) { return control && control[kSkip] != 0; }

// norm: of the unscaled gradients; beyond float32's range it counts as not finite.
MAXVA_INLINE void make_control(double norm, double max_grad_norm, bool skip_nonfinite,
                               bool found_inf, double* control) {
  const bool nonfinite = !(norm <= 3.4028234663852886e38);
  const double factor = max_grad_norm / norm;
  control[kSkip] = found_inf || (skip_nonfinite && nonfinite) ? 1.0 : 0.0;
  control[kClipFactor] = factor >= 1.0 || norm == 0.0 ? 1.0 : factor;  // NaN stays NaN
  control[kGradNorm] = norm;
}

}  // namespace maxva
