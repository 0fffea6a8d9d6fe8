// The update kernels of states in bfloat16.
#include "packed_kernel.cuh"

namespace maxva::gpu {

template void launch_packing<Packing::kBFloat16>(const UpdateLaunch&, UpdateKind, unsigned,
                                                 cudaStream_t);

}  // namespace maxva::gpu
