// Runs the kernels for the GPU on the host and compares with the CPU kernels bit for bit. Built
// with the address and alignment sanitizers, so that an access beyond a list or a wide access to a
// misaligned one ends the program.
#include <random>

#include "control.h"
#include "lists.h"

namespace {

using namespace maxva;
using namespace maxva::test;
using gpu::LearningRate;
using gpu::TensorEntry;

struct Case {
  std::string name;
  std::vector<int64_t> numels;
  std::vector<DType> theta_dtypes{DType::kFloat32};  // of tensor i: entry i modulo the size
  std::vector<DType> g_dtypes{DType::kFloat32};
  bool master = false, amsgrad = false, unscale = false, skip = false, first_step = false;
  bool nonfinite = false, lr_on_device = false;
  int misalignment = 0;  // 0: none; 1: gradients; 2: every list differently
  int64_t num_groups = 1;
  Algorithm algorithm = Algorithm::kMAdam;
  bool trust_ratio = false;
  std::vector<double Hyper::*> switches = {};
  bool stochastic = false, statistics = false;
};

struct Tensors {
  std::vector<List> theta, g, master, m, u, v, w, vmax;
  std::vector<float> step;

  std::vector<std::vector<List>*> all() { return {&theta, &g, &master, &m, &u, &v, &w, &vmax}; }
};

DType theta_dtype(const Case& c, size_t i) { return c.theta_dtypes[i % c.theta_dtypes.size()]; }

bool has_master(const Case& c, size_t i) { return c.master && size_of(theta_dtype(c, i)) == 2; }

Tensors make_tensors(const Case& c) {
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform(0.01, 0.9);
  Tensors t;
  for (size_t i = 0; i < c.numels.size(); ++i) {
    const int64_t n = c.numels[i];
    const DType dtype = theta_dtype(c, i), g_dtype = c.g_dtypes[i % c.g_dtypes.size()];
    const DType state = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    const auto shift = [&](int list) {
      return c.misalignment == 0 ? 0 : c.misalignment == 1 ? 0 : int((list + i) % 5);
    };
    t.theta.emplace_back(dtype, n, shift(0));
    t.g.emplace_back(g_dtype, n, c.misalignment ? 1 + int(i % 3) : 0);
    t.m.emplace_back(state, n, shift(1));
    t.u.emplace_back(state, n, shift(2));
    t.v.emplace_back(state, n, shift(3));
    t.w.emplace_back(state, n, shift(4));
    t.vmax.emplace_back(state, c.amsgrad ? n : 0, shift(6));
    t.master.emplace_back(DType::kFloat32, has_master(c, i) ? n : 0, shift(7));
    t.step.push_back(c.first_step ? 0.f : float(1 + i % 1000));
    for (int64_t k = 0; k < n; ++k) {
      const double theta = normal(random), w = c.first_step ? 0 : uniform(random);
      t.theta[i].set(k, theta);
      t.g[i].set(k, normal(random) * (k % 7 ? 1 : 1e-3));
      if (c.nonfinite && k % 11 == 3) t.g[i].set(k, k % 2 ? INFINITY : NAN);
      if (has_master(c, i)) t.master[i].set(k, theta * (1 + 1e-4));
      t.w[i].set(k, w);
      t.m[i].set(k, c.first_step ? 0 : 0.3 * normal(random));
      const double mean = 0.2 * normal(random);
      t.u[i].set(k, w * mean);
      t.v[i].set(k, w * (mean * mean + uniform(random)));
      if (c.amsgrad) t.vmax[i].set(k, c.first_step ? 0 : uniform(random));
    }
  }
  return t;
}

std::vector<Hyper> make_hyper(const Case& c) {
  std::vector<Hyper> rows;
  for (int64_t k = 0; k < c.num_groups; ++k) {
    const double lr = k % 5 == 4 ? 0 : 1e-2 / double(1 + k % 5);
    rows.push_back(test::make_hyper(lr, k % 2 ? 0 : 0.01, c.trust_ratio, c.switches));
  }
  return rows;
}

int64_t group_of(const Case& c, size_t i) {
  return static_cast<int64_t>(i) * c.num_groups / static_cast<int64_t>(c.numels.size());
}

// Whole tensors, rows of larger ones at any offset, and columns of wider ones, in turn.
Rounding rounding_of(const Case& c, size_t i) {
  if (!c.stochastic || theta_dtype(c, i) != DType::kBFloat16) return {};
  const int64_t n = c.numels[i], index = static_cast<int64_t>(i);
  if (i % 3 == 0) return {int64_t{1} << 40 | 5, index, 0, n, n, 1};
  if (i % 3 == 1) return {7, index, 3 + 4 * index + (int64_t{1} << 34), n, 10 * n, 1};
  return {7, index, 11, 5, 13, 1};
}

struct Run {
  const Case& c;
  Tensors& t;
  std::vector<Hyper> hyper;
  double control[kControlFields];
  Sums sums{t.theta.size(), c.statistics};
  double grad_scale = 128;
};

void run_gpu(Run& run, Phase phase) {
  const Case& c = run.c;
  Tensors& t = run.t;
  std::vector<TensorEntry> entries;
  std::vector<gpu::TypedAddress> g;
  for (size_t i = 0; i < t.theta.size(); ++i) {
    entries.push_back({t.theta[i].data(), t.master[i].data(), t.m[i].data(), t.u[i].data(),
                       t.v[i].data(), t.w[i].data(), t.vmax[i].data(), &t.step[i],
                       t.theta[i].size(), 0, int64_t(t.theta[i].dtype()), group_of(c, i),
                       int64_t(i), rounding_of(c, i)});
    g.push_back(gpu::typed_address(t.g[i].data(), t.g[i].dtype()));
  }
  std::vector<gpu::LearningRate> lr;
  for (const Hyper& h : run.hyper) {
    const double* on_device = c.lr_on_device ? &h.lr : nullptr;
    lr.push_back({on_device ? NAN : h.lr, gpu::typed_address(on_device, DType::kFloat64)});
  }
  std::vector<int32_t> steps(c.num_groups, 7);
  std::vector<int32_t*> group_steps;
  for (int32_t& step : steps) group_steps.push_back(&step);
  const gpu::UpdatePlan plan(entries, run.hyper, group_steps);
  launch(plan, {c.algorithm, c.amsgrad, {}, phase}, run.control,
         c.unscale ? &run.grad_scale : nullptr, g, lr, run.sums);
  const int32_t counted = phase == Phase::kStates || c.skip ? 7 : 8;
  CHECK(std::count(steps.begin(), steps.end(), counted) == c.num_groups, "%s: counts of groups",
        c.name.c_str());
}

void run_cpu(Run& run, Phase phase) {
  if (run.control[kSkip] != 0) return;
  const CpuKernels& kernels = cpu_kernels_for("");
  Tensors& t = run.t;
  for (size_t i = 0; i < t.theta.size(); ++i) {
    const RandomBits random =
        make_random_bits(rounding_of(run.c, i), t.theta[i].size(), t.step[i] + 1.0);
    const ChunkView view{t.theta[i].data(),
                         t.theta[i].dtype(),
                         t.master[i].data(),
                         t.g[i].data(),
                         t.g[i].dtype(),
                         run.c.unscale ? &run.grad_scale : nullptr,
                         t.m[i].data(),
                         t.u[i].data(),
                         t.v[i].data(),
                         t.w[i].data(),
                         t.vmax[i].data(),
                         t.theta[i].size(),
                         0,
                         &random,
                         run.c.statistics ? run.sums.statistics[i].data() : nullptr};
    const Hyper& h = run.hyper[group_of(run.c, i)];
    SumsOfSquares& norms = run.sums.norms[i];
    const double trust =
        phase == Phase::kParameters ? trust_ratio(h, norms.theta, norms.update) : 1.0;
    const double step = t.step[i] + 1.0, clip = run.control[kClipFactor];
    const auto algorithm = static_cast<size_t>(run.c.algorithm);
    const SumsOfSquares sums =
        t.theta[i].dtype() == DType::kFloat64
            ? kernels.update_double[algorithm][run.c.amsgrad](
                  view, make_scalars<double>(h, h.lr, step, clip, trust), phase)
            : kernels.update_float[algorithm][run.c.amsgrad](
                  view, make_scalars<float>(h, h.lr, step, clip, trust), phase);
    if (phase == Phase::kStates) norms = sums;
    if (phase != Phase::kStates) ++t.step[i];
  }
}

void test_update(const Case& c) {
  Tensors by_gpu = make_tensors(c), by_cpu = make_tensors(c), before = make_tensors(c);
  const double skip = c.skip ? 1 : 0;
  Run gpu_run{c, by_gpu, make_hyper(c), {skip, 0.75, 0}};
  Run cpu_run{c, by_cpu, make_hyper(c), {skip, 0.75, 0}};
  run_both(gpu_run, cpu_run);

  for (size_t i = 0; i < c.numels.size(); ++i) {
    for (int k = 0; k < kStatistics; ++k) {
      const double found = gpu_run.sums.statistics[i][k], wanted = cpu_run.sums.statistics[i][k];
      const bool count = k == kAtBetaMin || k == kAtBetaMax;
      CHECK(count ? found == wanted : std::abs(found - wanted) <= 1e-5 * std::abs(wanted),
            "%s: statistic %d of %zu: %.17g, not %.17g", c.name.c_str(), k, i, found, wanted);
      CHECK(c.numels[i] == 0 || c.skip || count || (found > 0) == c.statistics,
            "%s: statistic %d of %zu is %g", c.name.c_str(), k, i, found);
    }
  }

  static const char* const kNames[] = {"theta", "g", "master", "m", "u", "v", "w", "vmax"};
  bool moved = false;
  const auto lists = by_gpu.all(), expected_lists = by_cpu.all(), before_lists = before.all();
  for (size_t l = 0; l < lists.size(); ++l) {
    for (size_t i = 0; i < c.numels.size(); ++i) {
      List &found = (*lists[l])[i], &wanted = (*expected_lists[l])[i];
      CHECK(found.same_before_first(wanted), "%s: %s %zu: written before its start", c.name.c_str(),
            kNames[l], i);
      for (int64_t k = 0; k < found.size(); ++k) {
        CHECK(found.same(wanted, k), "%s: %s %zu [%ld]: %.17g, not %.17g", c.name.c_str(),
              kNames[l], i, long(k), found.get(k), wanted.get(k));
        moved = moved || !found.same((*before_lists[l])[i], k);
      }
    }
  }
  CHECK(moved != c.skip, "%s: moved is %d", c.name.c_str(), moved);
}

double norm_of(std::vector<List>& lists) {
  std::vector<int64_t> numels;
  std::vector<gpu::TypedAddress> g;
  for (List& list : lists) {
    numels.push_back(list.size());
    g.push_back(gpu::typed_address(list.data(), list.dtype()));
  }
  const gpu::NormPlan plan(numels);
  std::vector<char> uploaded = plan.image().bytes();
  double results[2];
  for (double& result : results) {  // twice, as blocks that have finished are counted anew
    std::vector<double> block_sums(plan.num_blocks(), NAN);
    gpu::launch_norm(plan, uploaded.data(), g, block_sums.data(), &result, nullptr);
  }
  CHECK(std::memcmp(&results[0], &results[1], sizeof(double)) == 0, "norm %.17g, then %.17g",
        results[0], results[1]);
  return results[0];
}

void test_norm(const std::vector<int64_t>& numels, const std::vector<DType>& dtypes) {
  std::mt19937 random(11);
  std::normal_distribution<double> normal;
  std::vector<List> lists;
  long double expected = 0;
  for (size_t i = 0; i < numels.size(); ++i) {
    lists.emplace_back(dtypes[i % dtypes.size()], numels[i], int(i % 4));
    for (int64_t k = 0; k < numels[i]; ++k) {
      lists[i].set(k, normal(random));
      expected += static_cast<long double>(lists[i].get(k)) * lists[i].get(k);
    }
  }
  const double found = norm_of(lists);
  CHECK(close(found, double(expected)), "norm %.17g, not %.17g", found, double(expected));
  for (size_t i = 0; i < numels.size(); i += 1 + numels.size() / 5) {
    if (numels[i] == 0) continue;
    for (const double bad : {double(INFINITY), double(NAN)}) {
      const double kept = lists[i].get(numels[i] - 1);
      lists[i].set(numels[i] - 1, bad);
      const double norm = norm_of(lists);
      CHECK(std::isnan(bad) ? std::isnan(norm) : std::isinf(norm), "norm %g hides %g", norm, bad);
      lists[i].set(numels[i] - 1, kept);
    }
  }
}

// Every number the kernel may find, and none, against the rule in control.h.
void test_control() {
  const double sums[] = {0, 4, 1e80, INFINITY, NAN};
  const Float16 half{0x4C00};  // 16
  const BFloat16 one{0x3F80};
  const float zero = 0, scale = 1024;
  const auto address = [](const auto& x, DType dtype) { return gpu::typed_address(&x, dtype); };
  const gpu::TypedAddress none = gpu::typed_address(nullptr, DType::kFloat32);
  const std::pair<gpu::TypedAddress, double> scales[] = {
      {none, 1}, {address(half, DType::kFloat16), 16}, {address(scale, DType::kFloat32), 1024}};
  const std::pair<gpu::TypedAddress, bool> founds[] = {{none, false},
                                                       {address(zero, DType::kFloat32), false},
                                                       {address(one, DType::kBFloat16), true}};
  for (int k = -1; k < int(std::size(sums)); ++k) {
    for (const auto& [scale_at, scale_is] : scales) {
      for (const auto& [found_at, found_is] : founds) {
        for (const double max_norm : {0.125, double(INFINITY)}) {
          for (const bool skip_nonfinite : {false, true}) {
            double found[kControlFields], expected[kControlFields];
            gpu::launch_control(
                {k < 0 ? nullptr : &sums[k], scale_at, found_at, max_norm, skip_nonfinite, found},
                nullptr);
            make_control((k < 0 ? 0 : std::sqrt(sums[k])) / scale_is, max_norm, skip_nonfinite,
                         found_is, expected);
            for (int field = 0; field < kControlFields; ++field) {
              CHECK(close(found[field], expected[field], 0), "control %d of sum %d: %g, not %g",
                    field, k, found[field], expected[field]);
            }
          }
        }
      }
    }
  }
}

std::vector<int64_t> many(int64_t n) {
  std::vector<int64_t> numels;
  for (int64_t i = 0; i < n; ++i) numels.push_back(i % 4);
  return numels;
}

std::vector<int64_t> sparse(int64_t n) {
  std::vector<int64_t> numels(n, 0);
  for (int64_t i = 0; i < n; i += 20) numels[i] = 5;
  return numels;
}

void test_launches() {
  const auto launches = [](int64_t tensors, int64_t groups) {
    std::vector<TensorEntry> entries(tensors);
    for (int64_t i = 0; i < tensors; ++i) {
      entries[i].numel = 1000;
      entries[i].group = i * groups / tensors;
    }
    return gpu::UpdatePlan(entries, std::vector<Hyper>(groups), {}).launches().size();
  };
  CHECK(launches(398, 2) == 1, "BERT-Large");
  CHECK(launches(398, 398) == 1, "BERT-Large, one group per parameter");
  CHECK(launches(gpu::kMaxTensors, 1) == 1 && launches(gpu::kMaxTensors + 1, 1) == 2, "tensors");
  CHECK(launches(gpu::kMaxGroups, gpu::kMaxGroups) == 1, "groups");
  CHECK(launches(gpu::kMaxGroups + 1, gpu::kMaxGroups + 1) == 2, "groups");
  CHECK(launches(20000, 2) == 7, "20,000 tensors");
}

}  // namespace

int main() {
  if (!has_fused_kernels()) return 0;
  constexpr int64_t chunk = gpu::kUpdateChunk;
  const std::vector<int64_t> tails{1, 2, 3, 4, 5, 7, 1023, 1024, 1025, 4099};
  const std::vector<int64_t> edges{chunk - 1, chunk, chunk + 1, 2 * chunk + 3, 3 * chunk};
  const std::vector<int64_t> empties{0, 5, 0, 0, chunk + 2, 0, 3, 0};
  const std::vector<DType> all{f32, bf16, f16, f64};
  const std::vector<Case> cases{
      {.name = "tails", .numels = tails},
      {.name = "tails, lamadam", .numels = tails, .algorithm = lamadam},
      {.name = "edges", .numels = edges},
      {.name = "empties", .numels = empties},
      {.name = "empty only", .numels = {0, 0}, .skip = true},
      {.name = "first step", .numels = tails, .first_step = true},
      {.name = "misaligned g", .numels = edges, .misalignment = 1},
      {.name = "misaligned", .numels = tails, .misalignment = 2, .algorithm = lamadam},
      {.name = "misaligned edges", .numels = edges, .amsgrad = true, .misalignment = 2},
      {.name = "amsgrad", .numels = tails, .amsgrad = true},
      {.name = "amsgrad, lamadam", .numels = tails, .amsgrad = true, .algorithm = lamadam},
      {.name = "lr on device", .numels = tails, .lr_on_device = true, .num_groups = 5},
      {.name = "unscaled", .numels = tails, .unscale = true, .misalignment = 1},
      {.name = "skip", .numels = tails, .unscale = true, .skip = true},
      {.name = "not finite", .numels = tails, .nonfinite = true},
      {.name = "not finite, lamadam", .numels = tails, .nonfinite = true, .algorithm = lamadam},
      {.name = "bf16", .numels = tails, .theta_dtypes = {bf16}, .g_dtypes = {bf16}},
      {.name = "bf16, stochastic",
       .numels = {1, 2, 3, 4, 5, 7, 1023, 1024, 1025, chunk + 3, 2 * chunk + 1, chunk - 1},
       .theta_dtypes = {bf16},
       .g_dtypes = {bf16, f32},
       .unscale = true,
       .stochastic = true},
      {.name = "stochastic beside others, misaligned",
       .numels = tails,
       .theta_dtypes = {bf16, f32, bf16, f16, f64},
       .g_dtypes = {bf16, f32},
       .misalignment = 2,
       .num_groups = 3,
       .algorithm = lamadam,
       .trust_ratio = true,
       .stochastic = true},
      {.name = "statistics", .numels = edges, .unscale = true, .statistics = true},
      {.name = "statistics, all types",
       .numels = {9, 8, 1000, 3, 0, 65, 66, 67, 68, 1, 2, 3, 5, 1030, 77, 4},
       .theta_dtypes = all,
       .amsgrad = true,
       .misalignment = 2,
       .algorithm = lamadam,
       .statistics = true},
      {.name = "statistics, trust ratio", .numels = edges, .trust_ratio = true, .statistics = true},
      {.name = "sums of more blocks than a warp has lanes",
       .numels = {40 * chunk, 70 * chunk + 1},
       .trust_ratio = true},
      {.name = "f16", .numels = tails, .theta_dtypes = {f16}, .g_dtypes = {f16}, .unscale = true},
      {.name = "f64", .numels = edges, .theta_dtypes = {f64}, .g_dtypes = {f64}, .unscale = true},
      {.name = "f64 misaligned",
       .numels = tails,
       .theta_dtypes = {f64},
       .g_dtypes = {f64, f32},
       .amsgrad = true,
       .misalignment = 2,
       .algorithm = lamadam},
      {.name = "master",
       .numels = edges,
       .theta_dtypes = {bf16, f16},
       .g_dtypes = {bf16},
       .master = true,
       .num_groups = 5},
      {.name = "master misaligned",
       .numels = tails,
       .theta_dtypes = {bf16, f16},
       .g_dtypes = {f32, f16},
       .master = true,
       .unscale = true,
       .misalignment = 2,
       .algorithm = lamadam},
      {.name = "all types",
       .numels = {9, 8, 1000, 3, 0, 65, 66, 67, 68, 1, 2, 3, 5, 1030, 77, 4},
       .theta_dtypes = all,
       .g_dtypes = {f32, bf16, f64, f16, bf16},
       .unscale = true,
       .misalignment = 2,
       .num_groups = 6},
      {.name = "more than a launch", .numels = many(2 * gpu::kMaxTensors + 5)},
      {.name = "groups over launches",
       .numels = many(3 * gpu::kMaxGroups),
       .theta_dtypes = all,
       .num_groups = gpu::kMaxGroups + 77},
      {.name = "trust ratio",
       .numels = edges,
       .unscale = true,
       .num_groups = 2,
       .trust_ratio = true},
      {.name = "trust ratio, lamadam",
       .numels = tails,
       .theta_dtypes = all,
       .amsgrad = true,
       .misalignment = 2,
       .num_groups = 2,
       .algorithm = lamadam,
       .trust_ratio = true},
      {.name = "trust ratio, master",
       .numels = empties,
       .theta_dtypes = {bf16},
       .g_dtypes = {bf16},
       .master = true,
       .trust_ratio = true},
      {.name = "trust ratio, skip", .numels = tails, .skip = true, .trust_ratio = true},
      {.name = "L2, nesterov, maximize, eps inside",
       .numels = tails,
       .switches = {&Hyper::adam_w_mode, &Hyper::nesterov, &Hyper::maximize,
                    &Hyper::eps_inside_sqrt, &Hyper::bias_correction}},
      {.name = "the same, lamadam",
       .numels = tails,
       .algorithm = lamadam,
       .switches = {&Hyper::adam_w_mode, &Hyper::nesterov, &Hyper::maximize,
                    &Hyper::eps_inside_sqrt, &Hyper::bias_correction}},
  };
  for (const Case& c : cases) test_update(c);
  constexpr int64_t norm_chunk = gpu::kNormChunk;
  test_norm({1, 2, 3, 4, 5, 1023, 1025, 16384, 16387}, {f32});
  test_norm({norm_chunk - 1, 0, norm_chunk, norm_chunk + 1, 2 * norm_chunk + 3, 0}, all);
  test_norm(sparse(gpu::kMaxTensors + 100), all);
  test_control();
  test_launches();
  std::printf("%zu cases, %d failures\n", cases.size(), failures);
  return failures != 0;
}
