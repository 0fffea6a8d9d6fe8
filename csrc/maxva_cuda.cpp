// The CUDA backend: plans that are uploaded once and found again, and launches on torch's stream.
// Nothing here waits for the device.
#if defined(MAXVA_WITH_CUDA)

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>
#include <list>
#include <memory>
#include <mutex>

#include "backend.h"
#include "cuda_kernels.h"

namespace maxva {
namespace {

using c10::cuda::CUDAStream;

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

// Device memory that holds a plan; shared, so that no launch loses it to another thread.
using Uploaded = std::shared_ptr<char>;

// Through torch's allocator: the memory belongs to the stream, and so does everything that uses it.
Uploaded upload(const std::vector<char>& bytes, const at::Device& device) {
  const auto size = static_cast<int64_t>(bytes.size());
  const at::Tensor host =
      at::empty({size}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  std::memcpy(host.mutable_data_ptr(), bytes.data(), bytes.size());
  at::Tensor memory = at::empty({size}, at::TensorOptions().dtype(at::kByte).device(device));
  memory.copy_(host, /*non_blocking=*/true);
  char* data = static_cast<char*>(memory.mutable_data_ptr());
  return {data, [memory = std::move(memory)](char*) {}};
}

// Note [Plans in graphs]
// A captured graph keeps the addresses it was captured with, so a plan uploaded during capture has
// memory that torch's allocator never sees (that of the graph's own pool may be given to a later
// tensor of the graph) and is never freed: a few hundred bytes per tensor and 8 per chunk. The copy
// is made at once, on a stream of its own that is not being captured, so that the graph does not
// repeat it.
Uploaded upload_for_graph(const std::vector<char>& bytes) {
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed{cudaStreamCaptureModeRelaxed};
  cudaStream_t stream = nullptr;
  C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  char* memory = nullptr;
  cudaError_t error = cudaMalloc(&memory, bytes.size());
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(memory, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  if (error != cudaSuccess) cudaFree(memory);
  C10_CUDA_CHECK(error);
  return {memory, [](char*) {}};
}

// The most recently used plans. An entry serves one stream only: the upload is ordered there.
class PlanCache {
 public:
  template <typename Plan>
  Uploaded find_or_upload(const Plan& plan, const CUDAStream& stream) {
    if (is_capturing()) return upload_for_graph(plan.image().bytes());
    const gpu::Image key = plan.key();
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
      if (entry->stream == stream && entry->key == key.bytes()) {
        entries_.splice(entries_.begin(), entries_, entry);
        return entry->uploaded;
      }
    }
    entries_.push_front({stream, key.bytes(), upload(plan.image().bytes(), stream.device())});
    if (entries_.size() > kCapacity) entries_.pop_back();
    return entries_.front().uploaded;
  }

 private:
  static constexpr size_t kCapacity = 32;

  struct Entry {
    CUDAStream stream;
    std::vector<char> key;
    Uploaded uploaded;
  };

  std::mutex mutex_;
  std::list<Entry> entries_;
};

// Never destroyed: torch's allocator may be gone by then.
PlanCache& update_plans() {
  static auto* const cache = new PlanCache;
  return *cache;
}

PlanCache& norm_plans() {
  static auto* const cache = new PlanCache;
  return *cache;
}

gpu::TypedAddress typed_address(const at::Tensor& tensor) {
  return gpu::typed_address(tensor.const_data_ptr(), dtype_of(tensor));
}

// A one-element tensor of any dtype; what has to be converted is kept in `kept`.
gpu::TypedAddress scalar_address(const std::optional<at::Tensor>& scalar,
                                 std::vector<at::Tensor>& kept) {
  if (!scalar) return gpu::typed_address(nullptr, DType::kFloat32);
  switch (scalar->scalar_type()) {
    case at::kDouble:
    case at::kFloat:
    case at::kBFloat16:
    case at::kHalf: return typed_address(*scalar);
    default: kept.push_back(scalar->to(at::kDouble)); return typed_address(kept.back());
  }
}

void* data_of(at::TensorList list, size_t i) {
  return list.empty() ? nullptr : list[i].mutable_data_ptr();
}

gpu::UpdatePlan make_plan(const UpdateArgs& args) {
  const TensorLists& lists = args.lists;
  std::vector<gpu::TensorEntry> tensors;
  tensors.reserve(lists.theta.size());
  for (size_t i = 0; i < lists.theta.size(); ++i) {
    tensors.push_back({
        .theta = data_of(lists.theta, i),
        .master = data_of(lists.master, i),
        .m = data_of(lists.m, i),
        .u = data_of(lists.u, i),
        .v = data_of(lists.v, i),
        .w = data_of(lists.w, i),
        .vmax = data_of(lists.vmax, i),
        .step = lists.step[i].mutable_data_ptr<float>(),
        .numel = lists.theta[i].numel(),
        .first_block = 0,
        .theta_dtype = static_cast<int64_t>(dtype_of(lists.theta[i])),
        .group = args.group_of[i],
        .index = static_cast<int64_t>(i),
        .rounding = args.rounding_of(i),
        .packed = data_of(lists.packed, i),
        .scale = static_cast<uint32_t*>(data_of(lists.scale, i)),
        .maximum = data_of(lists.maximum, i),
        .row = args.is_packed() ? args.row_of(i) : 0,
    });
  }
  std::vector<int32_t*> group_steps;
  for (const at::Tensor& step : lists.group_step) {
    group_steps.push_back(step.mutable_data_ptr<int32_t>());
  }
  return {tensors, args.hyper, std::move(group_steps)};
}

// What a launch allows.
template <typename Plan>
void check_size(const Plan& plan) {
  constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(plan.num_blocks() <= kMaxBlocks, "maxva: ", plan.num_blocks(),
                    " chunks in one list, at most ", kMaxBlocks, " are supported");
}

std::vector<gpu::TypedAddress> typed_addresses(at::TensorList g) {
  std::vector<gpu::TypedAddress> addresses;
  addresses.reserve(g.size());
  for (const at::Tensor& tensor : g) addresses.push_back(typed_address(tensor));
  return addresses;
}

}  // namespace

void update_cuda(const UpdateArgs& args) {
  const at::Device device = args.lists.theta[0].device();
  const c10::cuda::CUDAGuard guard(device);
  const CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  const gpu::UpdatePlan plan = make_plan(args);
  check_size(plan);
  const Uploaded uploaded = update_plans().find_or_upload(plan, stream);

  // in use until the stream gets there, which the allocator knows
  const auto scratch = [&](bool wanted, int width) {
    const auto float64 = at::TensorOptions().dtype(at::kDouble).device(device);
    return wanted ? at::empty({plan.num_blocks(), width}, float64) : at::Tensor();
  };
  const at::Tensor sums = scratch(args.phase == Phase::kStates, 2),
                   statistics = scratch(args.statistics.has_value(), kStatistics);
  const auto doubles = [](const auto& tensor) {
    return tensor ? tensor->template mutable_data_ptr<double>() : nullptr;
  };
  std::vector<at::Tensor> kept;
  const gpu::UpdateMemory memory{
      .control = doubles(args.control),
      .grad_scale = scalar_address(args.grad_scale, kept),
      .norms = doubles(args.norms),
      .statistics = doubles(args.statistics),
      .block_sums = sums.defined()
                        ? reinterpret_cast<SumsOfSquares*>(sums.mutable_data_ptr<double>())
                        : nullptr,
      .block_statistics = statistics.defined() ? statistics.mutable_data_ptr<double>() : nullptr,
  };
  std::vector<gpu::LearningRate> lr;
  for (size_t k = 0; k < args.hyper.size(); ++k) {
    lr.push_back({args.hyper[k].lr, scalar_address(args.lr[k], kept)});
  }
  const gpu::UpdateKind kind{args.algorithm, args.amsgrad(),
                             args.is_packed() ? std::optional(args.packing()) : std::nullopt,
                             args.phase};
  gpu::launch_update(plan, uploaded.get(), kind, memory, typed_addresses(args.lists.g), lr, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor sum_of_squares_cuda(at::TensorList g) {
  const at::Device device = g[0].device();
  const c10::cuda::CUDAGuard guard(device);
  const CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  const auto float64 = at::TensorOptions().dtype(at::kDouble).device(device);
  std::vector<int64_t> numels;
  numels.reserve(g.size());
  for (const at::Tensor& tensor : g) numels.push_back(tensor.numel());
  const gpu::NormPlan plan(std::move(numels));
  if (plan.num_blocks() == 0) return at::zeros({1}, float64);
  check_size(plan);
  const Uploaded uploaded = norm_plans().find_or_upload(plan, stream);
  const at::Tensor sums = at::empty({plan.num_blocks()}, float64);
  at::Tensor result = at::empty({1}, float64);
  gpu::launch_norm(plan, uploaded.get(), typed_addresses(g), sums.mutable_data_ptr<double>(),
                   result.mutable_data_ptr<double>(), stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

void write_control_cuda(const ControlArgs& args) {
  const c10::cuda::CUDAGuard guard(args.control.device());
  std::vector<at::Tensor> kept;
  gpu::launch_control(
      {
          .sum_of_squares =
              args.sum_of_squares ? args.sum_of_squares->const_data_ptr<double>() : nullptr,
          .grad_scale = scalar_address(args.grad_scale, kept),
          .found_inf = scalar_address(args.found_inf, kept),
          .max_grad_norm = args.max_grad_norm,
          .skip_nonfinite = args.skip_nonfinite,
          .control = args.control.mutable_data_ptr<double>(),
      },
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace maxva

#endif  // MAXVA_WITH_CUDA
