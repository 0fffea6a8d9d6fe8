// As test_gpu_traversal.cpp, for compact states: every lane of every warp in turn, with the warp's
// exchange of largest magnitudes in between, against the CPU kernels bit for bit.
#include <random>

#include "gpu_packed.h"
#include "lists.h"

namespace {

using namespace maxva;
using namespace maxva::test;

struct Shape {
  int64_t rows, row;
};

struct Case {
  std::string name;
  std::vector<Shape> shapes;
  Packing packing = Packing::kInt8;
  Algorithm algorithm = Algorithm::kMAdam;
  std::vector<DType> theta_dtypes{DType::kFloat32}, g_dtypes{DType::kFloat32};
  bool amsgrad = false, master = false, unscale = false, skip = false, first_step = false;
  bool nonfinite = false, trust_ratio = false, statistics = false, stochastic = false;
  bool tiny = false;     // gradients whose squares are subnormal
  int misalignment = 0;  // elements by which every list starts late, differently
  std::vector<double Hyper::*> switches = {};
  double lr = 1e-2;
};

struct Tensors {
  std::vector<List> theta, g, master, packed, scale, maximum;
  std::vector<float> step;
  std::vector<std::vector<List>*> all() { return {&theta, &g, &master, &packed, &scale, &maximum}; }
};

DType of(const std::vector<DType>& dtypes, size_t i) { return dtypes[i % dtypes.size()]; }

int64_t numel_of(const Shape& shape) { return shape.rows * shape.row; }

Tensors make_tensors(const Case& c) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  const bool int8 = c.packing == Packing::kInt8;
  Tensors t;
  for (size_t i = 0; i < c.shapes.size(); ++i) {
    const int64_t n = numel_of(c.shapes[i]),
                  blocks = c.shapes[i].rows * blocks_of_row(c.shapes[i].row);
    const auto shift = [&](int list) { return c.misalignment ? int64_t((list + i) % 5) : 0; };
    const DType theta = of(c.theta_dtypes, i), g = of(c.g_dtypes, i);
    const bool master = c.master && theta != DType::kFloat32;
    t.theta.emplace_back(theta, n, shift(0));
    t.g.emplace_back(g, n, shift(1));
    t.master.emplace_back(DType::kFloat32, master ? n : 0, shift(2));
    t.packed.emplace_back(int8 ? 4 : 8, n, shift(3));
    t.scale.emplace_back(4, int8 ? blocks : 0, shift(4));
    t.maximum.emplace_back(int8 ? 1 : 2, c.amsgrad ? n : 0, shift(6));
    t.step.push_back(c.first_step ? 0.f : float(1 + i));
    for (int64_t k = 0; k < n; ++k) {
      const float x = normal(random);
      t.theta[i].set(k, x);
      if (master) t.master[i].set(k, x * 1.0001f);
      float gradient = normal(random) * (k % 7 ? 1.f : 1e-3f) * (c.tiny ? 1e-21f : 1.f);
      if (c.nonfinite && k % 11 == 3) gradient = k % 2 ? INFINITY : NAN;
      if (c.nonfinite && k % 53 == 3) gradient = 3e19f;  // its square is not finite
      t.g[i].set(k, gradient);
      // any word is a state of int8 but for codes of sd above 251, which are NaN
      uint32_t word = c.first_step ? 0 : uint32_t(random());
      if (!(c.nonfinite && k % 17 == 5) && (word >> 16 & 0xFC) == 0xFC) word &= ~0x00800000u;
      if (int8) {
        t.packed[i].put(k, word);
        if (c.amsgrad) t.maximum[i].put(k, uint8_t(c.first_step ? 0 : random() % 252));
      } else {
        const auto low = [&](float v) {
          BFloat16 b;
          from_compute(v, b);
          return uint64_t{b.bits};
        };
        const float w = float(random() % 1000) / 1000;
        uint64_t wide = low(0.3f * normal(random)) | low(0.2f * normal(random)) << 16 |
                        low(std::fabs(normal(random))) << 32 | low(folded_weight(w)) << 48;
        if (c.nonfinite && k % 17 == 5) {  // NaN or inf in one slot after the other
          const int shift = 16 * int(k / 17 % 4);
          wide &= ~(uint64_t{0xFFFF} << shift);
          wide |= uint64_t{k % 2 ? 0x7F80u : 0x7FC0u} << shift;
        }
        t.packed[i].put(k, c.first_step ? uint64_t{0} : wide);
        if (c.amsgrad) {
          t.maximum[i].put(k, uint16_t(c.first_step ? 0 : low(std::fabs(normal(random)))));
        }
      }
    }
    for (int64_t b = 0; int8 && b < blocks; ++b) {
      uint32_t exponents = 0;
      for (int k = 0; k < 4; ++k) exponents |= uint32_t(120 + random() % 12) << 8 * k;
      t.scale[i].put(b, c.first_step ? 0u : exponents);
    }
  }
  return t;
}

Hyper make_hyper(const Case& c) { return test::make_hyper(c.lr, 0.01, c.trust_ratio, c.switches); }

// Whole tensors, rows of larger ones at any offset, and columns of wider ones, in turn.
Rounding rounding_of(const Case& c, size_t i) {
  const int64_t n = numel_of(c.shapes[i]), index = int64_t(i);
  const int64_t theta =
      c.stochastic && of(c.theta_dtypes, i) == DType::kBFloat16 && !c.master ? 1 : 0;
  if (i % 3 == 0) return {int64_t{1} << 40 | 5, index, 0, n, n, theta};
  if (i % 3 == 1) return {7, index, 3 + 4 * index + (int64_t{1} << 34), n, 10 * n, theta};
  return {7, index, 12, c.shapes[i].row, 3 * c.shapes[i].row, theta};
}

struct Run {
  const Case& c;
  Tensors& t;
  double control[kControlFields];
  double grad_scale = 128;
  std::vector<TensorStatistics> statistics{t.theta.size(), TensorStatistics{}};
};

template <Packing kPacking, Algorithm kAlgorithm, bool kAmsgrad, bool kStates, bool kCollect,
          bool kFast>
void run_warp(const gpu::PackedState& state, int index, uint32_t exponents, SumsOfSquares& sums,
              TensorStatistics& statistics) {
  std::array<gpu::LaneMoments, gpu::kLanes> lanes;
  std::array<gpu::Lane, gpu::kLanes> at;
  std::array<uint32_t, gpu::kLanes> nan{};
  gpu::Largest largest;
  for (int k = 0; k < gpu::kLanes; ++k) {
    at[k] = gpu::find_lane(state, index, k);
    gpu::ThreadStatistics<float> own;
    gpu::move_lane<kPacking, kAlgorithm, kAmsgrad, kStates, kCollect, kFast>(
        state, exponents, at[k], lanes[k], sums, own);
    add(statistics, own);
    if constexpr (!kStates && kPacking == Packing::kInt8) {
      const int n = kFast ? gpu::kVector : at[k].n;
      const auto of_lane = gpu::finish_lane<kAlgorithm, kAmsgrad>(n, lanes[k], nan[k]);
      largest.r = std::max(largest.r, of_lane.r);
      largest.mean = std::max(largest.mean, of_lane.mean);
      largest.sd = std::max(largest.sd, of_lane.sd);
      largest.root = std::max(largest.root, of_lane.root);
    }
  }
  for (int k = 0; !kStates && k < gpu::kLanes; ++k) {
    gpu::store_lane<kPacking, kAmsgrad, kFast>(state, index, k, at[k], lanes[k], largest, nan[k]);
  }
}

int fast_warps = 0, general_warps = 0;

void run_block(const Run& run, const gpu::UpdateLaunch& launch, int64_t block, Phase phase,
               SumsOfSquares& sums, TensorStatistics& statistics) {
  gpu::PackedState state;
  gpu::prepare_packed_block(launch, block, phase, state);
  TensorStatistics own{};
  const auto with_collect =
      [&]<Packing kPacking, Algorithm kAlgorithm, bool kAmsgrad, bool kStates, bool kCollect>() {
        for (int warp = 0; warp < gpu::kWarps; ++warp) {
          std::array<uint32_t, gpu::kLanes> scales{};
          for (int k = 0; kPacking == Packing::kInt8 && k < gpu::kLanes; ++k) {
            scales[k] = gpu::scales_of_step(state, warp, k);
          }
          for (int index = warp; index < state.num_blocks; index += gpu::kWarps) {
            const bool fast = state.fast && gpu::find_lane(state, index, 0).whole;
            ++(fast ? fast_warps : general_warps);
            const auto run_it =
                fast ? run_warp<kPacking, kAlgorithm, kAmsgrad, kStates, kCollect, true>
                     : run_warp<kPacking, kAlgorithm, kAmsgrad, kStates, kCollect, false>;
            run_it(state, index, scales[index / gpu::kWarps], sums, own);
          }
        }
      };
  const auto with_amsgrad = [&]<Packing kPacking, Algorithm kAlgorithm, bool kAmsgrad>() {
    if (phase == Phase::kStates) {
      with_collect.template operator()<kPacking, kAlgorithm, kAmsgrad, true, true>();
    } else if (run.c.statistics) {
      with_collect.template operator()<kPacking, kAlgorithm, kAmsgrad, false, true>();
    } else {
      with_collect.template operator()<kPacking, kAlgorithm, kAmsgrad, false, false>();
    }
  };
  const auto with_algorithm = [&]<Packing kPacking, Algorithm kAlgorithm>() {
    run.c.amsgrad ? with_amsgrad.template operator()<kPacking, kAlgorithm, true>()
                  : with_amsgrad.template operator()<kPacking, kAlgorithm, false>();
  };
  const auto with_packing = [&]<Packing kPacking>() {
    run.c.algorithm == Algorithm::kMAdam
        ? with_algorithm.template operator()<kPacking, Algorithm::kMAdam>()
        : with_algorithm.template operator()<kPacking, Algorithm::kLaMAdam>();
  };
  run.c.packing == Packing::kInt8 ? with_packing.template operator()<Packing::kInt8>()
                                  : with_packing.template operator()<Packing::kBFloat16>();
  for (int k = first_statistic(phase); k < end_of_statistics(phase); ++k) {
    statistics[k] += own[k];
  }
}

void run_gpu(Run& run, Phase phase, std::vector<SumsOfSquares>& norms) {
  Tensors& t = run.t;
  std::vector<gpu::TensorEntry> entries;
  for (size_t i = 0; i < t.theta.size(); ++i) {
    gpu::TensorEntry entry{};
    entry.theta = t.theta[i].data(), entry.master = t.master[i].data();
    entry.step = &t.step[i];
    entry.numel = numel_of(run.c.shapes[i]);
    entry.theta_dtype = int64_t(of(run.c.theta_dtypes, i));
    entry.index = int64_t(i);
    entry.rounding = rounding_of(run.c, i);
    entry.packed = t.packed[i].data();
    entry.scale = reinterpret_cast<uint32_t*>(t.scale[i].data());
    entry.maximum = t.maximum[i].data();
    entry.row = run.c.shapes[i].row;
    entries.push_back(entry);
  }
  const Hyper hyper = make_hyper(run.c);
  const gpu::UpdatePlan plan(entries, {hyper}, {});
  gpu::Image image = plan.key();
  image.append(plan.blocks());
  const auto tables = plan.locate(image.bytes().data());
  const auto launch = make_launch(run.control, run.c.unscale ? &run.grad_scale : nullptr, norms);
  std::vector<SumsOfSquares> of_tensor(norms.size());
  for (const gpu::LaunchRange& range : plan.launches()) {
    plan.fill(
        *launch, range, tables,
        [&](int64_t i) { return gpu::typed_address(t.g[i].data(), of(run.c.g_dtypes, i)); },
        [&](int64_t) {
          return gpu::LearningRate{hyper.lr, gpu::typed_address(nullptr, DType::kFloat64)};
        });
    for (int64_t b = 0; b < range.end_block - range.first_block; ++b) {
      const int64_t index = tables.tensors[launch->blocks[b].tensor].index;
      SumsOfSquares sums{0, 0};
      run_block(run, *launch, b, phase, sums, run.statistics[index]);
      of_tensor[index].theta += sums.theta, of_tensor[index].update += sums.update;
    }
  }
  if (phase == Phase::kStates) norms = of_tensor;
}

void run_cpu(Run& run, Phase phase, std::vector<SumsOfSquares>& norms) {
  if (run.control[kSkip] != 0) return;
  const CpuKernels& kernels = cpu_kernels_for("");
  Tensors& t = run.t;
  const Hyper h = make_hyper(run.c);
  for (size_t i = 0; i < t.theta.size(); ++i) {
    const Shape shape = run.c.shapes[i];
    if (numel_of(shape) == 0) continue;
    const double step = t.step[i] + 1.0;
    const RandomBits random = make_random_bits(rounding_of(run.c, i), numel_of(shape), step);
    TensorStatistics of_phase{};
    const PackedView view{.theta = t.theta[i].data(),
                          .theta_dtype = of(run.c.theta_dtypes, i),
                          .master = t.master[i].data(),
                          .g = t.g[i].data(),
                          .g_dtype = of(run.c.g_dtypes, i),
                          .grad_scale = run.c.unscale ? &run.grad_scale : nullptr,
                          .packed = t.packed[i].data(),
                          .scale = reinterpret_cast<uint32_t*>(t.scale[i].data()),
                          .maximum = t.maximum[i].data(),
                          .row = shape.row,
                          .first_block = 0,
                          .end_block = shape.rows * blocks_of_row(shape.row),
                          .random = &random,
                          .statistics = run.c.statistics ? of_phase.data() : nullptr};
    const double trust =
        phase == Phase::kParameters ? trust_ratio(h, norms[i].theta, norms[i].update) : 1.0;
    const auto scalars = make_scalars<float>(h, h.lr, step, run.control[kClipFactor], trust, true);
    const auto update =
        kernels.packed->update[size_t(run.c.packing)][size_t(run.c.algorithm)][run.c.amsgrad];
    const SumsOfSquares sums = update(view, scalars, phase);
    if (phase == Phase::kStates) norms[i] = sums;
    for (int k = first_statistic(phase); k < end_of_statistics(phase); ++k) {
      run.statistics[i][k] += of_phase[k];
    }
  }
}

void test_update(const Case& c) {
  Tensors by_gpu = make_tensors(c), by_cpu = make_tensors(c), before = make_tensors(c);
  const double skip = c.skip ? 1 : 0;
  Run gpu_run{c, by_gpu, {skip, 0.75, 0}}, cpu_run{c, by_cpu, {skip, 0.75, 0}};
  std::vector<SumsOfSquares> norms(c.shapes.size() + 1), expected(c.shapes.size() + 1);
  if (c.trust_ratio) {
    run_gpu(gpu_run, Phase::kStates, norms);
    run_cpu(cpu_run, Phase::kStates, expected);
    check_norms(norms, expected, c.name);
    norms = expected;
  }
  const Phase phase = c.trust_ratio ? Phase::kParameters : Phase::kWhole;
  run_gpu(gpu_run, phase, norms);
  run_cpu(cpu_run, phase, expected);
  for (size_t i = 0; c.statistics && i < c.shapes.size(); ++i) {
    for (int k = 0; k < kStatistics; ++k) {
      const double found = gpu_run.statistics[i][k], wanted = cpu_run.statistics[i][k];
      CHECK(close(found, wanted, 1e-5), "%s: statistic %d of %zu: %.17g, not %.17g", c.name.c_str(),
            k, i, found, wanted);
    }
  }
  static const char* const kNames[] = {"theta", "g", "master", "packed", "scale", "maximum"};
  bool moved = false;
  const auto lists = by_gpu.all(), wanted_lists = by_cpu.all(), before_lists = before.all();
  for (size_t l = 0; l < lists.size(); ++l) {
    for (size_t i = 0; i < c.shapes.size(); ++i) {
      const List &found = (*lists[l])[i], &wanted = (*wanted_lists[l])[i];
      moved = moved || !found.same_bits((*before_lists[l])[i]);
      if (l < 3 && c.nonfinite) {
        for (int64_t k = 0; k < found.size(); ++k) {
          CHECK(found.same(wanted, k), "%s: %s %zu [%ld]", c.name.c_str(), kNames[l], i, long(k));
        }
        continue;
      }
      CHECK(found.same_bits(wanted), "%s: %s %zu", c.name.c_str(), kNames[l], i);
    }
  }
  CHECK(moved != c.skip, "%s: moved is %d", c.name.c_str(), moved);
}

}  // namespace

int main() {
  if (std::string(cpu_kernels_for("").isa) == "baseline") {
    std::printf("skipped: this processor has no fused multiply-add kernels to compare with\n");
    return 0;
  }
  constexpr auto f32 = DType::kFloat32, f64 = DType::kFloat64, bf16 = DType::kBFloat16,
                 f16 = DType::kFloat16;
  constexpr auto lamadam = Algorithm::kLaMAdam;
  const std::vector<Shape> whole{{3, 128}, {65, 128}, {1, 8192 + 256}, {3, 384}};
  const std::vector<Shape> tails{{5, 129}, {3, 255}, {7, 200}, {2, 130}, {70, 131}, {1, 1}, {0, 9}};
  const std::vector<Case> cases{
      {.name = "whole", .shapes = whole},
      {.name = "whole, lamadam", .shapes = whole, .algorithm = lamadam},
      {.name = "whole, amsgrad", .shapes = whole, .amsgrad = true},
      {.name = "tails", .shapes = tails},
      {.name = "tails, amsgrad, lamadam", .shapes = tails, .algorithm = lamadam, .amsgrad = true},
      {.name = "first step", .shapes = whole, .first_step = true},
      {.name = "first step, lr 0", .shapes = tails, .first_step = true, .lr = 0},
      {.name = "tiny", .shapes = whole, .tiny = true},
      {.name = "misaligned", .shapes = tails, .amsgrad = true, .misalignment = 1},
      {.name = "misaligned whole", .shapes = whole, .unscale = true, .misalignment = 1},
      {.name = "skip", .shapes = tails, .unscale = true, .skip = true},
      {.name = "not finite", .shapes = whole, .amsgrad = true, .nonfinite = true},
      {.name = "not finite, lamadam", .shapes = tails, .algorithm = lamadam, .nonfinite = true},
      {.name = "types",
       .shapes = tails,
       .theta_dtypes = {bf16, f16, f32},
       .g_dtypes = {f32, bf16, f64, f16},
       .unscale = true,
       .stochastic = true},
      {.name = "masters",
       .shapes = whole,
       .theta_dtypes = {bf16, f16},
       .g_dtypes = {bf16},
       .master = true},
      {.name = "trust ratio, statistics", .shapes = tails, .trust_ratio = true, .statistics = true},
      {.name = "trust ratio, unscaled",
       .shapes = whole,
       .amsgrad = true,
       .unscale = true,
       .trust_ratio = true},
      {.name = "statistics", .shapes = whole, .statistics = true},
      {.name = "options",
       .shapes = whole,
       .switches = {&Hyper::adam_w_mode, &Hyper::nesterov, &Hyper::maximize,
                    &Hyper::eps_inside_sqrt, &Hyper::bias_correction}},
      {.name = "options, lamadam",
       .shapes = tails,
       .algorithm = lamadam,
       .switches = {&Hyper::adam_w_mode, &Hyper::nesterov, &Hyper::maximize,
                    &Hyper::eps_inside_sqrt, &Hyper::bias_correction}},
  };
  for (Case c : cases) {
    test_update(c);
    c.packing = Packing::kBFloat16;
    c.name += ", bfloat16";
    test_update(c);
  }
  CHECK(fast_warps > 100 && general_warps > 100, "%d and %d warps", fast_warps, general_warps);
  std::printf("%zu cases, %d failures\n", 2 * cases.size(), failures);
  return failures != 0;
}
