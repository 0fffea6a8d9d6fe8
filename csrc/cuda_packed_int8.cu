// The update kernels of states in int8.
#include "packed_kernel.cuh"

namespace maxva::gpu {

template void launch_packing<Packing::kInt8>(const UpdateLaunch&, UpdateKind, unsigned,
                                             cudaStream_t);

}  // namespace maxva::gpu
