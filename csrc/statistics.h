// What optimizer.stats() is made of: sums over the elements of a tensor, taken in the update's
// pass.
#pragma once

#include "step_scalars.h"

namespace maxva {

// In this order, as maxva_kernels/statistics.py reads them.
enum Statistic {
  kGradientSquares,  // of the unscaled gradient, before clipping
  kOneMinusBeta,     // 1 - beta_t
  kAtBetaMin,        // coordinates whose beta_t is the lower bound
  kAtBetaMax,        // and the upper one
  kStepSize,         // |eta update|, with the trust ratio, without decoupled decay
  kStatistics
};

// Which of them a phase sets: what is observed is known where states move, the step size where
// parameters do.
MAXVA_INLINE constexpr int first_statistic(Phase phase) {
  return phase == Phase::kParameters ? kStepSize : 0;
}
MAXVA_INLINE constexpr int end_of_statistics(Phase phase) {
  return phase == Phase::kStates ? kStepSize : kStatistics;
}

}  // namespace maxva
