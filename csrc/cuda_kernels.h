// What the device runs for a plan of gpu_plan.h. Needs CUDA, no torch; nothing here waits for the
// device, and errors are left to cudaGetLastError.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <vector>

#include "gpu_plan.h"

namespace maxva::gpu {

struct UpdateKind {
  Algorithm algorithm;
  bool amsgrad;
  std::optional<Packing> packing;  // of compact states
  Phase phase;
};

// The device memory of an update beside its plan.
struct UpdateMemory {
  const double* control;      // or null
  TypedAddress grad_scale;    // or null
  double* norms;              // [tensors, 2]: written by kStates, read by kParameters
  double* statistics;         // [tensors, kStatistics], or null: not collected
  SumsOfSquares* block_sums;  // scratch for kStates: [blocks of the plan]
  double* block_statistics;   // scratch for statistics: [blocks of the plan, kStatistics]
};

// One phase of a step, and with its last the count of the step; g by index of the tensor, lr by
// group.
void launch_update(const UpdatePlan& plan, const char* uploaded, UpdateKind kind,
                   const UpdateMemory& memory, const std::vector<TypedAddress>& g,
                   const std::vector<LearningRate>& lr, cudaStream_t stream);

// *result = the sum of squares of all elements; block_sums: scratch, [blocks of the plan].
void launch_norm(const NormPlan& plan, char* uploaded, const std::vector<TypedAddress>& g,
                 double* block_sums, double* result, cudaStream_t stream);

struct ControlLaunch {
  const double* sum_of_squares;        // or null
  TypedAddress grad_scale, found_inf;  // or null
  double max_grad_norm;
  bool skip_nonfinite;
  double* control;
};

void launch_control(const ControlLaunch& launch, cudaStream_t stream);

}  // namespace maxva::gpu
