// The CUDA kernels other than the update itself, and the choice of the update's instantiation.
#include "control.h"
#include "cuda_kernels.h"
#include "packed_kernel.cuh"

namespace maxva::gpu {

#define MAXVA_EXTERN(algorithm, amsgrad, T)                                                      \
  extern template void launch_phase<algorithm, amsgrad, T>(const UpdateLaunch&, Phase, unsigned, \
                                                           cudaStream_t);
MAXVA_EXTERN(Algorithm::kMAdam, false, float)
MAXVA_EXTERN(Algorithm::kMAdam, true, float)
MAXVA_EXTERN(Algorithm::kMAdam, false, double)
MAXVA_EXTERN(Algorithm::kMAdam, true, double)
MAXVA_EXTERN(Algorithm::kLaMAdam, false, float)
MAXVA_EXTERN(Algorithm::kLaMAdam, true, float)
MAXVA_EXTERN(Algorithm::kLaMAdam, false, double)
MAXVA_EXTERN(Algorithm::kLaMAdam, true, double)
extern template void launch_packing<Packing::kInt8>(const UpdateLaunch&, UpdateKind, unsigned,
                                                    cudaStream_t);
extern template void launch_packing<Packing::kBFloat16>(const UpdateLaunch&, UpdateKind, unsigned,
                                                        cudaStream_t);

namespace {

template <Algorithm kAlgorithm, typename T>
void launch_kind(const UpdateLaunch& launch, UpdateKind kind, unsigned blocks,
                 cudaStream_t stream) {
  const auto launch_it =
      kind.amsgrad ? launch_phase<kAlgorithm, true, T> : launch_phase<kAlgorithm, false, T>;
  launch_it(launch, kind.phase, blocks, stream);
}

__device__ bool skips(const double* control) { return control && control[kSkip] != 0; }

// One block per tensor.
__global__ void __launch_bounds__(kThreads)
    tensor_sums_kernel(const TensorEntry* tensors, const double* of_block, SumFields fields,
                       const double* control, double* of_tensor) {
  if (skips(control)) return;
  const TensorEntry& tensor = tensors[blockIdx.x];
  const int64_t num_blocks = (tensor.work() + kUpdateChunk - 1) / kUpdateChunk;
  for (int field = fields.first; field < fields.end; ++field) {
    double own = 0;
    for (int64_t k = threadIdx.x; k < num_blocks; k += kThreads) {
      own += of_block[(tensor.first_block + k) * fields.width + field];
    }
    const double sum = block_sum(own);
    if (threadIdx.x == 0) of_tensor[tensor.index * fields.width + field] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(const TensorEntry* tensors, int64_t num_tensors, int32_t* const* group_steps,
                 int64_t num_groups, const double* control) {
  if (skips(control)) return;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < num_tensors) *tensors[i].step += 1;
  if (i < num_groups) *group_steps[i] += 1;
}

// Note [Deterministic norm]
// Every block sums its own chunk in a fixed order. The block that finishes last adds the blocks'
// sums in the order of the chunks, so that the result does not depend on which block that is.
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ NormLaunch launch) {
  const double sum = block_sum(norm_thread(launch, blockIdx.x, static_cast<int>(threadIdx.x)));
  __shared__ bool last;
  if (threadIdx.x == 0) {
    launch.block_sums[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(launch.finished, 1u) == launch.num_blocks - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  double own = 0;
#pragma unroll 8
  for (int64_t k = threadIdx.x; k < launch.num_blocks; k += kThreads) {
    own += __ldcg(launch.all_block_sums + k);
  }
  const double total = block_sum(own);
  if (threadIdx.x == 0) {
    *launch.result = total;
    *launch.finished = 0;
  }
}

__global__ void control_kernel(const ControlLaunch launch) {
  const double sum = launch.sum_of_squares ? *launch.sum_of_squares : 0.0;
  const double scale = launch.grad_scale ? scalar_at(launch.grad_scale) : 1.0;
  make_control(sqrt(sum) / scale, launch.max_grad_norm, launch.skip_nonfinite,
               launch.found_inf && scalar_at(launch.found_inf) != 0, launch.control);
}

}  // namespace

void launch_update(const UpdateLaunch& launch, UpdateKind kind, unsigned blocks,
                   cudaStream_t stream) {
  const bool madam = kind.algorithm == Algorithm::kMAdam;
  const auto launch_it = kind.float64 ? (madam ? launch_kind<Algorithm::kMAdam, double>
                                               : launch_kind<Algorithm::kLaMAdam, double>)
                                      : (madam ? launch_kind<Algorithm::kMAdam, float>
                                               : launch_kind<Algorithm::kLaMAdam, float>);
  launch_it(launch, kind, blocks, stream);
}

void launch_packed(const UpdateLaunch& launch, Packing packing, UpdateKind kind, unsigned blocks,
                   cudaStream_t stream) {
  const auto launch_it = packing == Packing::kInt8 ? launch_packing<Packing::kInt8>
                                                   : launch_packing<Packing::kBFloat16>;
  launch_it(launch, kind, blocks, stream);
}

void launch_tensor_sums(const TensorEntry* tensors, int64_t num_tensors, const double* of_block,
                        SumFields fields, const double* control, double* of_tensor,
                        cudaStream_t stream) {
  tensor_sums_kernel<<<static_cast<unsigned>(num_tensors), kThreads, 0, stream>>>(
      tensors, of_block, fields, control, of_tensor);
}

void launch_count(const TensorEntry* tensors, int64_t num_tensors, int32_t* const* group_steps,
                  int64_t num_groups, const double* control, cudaStream_t stream) {
  const int64_t counters = num_tensors > num_groups ? num_tensors : num_groups;
  const auto blocks = static_cast<unsigned>((counters + kThreads - 1) / kThreads);
  count_kernel<<<blocks, kThreads, 0, stream>>>(tensors, num_tensors, group_steps, num_groups,
                                                control);
}

void launch_norm(const NormLaunch& launch, unsigned blocks, cudaStream_t stream) {
  norm_kernel<<<blocks, kThreads, 0, stream>>>(launch);
}

void launch_control(const ControlLaunch& launch, cudaStream_t stream) {
  control_kernel<<<1, 1, 0, stream>>>(launch);
}

}  // namespace maxva::gpu
