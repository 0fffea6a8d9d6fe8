// The CPU backend: torch's threads over chunks, each handed to the kernel of this machine's ISA.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <array>

#include "backend.h"
#include "control.h"
#include "multi_tensor.h"

namespace maxva {
namespace {

// 32768 float32 elements of six streams are 786 KB: inside a core's second-level cache.
constexpr int64_t kChunkSize = 32768;

// 256 blocks, each as kStateBlock elements: rows of compact states end with a whole one.
static_assert(kChunkSize % kStateBlock == 0);

std::vector<int64_t> numels_of(at::TensorList tensors) {
  std::vector<int64_t> numels;
  numels.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) numels.push_back(tensor.numel());
  return numels;
}

// Of every parameter, what is cut into chunks.
std::vector<int64_t> work_of(const UpdateArgs& args) {
  std::vector<int64_t> numels = numels_of(args.lists.theta);
  if (!args.is_packed()) return numels;
  for (size_t i = 0; i < numels.size(); ++i) {
    numels[i] = state_blocks(numels[i], args.row_of(i)) * kStateBlock;
  }
  return numels;
}

template <typename F>
void parallel_for_each_chunk(const ChunkPlan& plan, const F& fn) {
  at::parallel_for(0, plan.num_elements(), kChunkSize,
                   [&](int64_t begin, int64_t end) { plan.for_each_chunk(begin, end, fn); });
}

double scalar_of(const at::Tensor& tensor) { return tensor.item<double>(); }

// What is written has memory of its own (own_memory in bindings.cpp); what is read may share it.
void* at_element(const at::Tensor& tensor, int64_t offset) {
  auto* const data = const_cast<void*>(tensor.const_data_ptr());
  return static_cast<char*>(data) + offset * tensor.element_size();
}

// Scalars of one parameter in the compute type it uses; the other member stays unset.
struct TensorScalars {
  Scalars<float> f;
  Scalars<double> d;
};

// What belongs to chunk c beside its pointers.
struct OfChunk {
  const double* grad_scale;
  double* statistics;
  const RandomBits* random;
};

SumsOfSquares update_chunk(const UpdateArgs& args, const CpuKernels& kernels, const Chunk& c,
                           const TensorScalars& scalars, const OfChunk& of_chunk) {
  const TensorLists& lists = args.lists;
  const size_t i = c.tensor;
  const bool amsgrad = args.amsgrad();
  const ChunkView view{
      .theta = at_element(lists.theta[i], c.begin),
      .theta_dtype = dtype_of(lists.theta[i]),
      .master = lists.master.empty() ? nullptr : at_element(lists.master[i], c.begin),
      .g = at_element(lists.g[i], c.begin),
      .g_dtype = dtype_of(lists.g[i]),
      .grad_scale = of_chunk.grad_scale,
      .m = at_element(lists.m[i], c.begin),
      .u = at_element(lists.u[i], c.begin),
      .v = at_element(lists.v[i], c.begin),
      .w = at_element(lists.w[i], c.begin),
      .vmax = amsgrad ? at_element(lists.vmax[i], c.begin) : nullptr,
      .n = c.end - c.begin,
      .first = c.begin,
      .random = of_chunk.random,
      .statistics = of_chunk.statistics,
  };
  const auto algorithm = static_cast<size_t>(args.algorithm);
  return view.theta_dtype == DType::kFloat64
             ? kernels.update_double[algorithm][amsgrad](view, scalars.d, args.phase)
             : kernels.update_float[algorithm][amsgrad](view, scalars.f, args.phase);
}

SumsOfSquares update_packed_chunk(const UpdateArgs& args, const CpuKernels& kernels, const Chunk& c,
                                  const Scalars<float>& scalars, const OfChunk& of_chunk) {
  const TensorLists& lists = args.lists;
  const size_t i = c.tensor;
  const bool amsgrad = args.amsgrad();
  const PackedView view{
      .theta = lists.theta[i].mutable_data_ptr(),
      .theta_dtype = dtype_of(lists.theta[i]),
      .master = lists.master.empty() ? nullptr : lists.master[i].mutable_data_ptr(),
      .g = at_element(lists.g[i], 0),
      .g_dtype = dtype_of(lists.g[i]),
      .grad_scale = of_chunk.grad_scale,
      .packed = lists.packed[i].mutable_data_ptr(),
      .scale =
          lists.scale.empty() ? nullptr : static_cast<uint32_t*>(lists.scale[i].mutable_data_ptr()),
      .maximum = amsgrad ? lists.maximum[i].mutable_data_ptr() : nullptr,
      .row = args.row_of(i),
      .first_block = c.begin / kStateBlock,
      .end_block = c.end / kStateBlock,
      .random = of_chunk.random,
      .statistics = of_chunk.statistics,
  };
  const auto packing = static_cast<size_t>(args.packing());
  const auto algorithm = static_cast<size_t>(args.algorithm);
  return kernels.packed->update[packing][algorithm][amsgrad](view, scalars, args.phase);
}

}  // namespace

void update_cpu(const UpdateArgs& args) {
  const TensorLists& lists = args.lists;
  const double* control = args.control ? args.control->const_data_ptr<double>() : nullptr;
  if (skips(control)) return;
  const double clip_factor = control ? control[kClipFactor] : 1.0;
  const double grad_scale = args.grad_scale ? scalar_of(*args.grad_scale) : 1.0;
  double* norms = args.norms ? args.norms->mutable_data_ptr<double>() : nullptr;
  const size_t num_tensors = lists.theta.size();

  std::vector<double> lr(args.hyper.size());
  for (size_t k = 0; k < lr.size(); ++k) {
    lr[k] = args.lr[k] ? scalar_of(*args.lr[k]) : args.hyper[k].lr;
  }
  std::vector<TensorScalars> scalars(num_tensors);
  std::vector<RandomBits> random(args.rounding.size());
  for (size_t i = 0; i < num_tensors; ++i) {
    const Hyper& hyper = args.hyper[args.group_of[i]];
    const double t = *lists.step[i].const_data_ptr<float>() + 1.0;
    const double trust =
        args.phase == Phase::kParameters ? trust_ratio(hyper, norms[2 * i], norms[2 * i + 1]) : 1.0;
    const double eta = lr[args.group_of[i]];
    if (dtype_of(lists.theta[i]) == DType::kFloat64) {
      scalars[i].d = make_scalars<double>(hyper, eta, t, clip_factor, trust);
    } else {
      scalars[i].f = make_scalars<float>(hyper, eta, t, clip_factor, trust, args.is_packed());
    }
    if (!random.empty()) {
      random[i] = make_random_bits(args.rounding[i], lists.theta[i].numel(), t);
    }
  }

  const CpuKernels& kernels = cpu_kernels();
  const ChunkPlan plan(work_of(args), kChunkSize);
  std::vector<SumsOfSquares> sums(args.phase == Phase::kStates ? plan.num_chunks() : 0);
  using ChunkStatistics = std::array<double, kStatistics>;
  std::vector<ChunkStatistics> statistics(args.statistics ? plan.num_chunks() : 0);
  parallel_for_each_chunk(plan, [&](const Chunk& c) {
    const OfChunk of_chunk{
        .grad_scale = args.grad_scale ? &grad_scale : nullptr,
        .statistics = statistics.empty() ? nullptr : statistics[c.index].data(),
        .random = random.empty() ? nullptr : &random[c.tensor],
    };
    const TensorScalars& of_tensor = scalars[c.tensor];
    const SumsOfSquares chunk_sums =
        args.is_packed() ? update_packed_chunk(args, kernels, c, of_tensor.f, of_chunk)
                         : update_chunk(args, kernels, c, of_tensor, of_chunk);
    if (!sums.empty()) sums[c.index] = chunk_sums;
  });

  if (args.statistics) {
    auto* const of_tensor = args.statistics->mutable_data_ptr<double>();
    for (size_t i = 0; i < num_tensors; ++i) {
      for (int f = first_statistic(args.phase); f < end_of_statistics(args.phase); ++f) {
        double sum = 0;
        for (int64_t k = plan.first_chunk(i); k < plan.first_chunk(i + 1); ++k) {
          sum += statistics[k][f];
        }
        of_tensor[i * kStatistics + f] = sum;
      }
    }
  }
  if (args.phase == Phase::kStates) {
    for (size_t i = 0; i < num_tensors; ++i) {
      norms[2 * i] = norms[2 * i + 1] = 0;
      for (int64_t k = plan.first_chunk(i); k < plan.first_chunk(i + 1); ++k) {
        norms[2 * i] += sums[k].theta;
        norms[2 * i + 1] += sums[k].update;
      }
    }
    return;  // the step is counted once, after the parameters have moved
  }
  for (const at::Tensor& step : lists.step) *step.mutable_data_ptr<float>() += 1;
  for (const at::Tensor& step : lists.group_step) *step.mutable_data_ptr<int32_t>() += 1;
}

at::Tensor sum_of_squares_cpu(at::TensorList g) {
  const CpuKernels& kernels = cpu_kernels();
  const ChunkPlan plan(numels_of(g), kChunkSize);
  std::vector<double> partial(plan.num_chunks());
  parallel_for_each_chunk(plan, [&](const Chunk& c) {
    partial[c.index] = kernels.sum_of_squares(at_element(g[c.tensor], c.begin),
                                              dtype_of(g[c.tensor]), c.end - c.begin);
  });
  double sum = 0;
  for (double x : partial) sum += x;
  at::Tensor result = at::empty({1}, at::kDouble);
  *result.mutable_data_ptr<double>() = sum;
  return result;
}

void write_control_cpu(const ControlArgs& args) {
  const double sum = args.sum_of_squares ? scalar_of(*args.sum_of_squares) : 0.0;
  const double scale = args.grad_scale ? scalar_of(*args.grad_scale) : 1.0;
  make_control(std::sqrt(sum) / scale, args.max_grad_norm, args.skip_nonfinite,
               args.found_inf && scalar_of(*args.found_inf) != 0,
               args.control.mutable_data_ptr<double>());
}

}  // namespace maxva
