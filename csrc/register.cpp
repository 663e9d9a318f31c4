// CPU implementations of the operators that dmkd_fast/ops declares, by libtorch's stable ABI.
//
// Only torch/csrc/stable and torch/headeronly are used, so one binary serves every torch from the
// version it targets on. Shapes and dtypes are checked in Python; what is checked again here is
// what memory safety depends on.

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "kd_loss_cpu.h"

namespace dmkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerTask = 32768;

ScalarKind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return ScalarKind::kFloat;
    case ScalarType::Double:
      return ScalarKind::kDouble;
    case ScalarType::Half:
      return ScalarKind::kHalf;
    case ScalarType::BFloat16:
      return ScalarKind::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "logits: expected float32, float64, float16 or bfloat16");
  }
}

// A (B, C) tensor whose rows are dense; others are copied.
Tensor dense_rows(const Tensor& tensor) {
  const bool dense = tensor.size(1) <= 1 || tensor.stride(1) == 1;
  return dense ? tensor : torch::stable::contiguous(tensor);
}

void check(const Tensor& student, const Tensor& teacher) {
  STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2, "logits: expected (B, C)");
  STD_TORCH_CHECK(student.size(0) == teacher.size(0) && student.size(1) == teacher.size(1),
                  "logits: student and teacher differ in shape");
  STD_TORCH_CHECK(student.scalar_type() == teacher.scalar_type(),
                  "logits: student and teacher differ in dtype");
}

KdArguments arguments_for(const Tensor& student, const Tensor& teacher, double temperature) {
  KdArguments arguments{};
  arguments.student = student.const_data_ptr();
  arguments.teacher = teacher.const_data_ptr();
  arguments.classes = student.size(1);
  arguments.student_stride = student.stride(0);
  arguments.teacher_stride = teacher.stride(0);
  arguments.temperature = temperature;
  arguments.dtype = kind_of(student);
  return arguments;
}

void run(const KdArguments& arguments, int64_t rows) {
  const int64_t grain =
      std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, arguments.classes));
  torch::stable::parallel_for(
      0, rows, grain, [&](int64_t begin, int64_t end) { kd_loss_rows(arguments, begin, end); });
}

ScalarType loss_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor empty_losses(const Tensor& student) {
  return torch::stable::new_empty(student, {student.size(0)}, loss_type(student));
}

Tensor kd_loss_forward(const Tensor& student, const Tensor& teacher, double temperature) {
  check(student, teacher);
  const Tensor s = dense_rows(student), t = dense_rows(teacher);
  Tensor loss = empty_losses(s);
  KdArguments arguments = arguments_for(s, t, temperature);
  arguments.loss = loss.mutable_data_ptr();
  run(arguments, s.size(0));
  return loss;
}

KdArguments with_grad(KdArguments arguments, const Tensor& row_grad, Tensor& grad) {
  STD_TORCH_CHECK(row_grad.dim() == 1 && row_grad.size(0) == grad.size(0) &&
                      row_grad.scalar_type() == loss_type(grad),
                  "row_grad: expected (B,) in the dtype of the loss");
  arguments.row_grad = row_grad.const_data_ptr();
  arguments.row_grad_stride = row_grad.stride(0);
  arguments.grad = grad.mutable_data_ptr();
  return arguments;
}

Tensor kd_loss_backward(const Tensor& row_grad, const Tensor& student, const Tensor& teacher,
                        double temperature) {
  check(student, teacher);
  const Tensor s = dense_rows(student), t = dense_rows(teacher);
  Tensor grad = torch::stable::new_empty(s, {s.size(0), s.size(1)});
  run(with_grad(arguments_for(s, t, temperature), row_grad, grad), s.size(0));
  return grad;
}

std::tuple<Tensor, Tensor> kd_loss_forward_backward(const Tensor& row_grad, const Tensor& student,
                                                    const Tensor& teacher, double temperature) {
  check(student, teacher);
  const Tensor s = dense_rows(student), t = dense_rows(teacher);
  Tensor loss = empty_losses(s);
  Tensor grad = torch::stable::new_empty(s, {s.size(0), s.size(1)});
  KdArguments arguments = with_grad(arguments_for(s, t, temperature), row_grad, grad);
  arguments.loss = loss.mutable_data_ptr();
  run(arguments, s.size(0));
  return std::make_tuple(loss, grad);
}

}  // namespace
}  // namespace dmkd

STABLE_TORCH_LIBRARY_IMPL(dmkd_fast, CPU, m) {
  m.impl("kd_loss_forward", TORCH_BOX(&dmkd::kd_loss_forward));
  m.impl("kd_loss_backward", TORCH_BOX(&dmkd::kd_loss_backward));
  m.impl("kd_loss_forward_backward", TORCH_BOX(&dmkd::kd_loss_forward_backward));
}

namespace {

PyObject* instruction_set(PyObject*, PyObject*) {
  return PyUnicode_FromString(dmkd::kd_loss_instruction_set());
}

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "avx512, avx2 or scalar."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

// Importing the module runs the registrations above.
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
