// LaMAdam's update kernels.
#include "update_kernel.cuh"

namespace maxva::gpu {

template void launch_phase<Algorithm::kLaMAdam, false, float>(const UpdateLaunch&, Phase, unsigned,
                                                              cudaStream_t);
template void launch_phase<Algorithm::kLaMAdam, true, float>(const UpdateLaunch&, Phase, unsigned,
                                                             cudaStream_t);
template void launch_phase<Algorithm::kLaMAdam, false, double>(const UpdateLaunch&, Phase, unsigned,
                                                               cudaStream_t);
template void launch_phase<Algorithm::kLaMAdam, true, double>(const UpdateLaunch&, Phase, unsigned,
                                                              cudaStream_t);

}  // namespace maxva::gpu
