// What the tests of the GPU's kernels share: the check, lists that the sanitizers watch, and the
// parts of a run that do not depend on the form of the states.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "cuda_kernels.h"

namespace maxva::test {

constexpr auto f32 = DType::kFloat32, f64 = DType::kFloat64, bf16 = DType::kBFloat16,
               f16 = DType::kFloat16;
constexpr auto lamadam = Algorithm::kLaMAdam;

// Whether this processor has kernels to compare with; says so where it has none.
inline bool has_fused_kernels() {
  const bool has = std::string(cpu_kernels_for("").isa) != "baseline";
  if (!has) std::printf("skipped: this processor has no fused multiply-add kernels\n");
  return has;
}

// `n` elements in an allocation that ends with the last one and starts `shift` elements earlier:
// numbers of a dtype, or anything of `element_size` bytes.
class List {
 public:
  List(DType dtype, int64_t n, int64_t shift) : List(size_of(dtype), n, shift) { dtype_ = dtype; }
  List(int element_size, int64_t n, int64_t shift)
      : element_size_(element_size), n_(n), shift_(shift), memory_((n + shift) * element_size) {}

  DType dtype() const { return dtype_; }
  int64_t size() const { return n_; }
  char* data() { return n_ ? memory_.data() + shift_ * element_size_ : nullptr; }

  template <typename S>
  void put(int64_t i, S x) {
    std::memcpy(data() + i * element_size_, &x, sizeof x);
  }

  void set(int64_t i, double x) {
    switch (dtype_) {
      case DType::kFloat64: put(i, x); break;
      case DType::kFloat32: put(i, static_cast<float>(x)); break;
      case DType::kBFloat16: put(i, rounded<BFloat16>(x)); break;
      case DType::kFloat16: put(i, rounded<Float16>(x)); break;
    }
  }

  double get(int64_t i) const {
    switch (dtype_) {
      case DType::kFloat64: return taken<double>(i);
      case DType::kBFloat16: return to_compute(taken<BFloat16>(i));
      case DType::kFloat16: return to_compute(taken<Float16>(i));
      default: return taken<float>(i);
    }
  }

  // The same bits, or both not a number: the sign of a NaN that an operation makes is not defined.
  bool same(const List& other, int64_t i) const {
    return std::memcmp(at(i), other.at(i), element_size_) == 0 ||
           (std::isnan(get(i)) && std::isnan(other.get(i)));
  }

  bool same_before_first(const List& other) const {
    return std::equal(memory_.begin(), memory_.begin() + shift_ * element_size_,
                      other.memory_.begin());
  }

  bool same_bits(const List& other) const { return memory_ == other.memory_; }

 private:
  const char* at(int64_t i) const { return memory_.data() + (shift_ + i) * element_size_; }
  template <typename S>
  S taken(int64_t i) const {
    S x;
    std::memcpy(&x, at(i), sizeof x);
    return x;
  }
  template <typename S>
  static S rounded(double x) {
    S low;
    from_compute(static_cast<float>(x), low);
    return low;
  }

  DType dtype_ = DType::kFloat32;
  int element_size_;
  int64_t n_, shift_;
  std::vector<char> memory_;
};

// Options off or at their defaults; `switches` are turned over.
inline Hyper make_hyper(double lr, double weight_decay, bool trust_ratio,
                        const std::vector<double Hyper::*>& switches) {
  Hyper h{};
  h.lr = lr;
  h.alpha = 0.9, h.beta_low = 0.5, h.beta_high = 0.999, h.beta_init = 0.999;
  h.eps = 1e-8, h.delta = 1e-16, h.weight_decay = weight_decay;
  h.bias_correction = h.adam_w_mode = 1;
  h.trust_ratio = trust_ratio;
  for (double Hyper::* flag : switches) h.*flag = 1 - h.*flag;
  return h;
}

using TensorStatistics = std::array<double, kStatistics>;

// What a step needs and leaves beside its lists.
struct Sums {
  Sums(size_t tensors, bool collects)
      : norms(tensors, SumsOfSquares{0, 0}),
        statistics(tensors, TensorStatistics{}),
        collects(collects) {}

  std::vector<SumsOfSquares> norms;
  std::vector<TensorStatistics> statistics;
  bool collects;
};

// One phase, by the kernels for the GPU.
inline void launch(const gpu::UpdatePlan& plan, gpu::UpdateKind kind, const double* control,
                   const double* grad_scale, const std::vector<gpu::TypedAddress>& g,
                   const std::vector<gpu::LearningRate>& lr, Sums& sums) {
  const std::vector<char> uploaded = plan.image().bytes();
  // what is read but was not written shows
  std::vector<double> block_sums(2 * plan.num_blocks(), NAN),
      block_statistics(kStatistics * plan.num_blocks(), NAN);
  const gpu::UpdateMemory memory{
      .control = control,
      .grad_scale = gpu::typed_address(grad_scale, DType::kFloat64),
      .norms = &sums.norms.data()->theta,
      .statistics = sums.collects ? sums.statistics.data()->data() : nullptr,
      .block_sums = reinterpret_cast<SumsOfSquares*>(block_sums.data()),
      .block_statistics = block_statistics.data(),
  };
  gpu::launch_update(plan, uploaded.data(), kind, memory, g, lr, nullptr);
}

inline bool close(double a, double b, double tolerance = 1e-12) {
  return std::abs(a - b) <= tolerance * std::abs(b) || (std::isnan(a) && std::isnan(b)) || a == b;
}

// A step by both, in one phase or two; run_gpu and run_cpu are the test's.
template <typename Run>
void run_both(Run& by_gpu, Run& by_cpu) {
  const char* const name = by_gpu.c.name.c_str();
  Phase phase = Phase::kWhole;
  if (by_gpu.c.trust_ratio) {
    run_gpu(by_gpu, Phase::kStates);
    run_cpu(by_cpu, Phase::kStates);
    for (size_t i = 0; i < by_gpu.sums.norms.size(); ++i) {
      SumsOfSquares &found = by_gpu.sums.norms[i], &expected = by_cpu.sums.norms[i];
      CHECK(close(found.theta, expected.theta), "%s: norm of theta %zu", name, i);
      CHECK(close(found.update, expected.update), "%s: norm of update %zu", name, i);
      found = expected;
    }
    phase = Phase::kParameters;
  }
  run_gpu(by_gpu, phase);
  run_cpu(by_cpu, phase);
  CHECK(by_gpu.t.step == by_cpu.t.step, "%s: counts of tensors", name);
}

}  // namespace maxva::test
