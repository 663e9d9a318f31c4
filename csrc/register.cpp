// CPU implementations of the operators that dmkd_fast declares, by libtorch's stable ABI.
//
// Only torch/csrc/stable and torch/headeronly are used, so one binary serves every torch from the
// version it targets on. Arguments are checked in Python; what is checked again here is what memory
// safety depends on.

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "instruction_sets.h"
#include "kd_loss_cpu.h"

namespace dmkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Losses = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kElementsPerTask = 16384;

// What all three operators take after their own arguments, in the order of the schema.
struct Problem {
  const Tensor& student;
  const Tensor& teacher;
  const std::optional<Tensor>& target;
  const std::optional<Tensor>& weight;
  double temperature, alpha, kd_scale, ce_scale, label_smoothing;
};

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
      STD_TORCH_CHECK(false, "kd_loss: expected float32, float64, float16 or bfloat16");
  }
}

bool is_double(const Problem& p) {
  return p.student.scalar_type() == ScalarType::Double ||
         p.teacher.scalar_type() == ScalarType::Double;
}

ScalarType accumulated_type(const Problem& p) {
  return is_double(p) ? ScalarType::Double : ScalarType::Float;
}

Matrix matrix(const Tensor& tensor, const Problem& p, const char* what) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == p.student.size(0) &&
                      tensor.size(1) == p.student.size(1),
                  what, ": expected (B, C) as the student's logits");
  return {const_cast<void*>(tensor.const_data_ptr()), kind_of(tensor), tensor.stride(0),
          tensor.stride(1)};
}

// A (B,) tensor, or one value for all rows.
int64_t vector_stride(const Tensor& tensor, const Problem& p, ScalarType dtype, const char* what) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, what, ": unexpected dtype");
  if (tensor.dim() == 0) return 0;
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == p.student.size(0), what,
                  ": expected (B,)");
  return tensor.stride(0);
}

KdArguments arguments_for(const Problem& p, const Tensor& stats) {
  KdArguments a{};
  a.student = matrix(p.student, p, "student");
  a.teacher = matrix(p.teacher, p, "teacher");
  a.num_rows = p.student.size(0);
  a.num_classes = p.student.size(1);
  a.is_double = is_double(p);
  if (p.target && p.target->scalar_type() == ScalarType::Long) {
    a.classes_stride = vector_stride(*p.target, p, ScalarType::Long, "target");
    a.classes = static_cast<const int64_t*>(p.target->const_data_ptr());
  } else if (p.target) {
    a.probabilities = matrix(*p.target, p, "target");
  }
  if (p.weight) {
    a.weight_stride = vector_stride(*p.weight, p, accumulated_type(p), "weight");
    a.weight = p.weight->const_data_ptr();
  }
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == a.num_rows && stats.size(1) == kStats &&
                      stats.stride(0) == kStats && stats.stride(1) == 1 &&
                      stats.scalar_type() == accumulated_type(p),
                  "stats: expected what the forward operator returned");
  a.stats = const_cast<void*>(stats.const_data_ptr());
  a.temperature = p.temperature;
  a.label_smoothing = p.label_smoothing;
  return a;
}

void add_gradient(KdArguments& a, const Problem& p, const Tensor& grad,
                  const std::optional<Tensor>& upstream, double grad_scale) {
  a.gradient = matrix(grad, p, "grad");
  STD_TORCH_CHECK(
      a.gradient.dtype == a.student.dtype && (a.gradient.class_stride == 1 || a.num_classes == 1),
      "grad: expected the student's dtype and dense classes");
  if (upstream) {
    a.upstream_stride = vector_stride(*upstream, p, accumulated_type(p), "upstream");
    a.upstream = upstream->const_data_ptr();
  }
  a.kl_gradient = p.alpha * p.kd_scale * grad_scale;
  a.ce_gradient = (1 - p.alpha) * p.ce_scale * grad_scale;
}

void run(const KdArguments& a) {
  const int64_t grain =
      std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, a.num_classes));
  std::atomic<int64_t> bad{-1};
  torch::stable::parallel_for(0, a.num_rows, grain, [&](int64_t begin, int64_t end) {
    const int64_t row = kd_loss_rows(a, begin, end);
    if (row >= 0) bad = row;
  });
  const int64_t row = bad;
  STD_TORCH_CHECK(row < 0, "target: got class ", row < 0 ? 0 : a.classes[row * a.classes_stride],
                  " in row ", row, ", expected 0 to ", a.num_classes - 1, " or ignore_index");
}

Tensor losses_like(const Problem& p, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(p.student, shape, accumulated_type(p));
}

// The loss from its terms: alpha * kd + (1 - alpha) * ce, where a factor of 0 drops an infinite
// term.
template <typename value_t>
void mix(const Problem& p, double kl, double ce, void* loss, void* kd_out, void* ce_out,
         int64_t i) {
  const double kd_term = kl * p.kd_scale, ce_term = ce * p.ce_scale;
  static_cast<value_t*>(kd_out)[i] = static_cast<value_t>(kd_term);
  static_cast<value_t*>(ce_out)[i] = static_cast<value_t>(ce_term);
  static_cast<value_t*>(loss)[i] = static_cast<value_t>(
      (p.alpha == 0 ? 0 : p.alpha * kd_term) + (p.alpha == 1 ? 0 : (1 - p.alpha) * ce_term));
}

template <typename value_t>
void reduce(const Problem& p, const value_t* rows, int64_t n, bool per_row, void* loss, void* kd,
            void* ce) {
  if (per_row) {
    for (int64_t i = 0; i < n; ++i) mix<value_t>(p, rows[i], rows[n + i], loss, kd, ce, i);
    return;
  }
  double kl_sum = 0, ce_sum = 0;  // In the order of the rows, whoever computed them.
  for (int64_t i = 0; i < n; ++i) {
    kl_sum += rows[i];
    ce_sum += rows[n + i];
  }
  mix<value_t>(p, kl_sum, ce_sum, loss, kd, ce, 0);
}

Losses losses_of(KdArguments& a, const Problem& p, const Tensor& stats, bool per_row) {
  std::vector<double> rows(a.is_double ? 2 * a.num_rows : a.num_rows);  // or as many floats
  a.losses = rows.data();
  run(a);
  const auto make = [&] { return per_row ? losses_like(p, {a.num_rows}) : losses_like(p, {}); };
  Tensor loss = make(), kd = make(), ce = make();
  if (a.is_double) {
    reduce(p, static_cast<const double*>(a.losses), a.num_rows, per_row, loss.mutable_data_ptr(),
           kd.mutable_data_ptr(), ce.mutable_data_ptr());
  } else {
    reduce(p, static_cast<const float*>(a.losses), a.num_rows, per_row, loss.mutable_data_ptr(),
           kd.mutable_data_ptr(), ce.mutable_data_ptr());
  }
  return {loss, kd, ce, stats};
}

Losses kd_loss_forward(const Tensor& student, const Tensor& teacher,
                       const std::optional<Tensor>& target, const std::optional<Tensor>& weight,
                       double temperature, double alpha, double kd_scale, double ce_scale,
                       double label_smoothing, bool per_row) {
  const Problem p{student, teacher,  target,   weight,         temperature,
                  alpha,   kd_scale, ce_scale, label_smoothing};
  const Tensor stats = losses_like(p, {student.size(0), kStats});
  KdArguments a = arguments_for(p, stats);
  return losses_of(a, p, stats, per_row);
}

Tensor kd_loss_backward(const Tensor& upstream, const Tensor& stats, const Tensor& student,
                        const Tensor& teacher, const std::optional<Tensor>& target,
                        const std::optional<Tensor>& weight, double temperature, double alpha,
                        double kd_scale, double ce_scale, double label_smoothing) {
  const Problem p{student, teacher,  target,   weight,         temperature,
                  alpha,   kd_scale, ce_scale, label_smoothing};
  const Tensor grad = torch::stable::new_empty(student, {student.size(0), student.size(1)});
  KdArguments a = arguments_for(p, stats);
  add_gradient(a, p, grad, upstream, 1);
  run(a);
  return grad;
}

Losses kd_loss_forward_backward(const Tensor& grad, const std::optional<Tensor>& upstream,
                                double grad_scale, const Tensor& student, const Tensor& teacher,
                                const std::optional<Tensor>& target,
                                const std::optional<Tensor>& weight, double temperature,
                                double alpha, double kd_scale, double ce_scale,
                                double label_smoothing) {
  const Problem p{student, teacher,  target,   weight,         temperature,
                  alpha,   kd_scale, ce_scale, label_smoothing};
  const Tensor stats = losses_like(p, {student.size(0), kStats});
  KdArguments a = arguments_for(p, stats);
  add_gradient(a, p, grad, upstream, grad_scale);
  return losses_of(a, p, stats, false);
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
  const dmkd::Isa isa = dmkd::best_isa();
  return PyUnicode_FromString(isa >= dmkd::Isa::kAvx512 ? "avx512"
                              : isa == dmkd::Isa::kAvx2 ? "avx2"
                                                        : "scalar");
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
