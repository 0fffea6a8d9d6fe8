// The contract between bindings.cpp, which checks, and the backends, which compute.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "cpu_kernels.h"

namespace maxva {

// One step's tensors, checked: element i of every list belongs to parameter i, all are on one
// device and share their parameter's dense layout. Empty lists: vmax, master, group_step; with
// compact states m to vmax, without them packed (int32 or int64), scale (of int32 only: int32
// [size(0), blocks of a row]) and maximum.
struct TensorLists {
  at::TensorList theta, g, m, u, v, w, vmax, master;
  at::TensorList packed, scale, maximum;
  at::TensorList step;        // 0-dim float32: updates so far
  at::TensorList group_step;  // int32 [1]: counters of groups, each counted up by one
};

struct UpdateArgs {
  TensorLists lists;
  Algorithm algorithm;
  Phase phase;
  std::vector<Hyper> hyper;                   // per group
  std::vector<std::optional<at::Tensor>> lr;  // per group: one element, overrides hyper.lr
  std::vector<int64_t> group_of;              // per parameter
  std::optional<at::Tensor> control;          // float64 [kControlFields]
  std::optional<at::Tensor> grad_scale;       // one element; g is divided by it and written back
  std::optional<at::Tensor> norms;            // float64 [n, 2]: sums of squares of theta, update
  std::optional<at::Tensor> statistics;  // float64 [n, kStatistics]; those of the phase are set
  std::vector<Rounding> rounding;        // per parameter; empty: all to the nearest

  bool is_packed() const { return !lists.packed.empty(); }
  bool amsgrad() const { return !lists.vmax.empty() || !lists.maximum.empty(); }
  Packing packing() const { return lists.scale.empty() ? Packing::kBFloat16 : Packing::kInt8; }
  // Elements of a row of dimension 0.
  int64_t row_of(size_t i) const {
    const at::Tensor& theta = lists.theta[i];
    return theta.numel() == 0 ? 0 : theta.numel() / theta.size(0);
  }

  Rounding rounding_of(size_t i) const { return rounding.empty() ? Rounding{} : rounding[i]; }
};

// Moves states and parameters and counts the step, unless control says skip.
void update_cpu(const UpdateArgs& args);
void update_cuda(const UpdateArgs& args);

// float64 [1]: the sum of squares of all elements, inf or NaN where one of them is.
at::Tensor sum_of_squares_cpu(at::TensorList g);
at::Tensor sum_of_squares_cuda(at::TensorList g);

struct ControlArgs {
  at::Tensor control;                               // float64 [kControlFields], written
  std::optional<at::Tensor> sum_of_squares;         // float64 [1], of the gradients as they are
  std::optional<at::Tensor> grad_scale, found_inf;  // one element each
  double max_grad_norm;                             // infinity: no clipping
  bool skip_nonfinite;
};

void write_control_cpu(const ControlArgs& args);
void write_control_cuda(const ControlArgs& args);

DType dtype_of(const at::Tensor& tensor);

}  // namespace maxva
