// The CUDA kernels other than the update itself, and the choice of the update's instantiation.
#include <algorithm>

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

template <typename T>
void launch_precision(const UpdateLaunch& launch, UpdateKind kind, unsigned blocks,
                      cudaStream_t stream) {
  constexpr auto madam = Algorithm::kMAdam, lamadam = Algorithm::kLaMAdam;
  const auto launch_it =
      kind.algorithm == madam
          ? (kind.amsgrad ? launch_phase<madam, true, T> : launch_phase<madam, false, T>)
          : (kind.amsgrad ? launch_phase<lamadam, true, T> : launch_phase<lamadam, false, T>);
  launch_it(launch, kind.phase, blocks, stream);
}

// Rows of `width` doubles, of which fields [first, end) count.
struct SumFields {
  int width, first, end;
};

// of_tensor[tensor.index] = the sum of the tensor's rows in of_block, in a fixed order; one block
// per tensor.
__global__ void __launch_bounds__(kThreads)
    tensor_sums_kernel(const TensorEntry* tensors, const double* of_block, SumFields fields,
                       const double* control, double* of_tensor) {
  if (skips(control)) return;
  const TensorEntry& tensor = tensors[blockIdx.x];
  const int64_t num_blocks = tensor.num_blocks();
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
__global__ void __launch_bounds__(kThreads) norm_kernel(const NormLaunch __grid_constant__ launch) {
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

void launch_update(const UpdatePlan& plan, const char* uploaded, UpdateKind kind,
                   const UpdateMemory& memory, const std::vector<TypedAddress>& g,
                   const std::vector<LearningRate>& lr, cudaStream_t stream) {
  const UpdatePlan::OnDevice tables = plan.locate(uploaded);
  UpdateLaunch launch;
  launch.control = memory.control;
  launch.grad_scale = memory.grad_scale;
  launch.norms = memory.norms;
  for (const LaunchRange& range : plan.launches()) {
    if (range.num_blocks() == 0) continue;
    launch.block_sums = memory.block_sums ? memory.block_sums + range.first_block : nullptr;
    launch.block_statistics =
        memory.statistics ? memory.block_statistics + range.first_block * kStatistics : nullptr;
    plan.fill(launch, range, tables, g, lr);
    const auto launch_it =
        kind.packing    ? (*kind.packing == Packing::kInt8 ? launch_packing<Packing::kInt8>
                                                           : launch_packing<Packing::kBFloat16>)
        : range.float64 ? launch_precision<double>
                        : launch_precision<float>;
    launch_it(launch, kind, range.num_blocks(), stream);
  }

  // also where there are no blocks: empty tensors have sums of 0
  const auto sum = [&](const double* of_block, SumFields fields, double* of_tensor) {
    launch_kernel(tensor_sums_kernel, static_cast<unsigned>(plan.tensors().size()), kThreads,
                  stream, tables.tensors, of_block, fields, memory.control, of_tensor);
  };
  if (memory.statistics) {
    sum(memory.block_statistics,
        {kStatistics, first_statistic(kind.phase), end_of_statistics(kind.phase)},
        memory.statistics);
  }
  if (kind.phase == Phase::kStates) {
    sum(reinterpret_cast<const double*>(memory.block_sums), {2, 0, 2}, memory.norms);
    return;
  }
  // the step is counted once, after the parameters have moved
  const auto num_tensors = static_cast<int64_t>(plan.tensors().size());
  const int64_t counters = std::max(num_tensors, plan.num_groups());
  launch_kernel(count_kernel, static_cast<unsigned>((counters + kThreads - 1) / kThreads), kThreads,
                stream, tables.tensors, num_tensors, tables.group_steps, plan.num_groups(),
                memory.control);
}

void launch_norm(const NormPlan& plan, char* uploaded, const std::vector<TypedAddress>& g,
                 double* block_sums, double* result, cudaStream_t stream) {
  NormLaunch launch;
  launch.all_block_sums = block_sums;
  launch.result = result;
  for (const LaunchRange& range : plan.launches()) {
    if (range.num_blocks() == 0) continue;
    plan.fill(launch, range, plan.locate(uploaded), g);
    launch.block_sums = block_sums + range.first_block;
    launch_kernel(norm_kernel, range.num_blocks(), kThreads, stream, launch);
  }
}

void launch_control(const ControlLaunch& launch, cudaStream_t stream) {
  launch_kernel(control_kernel, 1, 1, stream, launch);
}

}  // namespace maxva::gpu
