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

// Of compact states; never float64.
void launch_packed(const UpdateLaunch& launch, Packing packing, UpdateKind kind, unsigned blocks,
                   cudaStream_t stream);

// Rows of `width` doubles, of which fields [first, end) count.
struct SumFields {
  int width, first, end;
};

// of_tensor[tensor.index] = the sum of the tensor's rows in of_block, in a fixed order.
void launch_tensor_sums(const TensorEntry* tensors, int64_t num_tensors, const double* of_block,
                        SumFields fields, const double* control, double* of_tensor,
                        cudaStream_t stream);

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
