// The update kernel of compact states around gpu_packed.h; each .cu file that includes this
// instantiates one packing.
#pragma once

#include "gpu_packed.h"
#include "update_kernel.cuh"

namespace maxva::gpu {

// Floats that are not negative are ordered as their bits.
__device__ __forceinline__ float warp_largest(float x) {
#if __CUDA_ARCH__ >= 800
  return float_from_bits(__reduce_max_sync(~0u, bits_of(x)));
#else
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x = ::fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  }
  return x;
#endif
}

template <Packing kPacking, Algorithm kAlgorithm, bool kAmsgrad, bool kStates, bool kCollect,
          bool kFast>
__device__ __forceinline__ void update_lane(const PackedState& block, int index, uint32_t exponents,
                                            const Lane& at, SumsOfSquares& sums,
                                            ThreadStatistics<float>& statistics) {
  LaneMoments lane;
  move_lane<kPacking, kAlgorithm, kAmsgrad, kStates, kCollect, kFast>(block, exponents, at, lane,
                                                                      sums, statistics);
  if constexpr (!kStates) {
    uint32_t nan = 0;
    Largest largest;
    if constexpr (kPacking == Packing::kInt8) {
      largest = finish_lane<kAlgorithm, kAmsgrad>(kFast ? kVector : at.n, lane, nan);
      largest.r = warp_largest(largest.r);
      largest.mean = warp_largest(largest.mean);
      largest.sd = warp_largest(largest.sd);
      if constexpr (kAmsgrad) largest.root = warp_largest(largest.root);
    }
    store_lane<kPacking, kAmsgrad, kFast>(block, index, static_cast<int>(threadIdx.x % kLanes), at,
                                          lane, largest, nan);
  }
}

// kStates: the trust ratio's first phase, which leaves the states to the second.
template <Packing kPacking, Algorithm kAlgorithm, bool kAmsgrad, bool kStates, bool kCollect>
__global__ void __launch_bounds__(kThreads, kStates || (kAmsgrad && kCollect) ? 2 : 3)
    packed_kernel(const UpdateLaunch __grid_constant__ launch, Phase phase) {
  __shared__ PackedState block;
  if (threadIdx.x == 0) prepare_packed_block<kPacking>(launch, blockIdx.x, phase, block);
  __syncthreads();
  ThreadStatistics<float> own;
  SumsOfSquares squares{0, 0};
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  uint32_t scales = 0, exponents = 0;
  if constexpr (kPacking == Packing::kInt8) scales = scales_of_iterations(block, warp, lane);
  for (int iteration = 0, index = warp; index < block.num_state_blocks;
       ++iteration, index += kWarps) {
    const Lane at = find_lane(block, index, lane);
    if constexpr (kPacking == Packing::kInt8) exponents = __shfl_sync(~0u, scales, iteration);
    if (block.fast && at.whole) {
      // registers for loads ahead would cost warps: the next block only moves closer
      prefetch_lane<kPacking, kAmsgrad>(block, index + kWarps, at.offset + kWarps * kStateBlock);
      update_lane<kPacking, kAlgorithm, kAmsgrad, kStates, kCollect, true>(block, index, exponents,
                                                                           at, squares, own);
    } else {
      update_lane<kPacking, kAlgorithm, kAmsgrad, kStates, kCollect, false>(block, index, exponents,
                                                                            at, squares, own);
    }
  }
  store_block_sums<kStates, kCollect>(launch, squares, own);
}

template <Packing kPacking, Algorithm kAlgorithm, bool kAmsgrad>
auto packed_kernel_of(bool states, bool collect) {
  // the norms' phase is rare, and always collects: what it does not need is not stored
  constexpr auto norms = packed_kernel<kPacking, kAlgorithm, kAmsgrad, true, true>;
  constexpr auto collects = packed_kernel<kPacking, kAlgorithm, kAmsgrad, false, true>;
  constexpr auto moves = packed_kernel<kPacking, kAlgorithm, kAmsgrad, false, false>;
  return states ? norms : collect ? collects : moves;
}

template <Packing kPacking>
void launch_packing(const UpdateLaunch& launch, UpdateKind kind, unsigned blocks,
                    cudaStream_t stream) {
  constexpr auto madam = Algorithm::kMAdam, lamadam = Algorithm::kLaMAdam;
  const auto choose = kind.algorithm == madam
                          ? (kind.amsgrad ? packed_kernel_of<kPacking, madam, true>
                                          : packed_kernel_of<kPacking, madam, false>)
                          : (kind.amsgrad ? packed_kernel_of<kPacking, lamadam, true>
                                          : packed_kernel_of<kPacking, lamadam, false>);
  const auto kernel = choose(kind.phase == Phase::kStates, launch.block_statistics != nullptr);
  launch_kernel(kernel, blocks, kThreads, stream, launch, kind.phase);
}

}  // namespace maxva::gpu
