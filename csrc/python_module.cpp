// The module that Python imports: its load registers the operators, and two of them can be called
// past the dispatcher, which costs five times what a small loss does.

#include <Python.h>

#include <exception>

#include "instruction_sets.h"
#include "kd_loss_operator.h"

// Of torch 2.14; null in an older one. The binary itself needs 2.10.
extern "C" {
__attribute__((weak)) AOTITorchError torch_tensor_from_pyobject(void*, AtenTensorHandle*);
__attribute__((weak)) AOTITorchError torch_tensor_to_pyobject(AtenTensorHandle, void*, void**);
}

namespace dmkd {
namespace {

PyObject* instruction_set(PyObject*, PyObject*) {
  const Isa isa = best_isa();
  return PyUnicode_FromString(isa >= Isa::kAvx512 ? "avx512"
                              : isa == Isa::kAvx2 ? "avx2"
                                                  : "scalar");
}

Tensor tensor_of(PyObject* object) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_tensor_from_pyobject(object, &handle));
  return Tensor(handle);
}

std::optional<Tensor> optional_tensor_of(PyObject* object) {
  if (object == Py_None) return std::nullopt;
  return tensor_of(object);
}

PyObject* object_of(const Tensor& tensor) {
  void* object = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_tensor_to_pyobject(tensor.get(), nullptr, &object));
  return static_cast<PyObject*>(object);
}

// (loss, stats, gradient) of a `Problem` (dmkd_fast/loss/ops.py), which is a tuple whose fields
// have the types of the operators' schema.
PyObject* loss_and_gradient_of(PyObject*, PyObject* fields) {
  PyObject* result = nullptr;
  try {
    const auto field = [&](Py_ssize_t i) { return PyTuple_GetItem(fields, i); };
    const auto number = [&](Py_ssize_t i) { return PyFloat_AsDouble(field(i)); };
    const Tensor student = tensor_of(field(0)), teacher = tensor_of(field(1));
    const std::optional<Tensor> target = optional_tensor_of(field(2));
    const std::optional<Tensor> weight = optional_tensor_of(field(3));
    const std::optional<Tensor> temperatures = optional_tensor_of(field(9));
    std::vector<double> terms(PyList_Size(field(10)));
    for (size_t i = 0; i < terms.size(); ++i) {
      terms[i] = PyFloat_AsDouble(PyList_GetItem(field(10), i));
    }
    const Problem problem{student,   teacher,      target,    weight,
                          number(4), number(5),    number(6), number(7),
                          number(8), temperatures, terms,     field(11) == Py_True};
    if (PyErr_Occurred()) return nullptr;
    std::optional<std::array<Tensor, 3>> tensors;
    std::exception_ptr error;
    PyThreadState* const thread = PyEval_SaveThread();
    try {
      tensors = loss_and_gradient(problem);
    } catch (...) {
      error = std::current_exception();
    }
    PyEval_RestoreThread(thread);
    if (error) std::rethrow_exception(error);
    result = PyTuple_New(3);
    for (Py_ssize_t i = 0; result != nullptr && i < 3; ++i) {
      PyTuple_SetItem(result, i, object_of((*tensors)[i]));  // takes it over
    }
    return result;
  } catch (const std::exception& error) {
    Py_XDECREF(result);
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// The factors of the rows; arguments as those of the operator.
PyObject* row_weights_of(PyObject*, PyObject* arguments) {
  try {
    const auto at = [&](Py_ssize_t i) { return PyTuple_GetItem(arguments, i); };
    const int64_t ignore_index = PyLong_AsLongLong(at(6));
    if (PyErr_Occurred()) return nullptr;
    return object_of(kd_loss_row_weights(
        tensor_of(at(0)), tensor_of(at(1)), optional_tensor_of(at(2)), optional_tensor_of(at(3)),
        optional_tensor_of(at(4)), optional_tensor_of(at(5)), ignore_index, at(7) == Py_True));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "avx512, avx2 or scalar."},
    {"loss_and_gradient", loss_and_gradient_of, METH_O, "Loss, statistics and gradient."},
    {"row_weights", row_weights_of, METH_VARARGS, "Factors of the rows."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace dmkd

// Importing the module runs the registrations of the other files.
PyMODINIT_FUNC PyInit__C() {
  PyObject* const created = PyModule_Create(&dmkd::module);
  const bool is_direct = torch_tensor_from_pyobject != nullptr;
  if (created != nullptr)
    PyModule_AddObjectRef(created, "is_direct", is_direct ? Py_True : Py_False);
  return created;
}
