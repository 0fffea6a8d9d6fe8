// The CUDA backend: plans that are uploaded once and found again, and launches on torch's stream.
// Nothing here waits for the device.
#if defined(MAXVA_WITH_CUDA)

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <limits>
#include <list>
#include <memory>
#include <mutex>

#include "backend.h"
#include "cuda_kernels.h"
#include "gpu_plan.h"

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
// A captured graph keeps the addresses it was captured with and does not say when it dies, so a
// plan uploaded during capture is never freed. The copy is made at once, on a stream of its own
// that is not being captured, so that the graph does not repeat it.
Uploaded upload_for_graph(const std::vector<char>& bytes) {
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed{cudaStreamCaptureModeRelaxed};
  char* memory = nullptr;
  cudaStream_t stream = nullptr;
  C10_CUDA_CHECK(cudaMalloc(&memory, bytes.size()));
  C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  C10_CUDA_CHECK(
      cudaMemcpyAsync(memory, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream));
  C10_CUDA_CHECK(cudaStreamSynchronize(stream));
  C10_CUDA_CHECK(cudaStreamDestroy(stream));
  return {memory, [](char*) {}};
}

// The most recently used plans. An entry serves one stream only: the upload is ordered there.
class PlanCache {
 public:
  // `rest` makes what follows the key in the uploaded image.
  template <typename Rest>
  Uploaded find_or_upload(const gpu::Image& key, const CUDAStream& stream, const Rest& rest) {
    if (is_capturing()) return upload_for_graph(with_rest(key, rest));
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto plan = plans_.begin(); plan != plans_.end(); ++plan) {
      if (plan->stream == stream && plan->key == key.bytes()) {
        plans_.splice(plans_.begin(), plans_, plan);
        return plan->uploaded;
      }
    }
    plans_.push_front({stream, key.bytes(), upload(with_rest(key, rest), stream.device())});
    if (plans_.size() > kCapacity) plans_.pop_back();
    return plans_.front().uploaded;
  }

 private:
  static constexpr size_t kCapacity = 32;

  struct Plan {
    CUDAStream stream;
    std::vector<char> key;
    Uploaded uploaded;
  };

  template <typename Rest>
  static std::vector<char> with_rest(gpu::Image image, const Rest& rest) {
    rest(image);
    return image.bytes();
  }

  std::mutex mutex_;
  std::list<Plan> plans_;
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

void* data_of(const std::vector<at::Tensor>& list, size_t i) {
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

constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();

}  // namespace

void update_cuda(const UpdateArgs& args) {
  const at::Device device = args.lists.theta[0].device();
  const c10::cuda::CUDAGuard guard(device);
  const CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  const gpu::UpdatePlan plan = make_plan(args);
  TORCH_CHECK_VALUE(plan.num_blocks() <= kMaxBlocks, "maxva: ", plan.num_blocks(),
                    " chunks in one list, at most ", kMaxBlocks, " are supported");
  const Uploaded uploaded = update_plans().find_or_upload(
      plan.key(), stream, [&](gpu::Image& image) { image.append(plan.blocks()); });
  const gpu::UpdatePlan::OnDevice tables = plan.locate(uploaded.get());

  const bool states = args.phase == Phase::kStates;
  const double* control = args.control ? args.control->const_data_ptr<double>() : nullptr;
  double* norms = args.norms ? args.norms->mutable_data_ptr<double>() : nullptr;
  const auto float64 = at::TensorOptions().dtype(at::kDouble).device(device);
  const auto rows = [&](bool wanted, int width) {
    return wanted ? at::empty({plan.num_blocks(), width}, float64) : at::Tensor();
  };
  const at::Tensor sums = rows(states, 2),
                   statistics = rows(args.statistics.has_value(), kStatistics);
  auto* const block_sums = states ? sums.mutable_data_ptr<double>() : nullptr;
  auto* const block_statistics = args.statistics ? statistics.mutable_data_ptr<double>() : nullptr;
  std::vector<at::Tensor> kept;

  gpu::UpdateLaunch launch;
  launch.control = control;
  launch.grad_scale = scalar_address(args.grad_scale, kept);
  launch.norms = norms;
  for (const gpu::LaunchRange& range : plan.launches()) {
    if (range.first_block == range.end_block) continue;
    launch.block_sums =
        states ? reinterpret_cast<SumsOfSquares*>(block_sums) + range.first_block : nullptr;
    launch.block_statistics =
        block_statistics ? block_statistics + range.first_block * kStatistics : nullptr;
    plan.fill(
        launch, range, tables, [&](int64_t i) { return typed_address(args.lists.g[i]); },
        [&](int64_t k) {
          return gpu::LearningRate{args.hyper[k].lr, scalar_address(args.lr[k], kept)};
        });
    const gpu::UpdateKind kind{args.algorithm, args.amsgrad(), range.float64, args.phase};
    const auto blocks = static_cast<unsigned>(range.end_block - range.first_block);
    if (args.is_packed()) {
      gpu::launch_packed(launch, args.packing(), kind, blocks, stream);
    } else {
      gpu::launch_update(launch, kind, blocks, stream);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  const auto num_tensors = static_cast<int64_t>(plan.tensors().size());
  if (args.statistics) {  // also where there are no blocks: empty tensors have sums of 0
    gpu::launch_tensor_sums(
        tables.tensors, num_tensors, block_statistics,
        {kStatistics, first_statistic(args.phase), end_of_statistics(args.phase)}, control,
        args.statistics->mutable_data_ptr<double>(), stream);
  }
  if (states) {
    gpu::launch_tensor_sums(tables.tensors, num_tensors, block_sums, {2, 0, 2}, control, norms,
                            stream);
  } else {  // the step is counted once, after the parameters have moved
    gpu::launch_count(tables.tensors, num_tensors, tables.group_steps,
                      static_cast<int64_t>(args.lists.group_step.size()), control, stream);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor sum_of_squares_cuda(const std::vector<at::Tensor>& g) {
  const at::Device device = g[0].device();
  const c10::cuda::CUDAGuard guard(device);
  const CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  const auto float64 = at::TensorOptions().dtype(at::kDouble).device(device);
  std::vector<int64_t> numels;
  numels.reserve(g.size());
  for (const at::Tensor& tensor : g) numels.push_back(tensor.numel());
  const ChunkPlan chunks(numels, gpu::kNormChunk);
  const int64_t num_blocks = chunks.num_chunks();
  if (num_blocks == 0) return at::zeros({1}, float64);
  TORCH_CHECK_VALUE(num_blocks <= kMaxBlocks, "maxva: ", num_blocks,
                    " chunks in one list, at most ", kMaxBlocks, " are supported");

  // numels, then the count of finished blocks, then the block map
  gpu::Image key;
  key.append(numels);
  key.append(std::vector<int64_t>{0});
  const Uploaded uploaded = norm_plans().find_or_upload(
      key, stream, [&](gpu::Image& image) { image.append(gpu::block_map(chunks)); });
  char* const image = uploaded.get();
  char* const finished = image + numels.size() * sizeof(int64_t);
  const auto* blocks = reinterpret_cast<const gpu::BlockEntry*>(finished + sizeof(int64_t));

  const at::Tensor sums = at::empty({num_blocks}, float64);
  at::Tensor result = at::empty({1}, float64);
  gpu::NormLaunch launch;
  launch.numels = reinterpret_cast<const int64_t*>(image);
  launch.all_block_sums = sums.mutable_data_ptr<double>();
  launch.result = result.mutable_data_ptr<double>();
  launch.finished = reinterpret_cast<unsigned*>(finished);
  launch.num_blocks = num_blocks;
  const auto num_tensors = static_cast<int64_t>(g.size());
  for (int64_t first = 0; first < num_tensors; first += gpu::kMaxTensors) {
    const int64_t end = std::min(num_tensors, first + gpu::kMaxTensors);
    const int64_t first_block = chunks.first_chunk(first), end_block = chunks.first_chunk(end);
    if (first_block == end_block) continue;
    launch.blocks = blocks + first_block;
    launch.block_sums = launch.all_block_sums + first_block;
    launch.first_tensor = first;
    for (int64_t i = first; i < end; ++i) launch.g[i - first] = typed_address(g[i]);
    gpu::launch_norm(launch, static_cast<unsigned>(end_block - first_block), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
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
