// How Python calls an operator: through torch's dispatcher, as torch.ops does, at less cost per
// tensor.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

namespace maxva {

// Note [Borrowed tensors]
// The tensors of a Python list or tuple, which keeps them alive during the call, with no reference
// of their own: in torch a tensor's second reference takes one of its Python object, too, and with
// the thousands of tensors of a step that took longer than all checks of them.
class BorrowedTensors {
 public:
  BorrowedTensors() = default;
  BorrowedTensors(const BorrowedTensors&) = delete;
  BorrowedTensors& operator=(const BorrowedTensors&) = delete;
  ~BorrowedTensors() {
    for (at::Tensor& tensor : tensors_) Traits::destroyBorrow(tensor);
  }

  // False for what is no list or tuple.
  bool borrow(pybind11::handle sequence) {
    if (!PyList_Check(sequence.ptr()) && !PyTuple_Check(sequence.ptr())) return false;
    PyObject** const items = PySequence_Fast_ITEMS(sequence.ptr());
    const auto size = static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence.ptr()));
    tensors_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      if (!THPVariable_Check(items[i])) {
        throw pybind11::type_error("maxva: a list of tensors holds a " +
                                   std::string(Py_TYPE(items[i])->tp_name) + " at " +
                                   std::to_string(i));
      }
      tensors_.push_back(Traits::createBorrow(THPVariable_Unpack(items[i])));
    }
    return true;
  }

  at::TensorList list() const { return tensors_; }

 private:
  using Traits = c10::MaybeOwnedTraits<at::Tensor>;

  std::vector<at::Tensor> tensors_;
};

// What an operator's argument of type T is in a call from Python, and how it is handed on.
template <typename T>
struct FromPython {
  using type = T;
  static const T& pass(const T& value) { return value; }
};

template <typename T>
struct FromPython<const T&> : FromPython<T> {
  using type = const typename FromPython<T>::type&;
};

template <>
struct FromPython<at::TensorList> {
  using type = const BorrowedTensors&;
  static at::TensorList pass(const BorrowedTensors& tensors) { return tensors.list(); }
};

template <typename T>
struct FromPython<at::ArrayRef<T>> {
  using type = const std::vector<T>&;
  static at::ArrayRef<T> pass(const std::vector<T>& values) { return values; }
};

template <typename T>
struct FromPython<c10::List<T>> {
  using type = std::vector<T>;
  static c10::List<T> pass(const std::vector<T>& values) {
    c10::List<T> list;
    for (const T& value : values) list.push_back(value);
    return list;
  }
};

template <>
struct FromPython<c10::string_view> {
  using type = const std::string&;
  static c10::string_view pass(const std::string& value) { return value; }
};

// Adds a function to the module that calls the operator maxva::`name`, registered as `kernel`.
template <typename R, typename... Args>
void define_call(pybind11::module_& m, const char* name, R (*)(Args...)) {
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow((std::string("maxva::") + name).c_str(), "")
                      .template typed<R(Args...)>();
  m.def(name, torch::wrap_pybind_function_no_gil([op](typename FromPython<Args>::type... args) {
          // no gradients are recorded: torch's fallback for autograd would box all arguments
          const at::AutoDispatchBelowADInplaceOrView below_autograd;
          return op.call(FromPython<Args>::pass(args)...);
        }));
}

}  // namespace maxva

template <>
struct pybind11::detail::type_caster<maxva::BorrowedTensors> {
  PYBIND11_TYPE_CASTER(maxva::BorrowedTensors, const_name("list[torch.Tensor]"));

  bool load(handle source, bool) { return value.borrow(source); }
};
