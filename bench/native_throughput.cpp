// GB/s of the update kernels without torch, beside a yardstick of bandwidth from the same run: a +=
// b on the CPU, a copy on the GPU. On the CPU a step of MAdam with every form of states over
// tensors like BERT-Base's, and what the kernels take where all lists stay in the cache of one
// core: the arithmetic alone. On a GPU both optimizers with every form of states over those of
// BERT-Large.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "compact.h"
#include "cpu_kernels.h"
#include "multi_tensor.h"

#if defined(MAXVA_WITH_CUDA)
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "gpu_plan.h"
#endif

namespace {

using namespace maxva;

constexpr int kRepeats = 20;

// Bytes that a step moves per parameter; of a state `bits` are kept.
double bytes_per_parameter(int bits) {
  return 12 + (bits == 8 ? 8 * (1 + 1.0 / kStateBlock) : bits);
}

std::vector<int64_t> bert(int layers, int64_t width) {
  std::vector<int64_t> numels{30522 * width, 512 * width, 2 * width, width, width};
  const int64_t square = width * width;
  for (int layer = 0; layer < layers; ++layer) {
    for (int k = 0; k < 4; ++k) numels.insert(numels.end(), {square, width});
    numels.insert(numels.end(),
                  {4 * square, 4 * width, 4 * square, width, width, width, width, width});
  }
  return numels;
}

int64_t sum_of(const std::vector<int64_t>& numels) {
  int64_t total = 0;
  for (int64_t n : numels) total += n;
  return total;
}

Hyper hyper() {
  Hyper h{};
  h.lr = 1e-3, h.alpha = 0.9, h.beta_low = 0.5, h.beta_high = h.beta_init = 0.999;
  h.eps = 1e-8, h.weight_decay = 0.01, h.delta = 1e-16;
  h.bias_correction = h.adam_w_mode = 1;
  return h;
}

void report(const char* name, double bytes, std::vector<double> seconds, double yardstick) {
  std::sort(seconds.begin(), seconds.end());
  const double rate = bytes / seconds[seconds.size() / 2] * 1e-9;
  std::printf("%-12s %9.3f ms %9.1f GB/s  %5.1f %% of the yardstick\n", name,
              seconds[seconds.size() / 2] * 1e3, rate, 100 * rate / yardstick);
}

double median_rate(double bytes, std::vector<double> seconds) {
  std::sort(seconds.begin(), seconds.end());
  return bytes / seconds[seconds.size() / 2] * 1e-9;
}

std::vector<double> timed_on_cpu(const std::function<void(int64_t, int64_t)>& work, int64_t n) {
  const unsigned threads = std::max(1u, std::thread::hardware_concurrency());
  std::vector<double> seconds;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> pool;
    for (unsigned k = 0; k < threads; ++k) {
      pool.emplace_back(work, n * k / threads, n * (k + 1) / threads);
    }
    for (std::thread& thread : pool) thread.join();
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return seconds;
}

void measure_cpu(const std::vector<int64_t>& numels) {
  const ChunkPlan plan(numels, 32768);
  const int64_t n = plan.num_elements();
  std::vector<float> lists[6];  // theta g m u v w
  for (auto& list : lists) list.assign(n, 0.01f);
  std::vector<int64_t> first;
  for (int64_t elements = 0; int64_t numel : numels) {
    first.push_back(elements);
    elements += numel;
  }
  // the yardstick of maxva_kernels/profile/measure.py: a copy would pay for write-allocation
  const auto add = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) lists[0][i] += lists[1][i];
  };
  const double yardstick = median_rate(12.0 * double(n), timed_on_cpu(add, n));
  const CpuKernels& kernels = cpu_kernels();
  const Scalars<float> scalars = make_scalars<float>(hyper(), 1e-3, 10, 1, 1);
  const auto seconds = timed_on_cpu(
      [&](int64_t begin, int64_t end) {
        plan.for_each_chunk(begin, end, [&](const Chunk& c) {
          const int64_t at = first[c.tensor] + c.begin;
          const ChunkView view{&lists[0][at],   DType::kFloat32, nullptr,       &lists[1][at],
                               DType::kFloat32, nullptr,         &lists[2][at], &lists[3][at],
                               &lists[4][at],   &lists[5][at],   nullptr,       c.end - c.begin};
          kernels.update_float[0][0](view, scalars, Phase::kWhole);
        });
      },
      n);
  std::printf("CPU a += b %.1f GB/s, kernels: %s\n", yardstick, kernels.isa);
  report("32 bits", bytes_per_parameter(32) * double(n), seconds, yardstick);

  const Scalars<float> compact_scalars = make_scalars<float>(hyper(), 1e-3, 10, 1, 1, true);
  for (const int kept : {16, 8}) {
    std::vector<uint64_t> packed(n);
    std::vector<uint32_t> scale(n / kStateBlock + 1);
    const Packing packing = kept == 8 ? Packing::kInt8 : Packing::kBFloat16;
    const auto update = kernels.packed->update[static_cast<int>(packing)][0][0];
    const auto compact_seconds = timed_on_cpu(
        [&](int64_t begin, int64_t end) {
          plan.for_each_chunk(begin, end, [&](const Chunk& c) {
            const int64_t at = first[c.tensor], numel = numels[c.tensor];
            const RandomBits random =
                make_random_bits({1, int64_t(c.tensor), 0, numel, numel, 0}, numel, 10);
            const PackedView view{
                .theta = &lists[0][at],
                .theta_dtype = DType::kFloat32,
                .g = &lists[1][at],
                .g_dtype = DType::kFloat32,
                .packed = reinterpret_cast<char*>(packed.data()) + at * (kept / 2),
                .scale = kept == 8 ? &scale[at / kStateBlock] : nullptr,
                .row = numel,
                .first_block = c.begin / kStateBlock,
                .end_block = c.end / kStateBlock,
                .random = &random};
            update(view, compact_scalars, Phase::kWhole);
          });
        },
        n);
    report(kept == 8 ? "8 bits" : "16 bits", bytes_per_parameter(kept) * double(n), compact_seconds,
           yardstick);
  }
}

// The fastest of many short runs: what disturbs the machine disturbs some of them.
template <typename F>
double fastest_nanoseconds(int64_t elements, const F& work) {
  constexpr int kRuns = 300, kStepsPerRun = 100;
  double best = 1e9;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = std::chrono::steady_clock::now();
    for (int k = 0; k < kStepsPerRun; ++k) work();
    const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
    best = std::min(best, taken.count() / kStepsPerRun / double(elements));
  }
  return best;
}

void measure_in_cache() {
  constexpr int64_t n = 4096;
  constexpr int64_t distance = n + 144;  // Note [Streams apart] in maxva_kernels/streams.py
  struct alignas(64) {
    float list[6][distance] = {};  // theta g m u v w
    uint64_t packed[n];
    uint32_t scale[n / kStateBlock];
  } static at;
  auto& [theta, g, m, u, v, w] = at.list;
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < n; ++i) theta[i] = normal(generator), g[i] = 0.01f * normal(generator);
  double statistics[kStatistics];
  const CpuKernels& kernels = cpu_kernels();

  const auto float32 = [&](bool collect) {
    const Scalars<float> scalars = make_scalars<float>(hyper(), 1e-3, 10, 1, 1);
    ChunkView view{theta, DType::kFloat32, nullptr, g, DType::kFloat32, nullptr, m, u, v,
                   w,     nullptr,         n};
    if (collect) view.statistics = statistics;
    return fastest_nanoseconds(n,
                               [&] { kernels.update_float[0][0](view, scalars, Phase::kWhole); });
  };
  const auto compact = [&](Packing packing) {
    const Scalars<float> scalars = make_scalars<float>(hyper(), 1e-3, 10, 1, 1, true);
    const RandomBits random = make_random_bits({0, 0, 0, n, n, 0}, n, 10);
    std::fill(std::begin(at.packed), std::end(at.packed), 0);
    std::fill(std::begin(at.scale), std::end(at.scale), 0);
    const PackedView view{.theta = theta,
                          .theta_dtype = DType::kFloat32,
                          .g = g,
                          .g_dtype = DType::kFloat32,
                          .packed = at.packed,
                          .scale = packing == Packing::kInt8 ? at.scale : nullptr,
                          .row = n,
                          .end_block = n / kStateBlock,
                          .random = &random};
    const auto update = kernels.packed->update[static_cast<int>(packing)][0][0];
    return fastest_nanoseconds(n, [&] { update(view, scalars, Phase::kWhole); });
  };
  std::printf(
      "in cache, ns per element: float32 %.2f, with statistics %.2f, int8 %.2f, "
      "bfloat16 %.2f\n",
      float32(false), float32(true), compact(Packing::kInt8), compact(Packing::kBFloat16));
}

#if defined(MAXVA_WITH_CUDA)
template <typename F>
std::vector<double> timed_on_gpu(const F& work) {
  cudaEvent_t start, stop;
  cudaEventCreate(&start);
  cudaEventCreate(&stop);
  std::vector<double> seconds;
  for (int repeat = -3; repeat < kRepeats; ++repeat) {
    cudaEventRecord(start);
    work();
    cudaEventRecord(stop);
    cudaEventSynchronize(stop);
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, start, stop);
    if (repeat >= 0) seconds.push_back(milliseconds * 1e-3);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  return seconds;
}

float* on_gpu(int64_t numel) {
  float* list = nullptr;
  cudaMalloc(&list, numel * sizeof(float));
  cudaMemset(list, 0, numel * sizeof(float));
  return list;
}

// Normal numbers; zeros would be moved and multiplied faster.
void randomize(float* list, int64_t numel, float size, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, size);
  std::vector<float> values((1 << 20) + 1);
  for (float& x : values) x = normal(generator);
  const auto period = static_cast<int64_t>(values.size());
  for (int64_t at = 0; at < numel; at += period) {
    cudaMemcpy(list + at, values.data(), std::min(period, numel - at) * sizeof(float),
               cudaMemcpyHostToDevice);
  }
}

void measure_cuda(const std::vector<int64_t>& numels) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no GPU\n");
    return;
  }
  const int64_t n = sum_of(numels);
  float* lists[6];  // theta g m u v w; instead of m also the words of compact states
  for (int k = 0; k < 6; ++k) lists[k] = on_gpu(k == 2 ? 2 * n : n);
  randomize(lists[0], n, 0.02f, 1);
  // in turn, as a gradient that repeats itself has no variance
  float* const gradients[2] = {lists[1], on_gpu(n)};
  randomize(gradients[0], n, 0.001f, 2);
  randomize(gradients[1], n, 0.001f, 3);
  float* const step = on_gpu(int64_t(numels.size()));

  const double copied = 8.0 * double(n);
  const double copy = median_rate(copied, timed_on_gpu([&] {
                                    cudaMemcpyAsync(lists[2], lists[1], n * sizeof(float),
                                                    cudaMemcpyDeviceToDevice);
                                  }));
  std::printf("GPU copy %.1f GB/s\n", copy);
  for (const int kept : {32, 16, 8}) {  // bits of a state
    cudaMemset(lists[2], 0, 2 * n * sizeof(float));
    for (const int k : {3, 4, 5}) cudaMemset(lists[k], 0, n * sizeof(float));
    std::vector<gpu::TensorEntry> entries;
    std::vector<gpu::TypedAddress> g[2];
    int calls = 0;
    for (int64_t at = 0; int64_t numel : numels) {
      gpu::TensorEntry entry{};
      entry.theta = lists[0] + at, entry.numel = numel;
      entry.theta_dtype = int64_t(DType::kFloat32), entry.index = int64_t(entries.size());
      entry.step = step + entry.index;
      if (kept == 32) {
        entry.m = lists[2] + at, entry.u = lists[3] + at;
        entry.v = lists[4] + at, entry.w = lists[5] + at;
      } else {
        entry.rounding = {1, entry.index, 0, numel, numel, 0};
        entry.row = 8 * kStateBlock;
        entry.packed = lists[2] + at * (kept / 8);
        if (kept == 8) entry.scale = reinterpret_cast<uint32_t*>(lists[5] + at / kStateBlock);
      }
      entries.push_back(entry);
      for (const int k : {0, 1}) {
        g[k].push_back(gpu::typed_address(gradients[k] + at, DType::kFloat32));
      }
      at += numel;
    }
    const gpu::UpdatePlan plan(entries, {hyper()}, {});
    const gpu::Image image = plan.image();
    char* uploaded = nullptr;
    cudaMalloc(&uploaded, image.bytes().size());
    cudaMemcpy(uploaded, image.bytes().data(), image.bytes().size(), cudaMemcpyHostToDevice);
    const std::vector<gpu::LearningRate> lr{{1e-3, gpu::typed_address(nullptr, DType::kFloat32)}};
    for (const Algorithm algorithm : {Algorithm::kMAdam, Algorithm::kLaMAdam}) {
      gpu::UpdateKind kind{algorithm, false, {}, Phase::kWhole};
      if (kept != 32) kind.packing = kept == 8 ? Packing::kInt8 : Packing::kBFloat16;
      const auto seconds = timed_on_gpu(
          [&] { gpu::launch_update(plan, uploaded, kind, {}, g[calls++ % 2], lr, nullptr); });
      char name[40];
      std::snprintf(name, sizeof name, "%s %d bits",
                    algorithm == Algorithm::kMAdam ? "madam" : "lamadam", kept);
      report(name, bytes_per_parameter(kept) * double(n), seconds, copy);
    }
    cudaFree(uploaded);
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) std::printf("CUDA error: %s\n", cudaGetErrorString(error));
}
#endif

}  // namespace

// Arguments: cpu or gpu, for one of the two.
int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  const auto say = [](const char* model, const std::vector<int64_t>& numels) {
    std::printf("%s: %zu tensors, %.1f M parameters\n", model, numels.size(),
                double(sum_of(numels)) * 1e-6);
  };
  if (only != "gpu") {
    const std::vector<int64_t> base = bert(12, 768);
    measure_in_cache();
    say("BERT-Base", base);
    measure_cpu(base);
  }
#if defined(MAXVA_WITH_CUDA)
  if (only != "cpu") {
    const std::vector<int64_t> large = bert(24, 1024);
    say("BERT-Large", large);
    measure_cuda(large);
  }
#endif
}
