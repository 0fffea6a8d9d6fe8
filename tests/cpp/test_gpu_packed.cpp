// As test_gpu_update.cpp, for compact states.
#include <memory>
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
  Sums sums{t.theta.size(), c.statistics};
  double grad_scale = 128;
};

// Blocks that take the kernels' shorter way, and the others.
int fast_blocks = 0, general_blocks = 0;

void count_ways(Packing packing, const gpu::UpdatePlan& plan,
                const std::vector<gpu::TypedAddress>& g, const std::vector<gpu::LearningRate>& lr,
                const double* grad_scale, Phase phase) {
  const std::vector<char> uploaded = plan.image().bytes();
  SumsOfSquares norms[16] = {};
  const auto launch = std::make_unique<gpu::UpdateLaunch>();
  launch->grad_scale = gpu::typed_address(grad_scale, f64);
  launch->norms = &norms->theta;
  for (const gpu::LaunchRange& range : plan.launches()) {
    plan.fill(*launch, range, plan.locate(uploaded.data()), g, lr);
    for (unsigned b = 0; b < range.num_blocks(); ++b) {
      gpu::PackedState state;
      (packing == Packing::kInt8
           ? gpu::prepare_packed_block<Packing::kInt8>
           : gpu::prepare_packed_block<Packing::kBFloat16>)(*launch, b, phase, state);
      ++(state.fast ? fast_blocks : general_blocks);
    }
  }
}

void run_gpu(Run& run, Phase phase) {
  const Case& c = run.c;
  Tensors& t = run.t;
  std::vector<gpu::TensorEntry> entries;
  std::vector<gpu::TypedAddress> g;
  for (size_t i = 0; i < t.theta.size(); ++i) {
    gpu::TensorEntry entry{};
    entry.theta = t.theta[i].data(), entry.master = t.master[i].data();
    entry.step = &t.step[i];
    entry.numel = numel_of(c.shapes[i]);
    entry.theta_dtype = int64_t(of(c.theta_dtypes, i));
    entry.index = int64_t(i);
    entry.rounding = rounding_of(c, i);
    entry.packed = t.packed[i].data();
    entry.scale = reinterpret_cast<uint32_t*>(t.scale[i].data());
    entry.maximum = t.maximum[i].data();
    entry.row = c.shapes[i].row;
    entries.push_back(entry);
    g.push_back(gpu::typed_address(t.g[i].data(), of(c.g_dtypes, i)));
  }
  const Hyper hyper = make_hyper(c);
  const gpu::UpdatePlan plan(entries, {hyper}, {});
  const std::vector<gpu::LearningRate> lr{{hyper.lr, gpu::typed_address(nullptr, f64)}};
  const double* grad_scale = c.unscale ? &run.grad_scale : nullptr;
  count_ways(c.packing, plan, g, lr, grad_scale, phase);
  launch(plan, {c.algorithm, c.amsgrad, c.packing, phase}, run.control, grad_scale, g, lr,
         run.sums);
}

void run_cpu(Run& run, Phase phase) {
  if (run.control[kSkip] != 0) return;
  const CpuKernels& kernels = cpu_kernels_for("");
  Tensors& t = run.t;
  const Hyper h = make_hyper(run.c);
  for (size_t i = 0; i < t.theta.size(); ++i) {
    const Shape shape = run.c.shapes[i];
    const double step = t.step[i] + 1.0;
    if (phase != Phase::kStates) ++t.step[i];
    if (numel_of(shape) == 0) continue;
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
    SumsOfSquares& norms = run.sums.norms[i];
    const double trust =
        phase == Phase::kParameters ? trust_ratio(h, norms.theta, norms.update) : 1.0;
    const auto scalars = make_scalars<float>(h, h.lr, step, run.control[kClipFactor], trust, true);
    const auto update =
        kernels.packed->update[size_t(run.c.packing)][size_t(run.c.algorithm)][run.c.amsgrad];
    const SumsOfSquares sums = update(view, scalars, phase);
    if (phase == Phase::kStates) norms = sums;
    for (int k = first_statistic(phase); k < end_of_statistics(phase); ++k) {
      run.sums.statistics[i][k] += of_phase[k];
    }
  }
}

void test_update(const Case& c) {
  Tensors by_gpu = make_tensors(c), by_cpu = make_tensors(c), before = make_tensors(c);
  const double skip = c.skip ? 1 : 0;
  Run gpu_run{c, by_gpu, {skip, 0.75, 0}}, cpu_run{c, by_cpu, {skip, 0.75, 0}};
  run_both(gpu_run, cpu_run);
  for (size_t i = 0; c.statistics && i < c.shapes.size(); ++i) {
    for (int k = 0; k < kStatistics; ++k) {
      const double found = gpu_run.sums.statistics[i][k], wanted = cpu_run.sums.statistics[i][k];
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
  if (!has_fused_kernels()) return 0;
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
  CHECK(fast_blocks > 50 && general_blocks > 50, "%d and %d blocks", fast_blocks, general_blocks);
  std::printf("%zu cases, %d failures\n", 2 * cases.size(), failures);
  return failures != 0;
}
