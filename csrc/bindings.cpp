// The operators torch sees: schemas, and every check, once, before any backend changes anything.
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/irange.h>
#include <torch/library.h>
#include <torch/version.h>

#include <array>
#include <deque>
#include <limits>

#include "backend.h"
#include "python_call.h"

namespace maxva {

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return DType::kFloat64;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: return DType::kFloat32;  // check_dtype has let no other through
  }
}

namespace {

using at::Tensor;
using at::TensorList;

// Of another layout than at::kStrided torch's dispatcher lets no tensor through to here.

void check_dtype(const Tensor& tensor, const char* list, size_t i) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
      "maxva: ", list, "[", i, "] is ", dtype,
      "; float32, float64, bfloat16 and float16 are supported");
}

void check_like_parameter(const Tensor& tensor, const Tensor& theta, const char* list, size_t i) {
  TORCH_CHECK_VALUE(tensor.sizes() == theta.sizes(), "maxva: ", list, "[", i, "] has shape ",
                    tensor.sizes(), ", its parameter has ", theta.sizes());
  TORCH_CHECK_VALUE(tensor.device() == theta.device(), "maxva: ", list, "[", i, "] is on ",
                    tensor.device(), ", its parameter is on ", theta.device());
}

void check_one_element(const Tensor& tensor, const char* name, std::optional<at::ScalarType> dtype,
                       const at::Device& device) {
  TORCH_CHECK_VALUE(tensor.numel() == 1, "maxva: ", name, " must have one element, has ",
                    tensor.numel());
  TORCH_CHECK_TYPE(!dtype || tensor.scalar_type() == *dtype, "maxva: ", name, " must be ", *dtype,
                   ", is ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == device, "maxva: ", name, " is on ", tensor.device(),
                    ", the parameters are on ", device);
}

void check_one_element(const std::optional<Tensor>& tensor, const char* name,
                       std::optional<at::ScalarType> dtype, const at::Device& device) {
  if (tensor) check_one_element(*tensor, name, dtype, device);
}

void check_writable(const Tensor& tensor, const char* list, size_t i) {
  TORCH_CHECK_VALUE(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, "maxva: ", list, "[",
                    i, "] of shape ", tensor.sizes(), " and strides ", tensor.strides(),
                    " is written, but has elements that share memory (an expanded tensor); clone "
                    "it first");
}

bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0) return true;
  for (const auto dim : c10::irange(a.dim())) {
    if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim)) return false;
  }
  return true;
}

// A copy-on-write tensor that will be written gets memory of its own: it cannot in kernels'
// threads.
void own_memory(const Tensor& tensor) { tensor.mutable_data_ptr(); }

// Note [Layouts]
// A kernel walks memory, so every list must be dense and laid out as its parameter is. A tensor
// that is not (a gradient with other strides, an expanded one, a slice with gaps) goes through a
// temporary that is; what is written is copied back into the tensor the caller holds. A list in
// which all fit, as they do in nearly every step, is used as it is.
class LayoutFitter {
 public:
  TensorList dense(TensorList tensors, bool written) {
    return fitted(tensors, written, [](size_t, const Tensor& tensor) {
      return tensor.is_non_overlapping_and_dense() ? Tensor() : tensor.contiguous();
    });
  }

  TensorList like(TensorList theta, TensorList tensors, bool written) {
    return fitted(tensors, written, [&](size_t i, const Tensor& tensor) {
      if (same_layout(theta[i], tensor)) return Tensor();
      return at::empty_strided(theta[i].sizes(), theta[i].strides(), tensor.options())
          .copy_(tensor);
    });
  }

  void copy_back() const {
    for (const auto& [original, temporary] : copies_) original.copy_(temporary);
  }

 private:
  // `temporary` gives none (undefined) for a tensor that fits.
  template <typename F>
  TensorList fitted(TensorList tensors, bool written, const F& temporary) {
    std::vector<Tensor>* list = nullptr;
    for (const auto i : c10::irange(tensors.size())) {
      Tensor fits = temporary(i, tensors[i]);
      if (!fits.defined()) {
        if (written) own_memory(tensors[i]);
        continue;
      }
      if (written) copies_.emplace_back(tensors[i], fits);
      if (list == nullptr) list = &lists_.emplace_back(tensors.vec());
      (*list)[i] = std::move(fits);
    }
    return list == nullptr ? tensors : TensorList(*list);
  }

  std::deque<std::vector<Tensor>> lists_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
};

Algorithm algorithm_of(c10::string_view name) {
  if (name == "madam") return Algorithm::kMAdam;
  if (name == "lamadam") return Algorithm::kLaMAdam;
  TORCH_CHECK_VALUE(false, "maxva: algorithm must be 'madam' or 'lamadam', is '", name, "'");
}

void bump_versions(TensorList tensors) {
  for (const Tensor& tensor : tensors) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

// What update_ and update_packed_ are given alike, beside check_only: to check and do nothing.
struct Common {
  TensorList theta, g, master, step, group_step;
  at::IntArrayRef group_sizes;
  at::ArrayRef<double> hyper;
  const c10::List<std::optional<Tensor>>& lr;
  const std::optional<Tensor>&control, &grad_scale, &norms, &statistics;
  at::IntArrayRef rounding;
  c10::string_view algorithm;
  int64_t phase;
};

// Tensors of the parameters' shapes that an update writes: states, or master weights.
struct List {
  const char* name;
  TensorList tensors;
  TensorList TensorLists::* member;
  bool optional;
  std::optional<at::ScalarType> dtype;  // else that of the parameter's arithmetic
};

// Everything but the tensors that belong to single parameters.
UpdateArgs checked_args(const Common& common, at::ArrayRef<List> lists) {
  const size_t n = common.theta.size();
  const at::Device device = common.theta[0].device();
  UpdateArgs args;
  args.lists.theta = common.theta;  // run_update fits them
  args.algorithm = algorithm_of(common.algorithm);
  TORCH_CHECK_VALUE(common.phase >= 0 && common.phase <= 2, "maxva: phase must be 0, 1 or 2, is ",
                    common.phase);
  args.phase = static_cast<Phase>(common.phase);
  TORCH_CHECK_VALUE(common.g.size() == n && common.step.size() == n, "maxva: ", n,
                    " parameters, but ", common.g.size(), " gradients and ", common.step.size(),
                    " step counters");
  for (const List& list : lists) {
    TORCH_CHECK_VALUE(list.tensors.size() == n || (list.optional && list.tensors.empty()),
                      "maxva: ", n, " parameters, but ", list.tensors.size(), " of ", list.name);
  }
  const size_t groups = common.group_sizes.size();
  TORCH_CHECK_VALUE(common.hyper.size() == groups * kHyperFields && common.lr.size() == groups,
                    "maxva: ", groups, " groups need ", groups * kHyperFields,
                    " hyper-parameters and ", groups, " learning rates, got ", common.hyper.size(),
                    " and ", common.lr.size());
  for (const Tensor& counter : common.group_step) {
    check_one_element(counter, "group_step", at::kInt, device);
  }
  for (const auto k : c10::irange(groups)) {
    const int64_t size = common.group_sizes[k];
    TORCH_CHECK_VALUE(size >= 0 && size <= int64_t(n - args.group_of.size()), "maxva: group_sizes[",
                      k, "] is ", size, ", negative or more than there are");
    args.group_of.insert(args.group_of.end(), size, k);
    args.hyper.push_back(reinterpret_cast<const Hyper*>(common.hyper.data())[k]);
    args.lr.push_back(common.lr.get(k));
    check_one_element(args.lr.back(), "lr", {}, device);
  }
  TORCH_CHECK_VALUE(args.group_of.size() == n, "maxva: group_sizes add up to ",
                    args.group_of.size(), ", there are ", n, " parameters");
  check_one_element(common.grad_scale, "grad_scale", {}, device);
  const std::optional<Tensor>& control = common.control;
  TORCH_CHECK_VALUE(
      !control || (control->numel() == kControlFields && control->is_contiguous() &&
                   control->scalar_type() == at::kDouble && control->device() == device),
      "maxva: control must be float64 [", int(kControlFields), "] on ", device);
  const auto is_table = [&](const std::optional<Tensor>& table, int64_t columns) {
    return table && table->sizes() == at::IntArrayRef({int64_t(n), columns}) &&
           table->scalar_type() == at::kDouble && table->is_contiguous() &&
           table->device() == device;
  };
  TORCH_CHECK_VALUE(args.phase == Phase::kWhole || is_table(common.norms, 2),
                    "maxva: norms must be float64 [", n, ", 2] on ", device);
  TORCH_CHECK_VALUE(!common.statistics || is_table(common.statistics, kStatistics),
                    "maxva: statistics must be float64 [", n, ", ", int(kStatistics), "] on ",
                    device);
  TORCH_CHECK_VALUE(common.rounding.empty() || common.rounding.size() == n * kRoundingFields,
                    "maxva: rounding must be empty or ", n, " rows of ", kRoundingFields, ", has ",
                    common.rounding.size(), " entries");
  const auto* const rounding_rows = reinterpret_cast<const Rounding*>(common.rounding.data());
  args.rounding.assign(rounding_rows, rounding_rows + common.rounding.size() / kRoundingFields);

  args.control = common.control;
  args.grad_scale = common.grad_scale;
  args.norms = common.norms;
  args.statistics = common.statistics;
  return args;
}

// The tensors of parameter i.
void check_parameter(const Common& common, at::ArrayRef<List> lists, const Rounding& rounding,
                     size_t i) {
  const Tensor& theta = common.theta[i];
  const at::Device device = common.theta[0].device();
  check_dtype(theta, "parameter", i);
  TORCH_CHECK_VALUE(theta.device() == device, "maxva: parameter ", i, " is on ", theta.device(),
                    ", parameter 0 is on ", device);
  check_writable(theta, "parameter", i);
  check_dtype(common.g[i], "gradient", i);
  check_like_parameter(common.g[i], theta, "gradient", i);
  if (common.grad_scale) check_writable(common.g[i], "gradient", i);
  TORCH_CHECK_TYPE(common.master.empty() || theta.scalar_type() != at::kDouble, "maxva: parameter ",
                   i, " is float64, which has no master weight");
  const auto arithmetic = theta.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const List& list : lists) {
    if (list.tensors.empty()) continue;
    const Tensor& tensor = list.tensors[i];
    const at::ScalarType dtype = list.dtype.value_or(arithmetic);
    check_like_parameter(tensor, theta, list.name, i);
    check_writable(tensor, list.name, i);
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "maxva: ", list.name, "[", i, "] is ",
                     tensor.scalar_type(), ", must be ", dtype, " for a parameter of ",
                     theta.scalar_type());
  }
  check_one_element(common.step[i], "step", at::kFloat, device);
  TORCH_CHECK_VALUE(rounding.parameter < 0 || (rounding.offset >= 0 && rounding.inner_local > 0 &&
                                               rounding.inner_global >= 0),
                    "maxva: rounding[", i, "] needs offset >= 0 and positive inner sizes");
  TORCH_CHECK_VALUE(rounding.parameter < 0 || rounding.theta == 0 ||
                        (theta.scalar_type() == at::kBFloat16 && common.master.empty()),
                    "maxva: rounding[", i,
                    "] is for a bfloat16 parameter without master weights, else its last field, "
                    "theta, must be 0");
}

// Fits layouts, computes, and tells autograd what has been written. All checks have been made.
void run_update(const Common& common, at::ArrayRef<List> lists, UpdateArgs& args) {
  const c10::OptionalDeviceGuard guard(at::device_of(common.theta[0]));
  // Only now: a temporary is the first thing that costs, and copies must be in order.
  LayoutFitter fitter;
  args.lists.theta = fitter.dense(common.theta, true);
  args.lists.g = fitter.like(args.lists.theta, common.g, common.grad_scale.has_value());
  for (const List& list : lists) {
    args.lists.*list.member = fitter.like(args.lists.theta, list.tensors, true);
  }
  args.lists.step = common.step;
  args.lists.group_step = common.group_step;
  for (const Tensor& tensor : args.lists.scale) own_memory(tensor);
  if (common.theta[0].device().is_cpu()) {
    update_cpu(args);
  } else {
#if defined(MAXVA_WITH_CUDA)
    update_cuda(args);
#endif
  }
  fitter.copy_back();
  bump_versions(common.theta);
  if (common.grad_scale) bump_versions(common.g);
  for (const List& list : lists) bump_versions(list.tensors);
  bump_versions(args.lists.scale);
  bump_versions(common.step);
  bump_versions(common.group_step);
  for (const auto& table : {common.norms, common.statistics}) {
    if (table) bump_versions(*table);
  }
}

void update_(TensorList theta, TensorList g, TensorList m, TensorList u, TensorList v, TensorList w,
             TensorList vmax, TensorList master, TensorList step, TensorList group_step,
             at::IntArrayRef group_sizes, at::ArrayRef<double> hyper,
             const c10::List<std::optional<Tensor>>& lr, const std::optional<Tensor>& control,
             const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& norms,
             const std::optional<Tensor>& statistics, at::IntArrayRef rounding,
             c10::string_view algorithm, int64_t phase, bool check_only) {
  if (theta.empty()) return;
  const Common common{theta,   g,          master, step,       group_step, group_sizes, hyper, lr,
                      control, grad_scale, norms,  statistics, rounding,   algorithm,   phase};
  const List lists[] = {
      {"exp_avg (m)", m, &TensorLists::m, false, {}},
      {"maxva_avg (u)", u, &TensorLists::u, false, {}},
      {"exp_avg_sq (v)", v, &TensorLists::v, false, {}},
      {"maxva_weight (w)", w, &TensorLists::w, false, {}},
      {"max_exp_avg_sq (vmax)", vmax, &TensorLists::vmax, true, {}},
      {"master_param", master, &TensorLists::master, true, {}},
  };
  UpdateArgs args = checked_args(common, lists);
  for (const auto i : c10::irange(theta.size())) {
    check_parameter(common, lists, args.rounding_of(i), i);
  }
  if (!check_only) run_update(common, lists, args);
}

// Whether element k of the memory belongs to row k / row of dimension 0.
bool has_rows_outermost(const Tensor& theta, int64_t row) {
  return theta.is_non_overlapping_and_dense() && (theta.size(0) <= 1 || theta.stride(0) == row);
}

void update_packed_(TensorList theta, TensorList g, TensorList packed, TensorList scale,
                    TensorList maximum, TensorList master, TensorList step, TensorList group_step,
                    at::IntArrayRef group_sizes, at::ArrayRef<double> hyper,
                    const c10::List<std::optional<Tensor>>& lr,
                    const std::optional<Tensor>& control, const std::optional<Tensor>& grad_scale,
                    const std::optional<Tensor>& norms, const std::optional<Tensor>& statistics,
                    at::IntArrayRef rounding, c10::string_view algorithm, int64_t phase,
                    bool check_only) {
  if (theta.empty()) return;
  const size_t n = theta.size();
  const Common common{theta,   g,          master, step,       group_step, group_sizes, hyper, lr,
                      control, grad_scale, norms,  statistics, rounding,   algorithm,   phase};
  const bool is_int8 = !packed.empty() && packed[0].scalar_type() == at::kInt;
  const List lists[] = {
      {"maxva_packed", packed, &TensorLists::packed, false, is_int8 ? at::kInt : at::kLong},
      {"maxva_packed_max", maximum, &TensorLists::maximum, true,
       is_int8 ? at::kByte : at::kBFloat16},
      {"master_param", master, &TensorLists::master, true, {}},
  };
  UpdateArgs args = checked_args(common, lists);
  TORCH_CHECK_VALUE(scale.size() == (is_int8 ? n : 0), "maxva: ", n, " parameters with states of ",
                    packed[0].scalar_type(), " words, but ", scale.size(),
                    " of maxva_scale: int32 words have one each, int64 words none");
  TORCH_CHECK_VALUE(!args.rounding.empty(),
                    "maxva: rounding is empty; compact states need a row per parameter");
  for (const auto i : c10::irange(n)) {
    const Rounding rounding_of = args.rounding_of(i);
    check_parameter(common, lists, rounding_of, i);
    TORCH_CHECK_TYPE(theta[i].scalar_type() != at::kDouble, "maxva: parameter ", i,
                     " is float64, whose states are never compact; use update_");
    TORCH_CHECK_VALUE(theta[i].dim() > 0 && has_rows_outermost(theta[i], args.row_of(i)),
                      "maxva: parameter ", i, " of shape ", theta[i].sizes(), " and strides ",
                      theta[i].strides(),
                      " is not dense with dimension 0 outermost, which compact states need; make "
                      "it contiguous");
    for (const List& list : at::ArrayRef<List>(lists).slice(0, 2)) {
      if (list.tensors.empty()) continue;
      // no copy of another layout would do: its blocks, and so its scales, are of other elements
      TORCH_CHECK_VALUE(same_layout(theta[i], list.tensors[i]), "maxva: ", list.name, "[", i,
                        "] has strides ", list.tensors[i].strides(), ", its parameter has ",
                        theta[i].strides(), "; blocks are of memory, so the layouts must agree");
    }
    TORCH_CHECK_VALUE(rounding_of.parameter >= 0, "maxva: rounding[", i,
                      "] has no parameter index, which compact states need");
    if (!is_int8) continue;
    const std::array<int64_t, 2> blocks{theta[i].size(0), blocks_of_row(args.row_of(i))};
    const Tensor& scale_of = scale[i];
    TORCH_CHECK_VALUE(scale_of.scalar_type() == at::kInt &&
                          (theta[i].numel() == 0 || scale_of.sizes() == at::IntArrayRef(blocks)) &&
                          scale_of.is_contiguous() && scale_of.device() == theta[i].device(),
                      "maxva: maxva_scale[", i, "] must be contiguous int32 ",
                      at::IntArrayRef(blocks), " on ", theta[i].device(), ", is ",
                      scale_of.scalar_type(), " ", scale_of.sizes(), " on ", scale_of.device());
  }
  args.lists.scale = scale;
  if (!check_only) run_update(common, lists, args);
}

Tensor sum_of_squares(TensorList g) {
  TORCH_CHECK_VALUE(!g.empty(), "maxva: sum_of_squares needs at least one tensor");
  for (const auto i : c10::irange(g.size())) {
    check_dtype(g[i], "gradient", i);
    TORCH_CHECK_VALUE(g[i].device() == g[0].device(), "maxva: gradient ", i, " is on ",
                      g[i].device(), ", gradient 0 is on ", g[0].device());
  }
  LayoutFitter fitter;
  const TensorList dense = fitter.dense(g, false);
#if defined(MAXVA_WITH_CUDA)
  if (g[0].is_cuda()) return sum_of_squares_cuda(dense);
#endif
  return sum_of_squares_cpu(dense);
}

void write_control_(const Tensor& control, const std::optional<Tensor>& sum_of_squares,
                    const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                    double max_grad_norm, bool skip_nonfinite) {
  const at::Device device = control.device();
  TORCH_CHECK_VALUE(control.numel() == kControlFields && control.scalar_type() == at::kDouble &&
                        control.is_contiguous(),
                    "maxva: control must be float64 [", int(kControlFields), "]");
  check_one_element(sum_of_squares, "sum_of_squares", at::kDouble, device);
  check_one_element(grad_scale, "grad_scale", {}, device);
  check_one_element(found_inf, "found_inf", {}, device);
  const ControlArgs args{control,   sum_of_squares, grad_scale,
                         found_inf, max_grad_norm,  skip_nonfinite};
  if (device.is_cpu()) {
    write_control_cpu(args);
  } else {
#if defined(MAXVA_WITH_CUDA)
    write_control_cuda(args);
#endif
  }
  bump_versions(control);
}

// For layouts.py: device, dtype, layout, sizes and strides of tensors, as words to be compared; and
// the addresses at which they can be written.
pybind11::bytes facts_of(const BorrowedTensors& tensors, bool addresses) {
  std::vector<int64_t> words;
  const auto append = [&](at::IntArrayRef more) {
    words.insert(words.end(), more.begin(), more.end());
  };
  const TensorList list = tensors.list("tensors");
  // a copy-on-write tensor is copied where its address is taken
  const bool copies = addresses && !list.empty();
  const c10::OptionalDeviceGuard guard(copies ? at::device_of(list[0]) : std::nullopt);
  for (const Tensor& tensor : list) {
    const at::Device device = tensor.device();
    append({int64_t(device.type()), device.index(), int64_t(tensor.scalar_type()),
            int64_t(tensor.layout()), tensor.dim()});
    append(tensor.sizes());
    append(tensor.strides());
    if (addresses) words.push_back(reinterpret_cast<int64_t>(tensor.mutable_data_ptr()));
  }
  return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t)};
}

// For layouts.py: whether tensors have this dtype, and shape and layout of those of `like`.
bool fit(const BorrowedTensors& tensors, const BorrowedTensors& like, at::ScalarType dtype) {
  const TensorList list = tensors.list("tensors"), like_list = like.list("like");
  if (list.size() != like_list.size()) return false;
  for (const auto i : c10::irange(list.size())) {
    const Tensor &tensor = list[i], &other = like_list[i];
    if (tensor.scalar_type() != dtype || tensor.sizes() != other.sizes() ||
        !same_layout(tensor, other)) {
      return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace maxva

TORCH_LIBRARY(maxva, m) {
  m.def(
      "update_(Tensor(a!)[] theta, Tensor(b!)[] g, Tensor(c!)[] m, Tensor(d!)[] u, "
      "Tensor(e!)[] v, Tensor(f!)[] w, Tensor(g!)[] vmax, Tensor(h!)[] master, "
      "Tensor(i!)[] step, Tensor(j!)[] group_step, int[] group_sizes, float[] hyper, "
      "Tensor?[] lr, Tensor? control, Tensor? grad_scale, Tensor(k!)? norms, "
      "Tensor(l!)? statistics, int[] rounding, str algorithm, int phase, "
      "bool check_only=False) -> ()");
  m.def(
      "update_packed_(Tensor(a!)[] theta, Tensor(b!)[] g, Tensor(c!)[] packed, "
      "Tensor(d!)[] scale, Tensor(e!)[] maximum, Tensor(f!)[] master, Tensor(g!)[] step, "
      "Tensor(h!)[] group_step, int[] group_sizes, float[] hyper, Tensor?[] lr, Tensor? control, "
      "Tensor? grad_scale, Tensor(i!)? norms, Tensor(j!)? statistics, int[] rounding, "
      "str algorithm, int phase, bool check_only=False) -> ()");
  m.def("sum_of_squares(Tensor[] g) -> Tensor");
  m.def(
      "write_control_(Tensor(a!) control, Tensor? sum_of_squares, Tensor? grad_scale, "
      "Tensor? found_inf, float max_grad_norm, bool skip_nonfinite) -> ()");
}

#define MAXVA_FOR_EACH_OPERATOR(define) \
  define(update_) define(update_packed_) define(sum_of_squares) define(write_control_)
#define MAXVA_IMPLEMENT(name) m.impl(#name, &maxva::name);
#define MAXVA_DEFINE_CALL(name) maxva::define_call(m, #name, &maxva::name);

TORCH_LIBRARY_IMPL(maxva, CPU, m){MAXVA_FOR_EACH_OPERATOR(MAXVA_IMPLEMENT)}
#if defined(MAXVA_WITH_CUDA)
TORCH_LIBRARY_IMPL(maxva, CUDA, m){MAXVA_FOR_EACH_OPERATOR(MAXVA_IMPLEMENT)}
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "The operators of torch.ops.maxva, what layouts.py asks, and what this was built with.";
  m.attr("TORCH_VERSION") = TORCH_VERSION;
  m.attr("HYPER_FIELDS") = maxva::kHyperFields;
  m.attr("CONTROL_FIELDS") = static_cast<int>(maxva::kControlFields);
  m.attr("STATISTICS") = static_cast<int>(maxva::kStatistics);
  m.attr("ROUNDING_FIELDS") = maxva::kRoundingFields;
  m.attr("WITH_CUDA") =
#if defined(MAXVA_WITH_CUDA)
      true;
#else
      false;
#endif
  MAXVA_FOR_EACH_OPERATOR(MAXVA_DEFINE_CALL)
  m.def("facts_of", torch::wrap_pybind_function(&maxva::facts_of));
  m.def("fit", torch::wrap_pybind_function(&maxva::fit));
  m.def(
      "cpu_isa", [] { return std::string(maxva::cpu_kernels().isa); },
      "The instruction set of the CPU kernels in use; MAXVA_CPU_ISA chooses another at import.");
  m.def("use_cpu_isa", &maxva::use_cpu_kernels,
        "Uses the CPU kernels of another instruction set from now on; \"\" for the widest.");
}
