// Launches of the CUDA kernels. Needs CUDA, no torch; errors are left to cudaGetLastError.
#pragma once

#include <cuda_runtime_api.h>

#include "gpu_traversal.h"

namespace maxva::gpu {

struct UpdateKind {
  Algorithm algorithm;
  bool amsgrad, float64;
  Phase phase;
};

void launch_update(const UpdateLaunch& launch, UpdateKind kind, unsigned blocks,
                   cudaStream_t stream);

// Adds up the block sums of kStates: norms[tensor.index], in a fixed order.
void launch_layer_norms(const TensorEntry* tensors, int64_t num_tensors, const SumsOfSquares* sums,
                        const double* control, double* norms, cudaStream_t stream);

// step and group_step += 1, unless control says skip.
void launch_count(const TensorEntry* tensors, int64_t num_tensors, int32_t* const* group_steps,
                  int64_t num_groups, const double* control, cudaStream_t stream);

void launch_norm(const NormLaunch& launch, unsigned blocks, cudaStream_t stream);

struct ControlLaunch {
  const double* sum_of_squares;        // or null
  TypedAddress grad_scale, found_inf;  // or null
  double max_grad_norm;
  bool skip_nonfinite;
  double* control;
};

void launch_control(const ControlLaunch& launch, cudaStream_t stream);

}  // namespace maxva::gpu
