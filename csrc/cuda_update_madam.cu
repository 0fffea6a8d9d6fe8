// MAdam's update kernels.
#include "update_kernel.cuh"

namespace maxva::gpu {

template void launch_phase<Algorithm::kMAdam, false, float>(const UpdateLaunch&, Phase, unsigned,
                                                            cudaStream_t);
template void launch_phase<Algorithm::kMAdam, true, float>(const UpdateLaunch&, Phase, unsigned,
                                                           cudaStream_t);
template void launch_phase<Algorithm::kMAdam, false, double>(const UpdateLaunch&, Phase, unsigned,
                                                             cudaStream_t);
template void launch_phase<Algorithm::kMAdam, true, double>(const UpdateLaunch&, Phase, unsigned,
                                                            cudaStream_t);

}  // namespace maxva::gpu
