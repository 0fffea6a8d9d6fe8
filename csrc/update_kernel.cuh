// The update kernel around gpu_traversal.h; each .cu file that includes this instantiates a part.
#pragma once

#include <type_traits>

#include "cuda_kernels.h"

namespace maxva::gpu {

// As kernel<<<blocks, threads, 0, stream>>>(args...), in C++.
template <typename... Params>
void launch_kernel(void (*kernel)(Params...), unsigned blocks, unsigned threads,
                   cudaStream_t stream, const std::type_identity_t<Params>&... args) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  cudaLaunchKernel(kernel, blocks, threads, pointers, 0, stream);
}

// The block's sums of N values each thread has, in thread k the k-th, in an order that depends on
// nothing but the block's size.
template <int N>
__device__ __forceinline__ double block_sums(const double (&x)[N]) {
  constexpr int kWarps = kThreads / 32;
  __shared__ double of_warp[N][kWarps];
  __syncthreads();  // a previous sum has been read
#pragma unroll
  for (int k = 0; k < N; ++k) {
    double sum = x[k];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
    if (threadIdx.x % 32 == 0) of_warp[k][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  double sum = 0;
  if (threadIdx.x < N) {
    for (int k = 0; k < kWarps; ++k) sum += of_warp[threadIdx.x][k];
  }
  return sum;
}

// The block's sum in thread 0.
__device__ __forceinline__ double block_sum(double x) { return block_sums({x}); }

// What the threads of a block have summed, where the launch wants it.
template <bool kStates, bool kCollect, typename T>
__device__ __forceinline__ void store_block_sums(const UpdateLaunch& launch,
                                                 const SumsOfSquares& squares,
                                                 const ThreadStatistics<T>& own) {
  const int k = static_cast<int>(threadIdx.x);
  if constexpr (kStates) {
    const double sum = block_sums({squares.theta, squares.update});
    if (k == 0) launch.block_sums[blockIdx.x].theta = sum;
    if (k == 1) launch.block_sums[blockIdx.x].update = sum;
  }
  if constexpr (kCollect) {
    if (!launch.block_statistics) return;
    const double values[kStatistics] = {own.gradient_squares, own.one_minus_beta, own.at_beta_min,
                                        own.at_beta_max, own.step_size};
    const double sum = block_sums(values);
    if (k < kStatistics) launch.block_statistics[int64_t{blockIdx.x} * kStatistics + k] = sum;
  }
}

// Resident blocks per multiprocessor: what keeps enough loads in flight without spilling registers.
template <bool kAmsgrad, Phase kPhase, bool kCollect, typename T>
constexpr int kMinBlocks = sizeof(T) == 8                                     ? 2
                           : kAmsgrad || kCollect || kPhase == Phase::kStates ? 3
                                                                              : 4;

template <Algorithm kAlgorithm, bool kAmsgrad, Phase kPhase, bool kCollect, typename T>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<kAmsgrad, kPhase, kCollect, T>))
    update_kernel(const UpdateLaunch __grid_constant__ launch) {
  __shared__ BlockState<T> block;
  if (threadIdx.x == 0) prepare_block(launch, blockIdx.x, kPhase, block);
  __syncthreads();
  ThreadStatistics<T> own;
  const SumsOfSquares squares = update_thread<kAlgorithm, kAmsgrad, kPhase, kCollect>(
      block, static_cast<int>(threadIdx.x), own);
  store_block_sums<kPhase == Phase::kStates, kCollect>(launch, squares, own);
}

template <Algorithm kAlgorithm, bool kAmsgrad, bool kCollect, typename T>
auto kernel_of(Phase phase) {
  constexpr auto whole = update_kernel<kAlgorithm, kAmsgrad, Phase::kWhole, kCollect, T>;
  constexpr auto states = update_kernel<kAlgorithm, kAmsgrad, Phase::kStates, kCollect, T>;
  constexpr auto parameters = update_kernel<kAlgorithm, kAmsgrad, Phase::kParameters, kCollect, T>;
  return phase == Phase::kWhole ? whole : phase == Phase::kStates ? states : parameters;
}

template <Algorithm kAlgorithm, bool kAmsgrad, typename T>
void launch_phase(const UpdateLaunch& launch, Phase phase, unsigned blocks, cudaStream_t stream) {
  const auto kernel = launch.block_statistics ? kernel_of<kAlgorithm, kAmsgrad, true, T>(phase)
                                              : kernel_of<kAlgorithm, kAmsgrad, false, T>(phase);
  launch_kernel(kernel, blocks, kThreads, stream, launch);
}

}  // namespace maxva::gpu
