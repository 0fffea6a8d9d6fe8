// How Python calls an operator: through torch's dispatcher, as torch.ops does, at less cost per
// tensor.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/MaybeOwned.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <utility>
#include <vector>

namespace maxva {

// Note [Borrowed tensors]
// The tensors of a Python sequence, kept alive by their Python objects alone: in torch a tensor's
// second reference takes one of its Python object, too, and gives it back under the GIL; with the
// thousands of tensors of a step that took longer than all checks of them. The objects are held by
// a tuple, as another thread may change the caller's list while the GIL is released.
class BorrowedTensors {
 public:
  BorrowedTensors() = default;
  BorrowedTensors(const BorrowedTensors&) = delete;
  BorrowedTensors& operator=(const BorrowedTensors&) = delete;
  ~BorrowedTensors() {
    for (at::Tensor& tensor : tensors_) Traits::destroyBorrow(tensor);
  }

  void borrow(pybind11::handle sequence) {
    objects_ = PySequence_Tuple(sequence.ptr());
    if (!objects_) throw pybind11::error_already_set();
    const auto size = static_cast<size_t>(PyTuple_GET_SIZE(objects_.get()));
    tensors_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      PyObject* const object = PyTuple_GET_ITEM(objects_.get(), i);
      if (!THPVariable_Check(object)) {
        type_error_ = "[" + std::to_string(i) + "] is no tensor but a " + Py_TYPE(object)->tp_name;
        return;
      }
      tensors_.push_back(Traits::createBorrow(THPVariable_Unpack(object)));
    }
  }

  // `name` is for the message where something is no tensor.
  at::TensorList list(const std::string& name) const {
    TORCH_CHECK_TYPE(type_error_.empty(), "maxva: ", name, type_error_);
    return tensors_;
  }

 private:
  using Traits = c10::MaybeOwnedTraits<at::Tensor>;

  THPObjectPtr objects_;
  std::vector<at::Tensor> tensors_;
  std::string type_error_;
};

// What an operator's argument of type T is in a call from Python, and how it is handed on; `name`
// is the argument's.
template <typename T>
struct FromPython {
  using type = T;
  static const T& pass(const T& value, const std::string&) { return value; }
};

template <typename T>
struct FromPython<const T&> : FromPython<T> {
  using type = const typename FromPython<T>::type&;
};

template <>
struct FromPython<at::TensorList> {
  using type = const BorrowedTensors&;
  static at::TensorList pass(const BorrowedTensors& tensors, const std::string& name) {
    return tensors.list(name);
  }
};

template <typename T>
struct FromPython<at::ArrayRef<T>> {
  using type = const std::vector<T>&;
  static at::ArrayRef<T> pass(const std::vector<T>& values, const std::string&) { return values; }
};

template <typename T>
struct FromPython<c10::List<T>> {
  using type = std::vector<T>;
  static c10::List<T> pass(const std::vector<T>& values, const std::string&) {
    c10::List<T> list;
    for (const T& value : values) list.push_back(value);
    return list;
  }
};

template <>
struct FromPython<c10::string_view> {
  using type = const std::string&;
  static c10::string_view pass(const std::string& value, const std::string&) { return value; }
};

// Adds a function to the module that calls the operator maxva::`name`, of this kernel's signature;
// all its arguments have to be given, the schema's defaults too.
template <typename R, typename... Args>
void define_call(pybind11::module_& m, const char* name, R (*)(Args...)) {
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow((std::string("maxva::") + name).c_str(), "")
                      .template typed<R(Args...)>();
  const auto call = [op]<size_t... I>(std::index_sequence<I...>, const auto&... args) -> R {
    // no gradients are recorded: torch's fallback for autograd would box all arguments
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(FromPython<Args>::pass(args, op.schema().arguments()[I].name())...);
  };
  m.def(name, torch::wrap_pybind_function_no_gil([call](typename FromPython<Args>::type... args) {
          return call(std::index_sequence_for<Args...>(), args...);
        }));
}

}  // namespace maxva

template <>
struct pybind11::detail::type_caster<maxva::BorrowedTensors> {
  PYBIND11_TYPE_CASTER(maxva::BorrowedTensors, const_name("list[torch.Tensor]"));

  bool load(handle source, bool) {
    value.borrow(source);
    return true;
  }
};
