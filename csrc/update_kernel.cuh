// The update kernel around gpu_traversal.h; each .cu file that includes this instantiates a part.
#pragma once

#include "cuda_kernels.h"

namespace maxva::gpu {

// The block's sum in thread 0, in an order that depends on nothing but the block's size.
__device__ __forceinline__ double block_sum(double x) {
  constexpr int kWarps = kThreads / 32;
  __shared__ double of_warp[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(~0u, x, offset);
  __syncthreads();  // a previous sum has been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x != 0) return 0;
  double sum = 0;
  for (int k = 0; k < kWarps; ++k) sum += of_warp[k];
  return sum;
}

// Resident blocks per multiprocessor: what keeps enough loads in flight without spilling registers.
template <bool kAmsgrad, Phase kPhase, typename T>
constexpr int kMinBlocks = sizeof(T) == 8                         ? 2
                           : kAmsgrad || kPhase == Phase::kStates ? 3
                                                                  : 4;

template <Algorithm kAlgorithm, bool kAmsgrad, Phase kPhase, typename T>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<kAmsgrad, kPhase, T>))
    update_kernel(const __grid_constant__ UpdateLaunch launch) {
  __shared__ BlockState<T> block;
  if (threadIdx.x == 0) prepare_block(launch, blockIdx.x, kPhase, block);
  __syncthreads();
  const SumsOfSquares sums =
      update_thread<kAlgorithm, kAmsgrad, kPhase>(block, static_cast<int>(threadIdx.x));
  if constexpr (kPhase == Phase::kStates) {
    const double theta = block_sum(sums.theta), update = block_sum(sums.update);
    if (threadIdx.x == 0) launch.block_sums[blockIdx.x] = {theta, update};
  }
}

template <Algorithm kAlgorithm, bool kAmsgrad, typename T>
void launch_phase(const UpdateLaunch& launch, Phase phase, unsigned blocks, cudaStream_t stream) {
  constexpr auto whole = update_kernel<kAlgorithm, kAmsgrad, Phase::kWhole, T>;
  constexpr auto states = update_kernel<kAlgorithm, kAmsgrad, Phase::kStates, T>;
  constexpr auto parameters = update_kernel<kAlgorithm, kAmsgrad, Phase::kParameters, T>;
  const auto kernel = phase == Phase::kWhole    ? whole
                      : phase == Phase::kStates ? states
                                                : parameters;
  kernel<<<blocks, kThreads, 0, stream>>>(launch);
}

}  // namespace maxva::gpu
