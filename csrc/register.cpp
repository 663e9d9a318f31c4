// CPU implementations of the operators that dmkd_fast declares, by libtorch's stable ABI.
//
// Only torch/csrc/stable and torch/headeronly are used, so one binary serves every later torch too.
// Arguments are checked in Python, and here again where memory safety depends on them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "instruction_sets.h"
#include "kd_loss_cpu.h"
#include "kd_loss_operator.h"

namespace dmkd {
namespace {

using torch::headeronly::ScalarType;
using Losses = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kElementsPerTask = 16384;

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

ScalarType accumulated_type(const Problem& p) {
  return p.is_double() ? ScalarType::Double : ScalarType::Float;
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

// Four numbers a term: kind, weight, and two parameters.
void add_terms(KdArguments& a, const Problem& p) {
  const int64_t numbers = p.divergences.size();
  STD_TORCH_CHECK(numbers % 4 == 0 && numbers <= 4 * kMaxTerms,
                  "divergences: expected four numbers for each of at most two terms");
  a.num_terms = numbers / 4;
  for (int64_t k = 0; k < a.num_terms; ++k) {
    const double* const at = p.divergences.data() + 4 * k;
    const bool known = at[0] >= 0 && at[0] <= static_cast<int>(Divergence::kDist);
    STD_TORCH_CHECK(known, "divergences: got an unknown kind");
    a.terms[k] = {static_cast<Divergence>(static_cast<int>(at[0])), at[1], at[2], at[3]};
    // A target without rows has no storage.
    const bool has_classes = a.classes != nullptr || a.num_rows == 0;
    STD_TORCH_CHECK(a.terms[k].kind != Divergence::kDkd || has_classes,
                    "divergences: dkd needs class ids");
  }
  if (a.num_terms == 0 && a.standardize) {
    a.num_terms = 1;
    a.terms[0] = {Divergence::kForwardKl, 1, 0, 0};
  }
}

KdArguments arguments_for(const Problem& p, const Tensor& stats) {
  KdArguments a{};
  a.student = matrix(p.student, p, "student");
  a.teacher = matrix(p.teacher, p, "teacher");
  a.num_rows = p.student.size(0);
  a.num_classes = p.student.size(1);
  a.is_double = p.is_double();
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
  a.standardize = p.standardize;
  a.has_ce = p.alpha != 1;
  if (p.temperatures) {
    STD_TORCH_CHECK(p.temperatures->dim() == 2 && p.temperatures->size(0) == a.num_rows &&
                        p.temperatures->size(1) == 2 &&
                        p.temperatures->scalar_type() == accumulated_type(p),
                    "temperatures: expected (B, 2)");
    a.temperatures = p.temperatures->const_data_ptr();
    a.temperatures_stride = p.temperatures->stride(0);
    a.temperatures_class_stride = p.temperatures->stride(1);
  }
  add_terms(a, p);
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

// Kinds with a term by column: adds up the columns of all rows, in blocks of rows that the shape
// alone decides, so that the sums do not depend on the threads.
std::vector<double> add_columns(KdArguments& a, std::vector<double>& kept) {
  if (std::none_of(a.terms, a.terms + a.num_terms,
                   [](const Term& term) { return term.kind == Divergence::kDist; })) {
    return {};
  }
  // Between the passes q - p waits in the gradient, where that has its type and nothing else goes.
  const ScalarKind type = a.is_double ? ScalarKind::kDouble : ScalarKind::kFloat;
  if (a.num_terms == 1 && !a.standardize && a.gradient.data && a.gradient.dtype == type) {
    const int64_t values = a.num_rows * kKept;
    kept.resize(a.is_double ? values : (values + 1) / 2);
    a.kept = kept.data();
  }
  constexpr int64_t kBlocks = 8;
  const int64_t size = kColumnSums * a.num_classes;
  const int64_t rows_per_block = std::max<int64_t>(64, (a.num_rows + kBlocks - 1) / kBlocks);
  const int64_t blocks = (a.num_rows + rows_per_block - 1) / rows_per_block;
  std::vector<double> sums(size * std::max<int64_t>(1, blocks));
  std::vector<int64_t> counts(blocks);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      counts[b] =
          kd_loss_column_sums(a, b * rows_per_block, std::min(a.num_rows, (b + 1) * rows_per_block),
                              sums.data() + b * size);
    }
  });
  int64_t counted = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    counted += counts[b];
    for (int64_t i = 0; b > 0 && i < size; ++i) sums[i] += sums[b * size + i];
  }
  if (counted == 0) counted = 1;
  std::vector<double> columns(4 * a.num_classes);
  a.columns_loss =
      kd_loss_columns(sums.data(), a.num_classes, counted, a.is_double, columns.data());
  a.columns = columns.data();
  const auto weight_sum = [&]<typename value_t>(value_t) {
    double total = 0;
    for (int64_t r = 0; r < a.num_rows; ++r) {
      const auto at = [&](const void* data, int64_t stride) {
        return data ? static_cast<const value_t*>(data)[r * stride] : value_t(1);
      };
      const value_t weight = at(a.weight, a.weight_stride);
      const value_t* const pair =
          a.temperatures ? static_cast<const value_t*>(a.temperatures) + r * a.temperatures_stride
                         : nullptr;
      const value_t factor = pair ? pair[a.temperatures_class_stride] : value_t(1);
      if (weight != 0) total += double(weight) * at(a.upstream, a.upstream_stride) * factor;
    }
    return total;
  };
  a.columns_weight = a.is_double ? weight_sum(double()) : weight_sum(float());
  return columns;
}

void run(KdArguments& a) {
  std::vector<double> kept;
  const std::vector<double> columns = add_columns(a, kept);
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

// Uninitialized memory on the CPU, without a call of the dispatcher.
template <size_t dims>
Tensor allocate(const std::array<int64_t, dims>& sizes, ScalarType dtype) {
  std::array<int64_t, dims> strides;
  int64_t step = 1;
  for (size_t i = dims; i-- > 0; step *= std::max<int64_t>(1, sizes[i])) strides[i] = step;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides.data(), code,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor stats_for(const Problem& p) {
  return allocate<2>({p.student.size(0), kStats}, accumulated_type(p));
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

// Runs the rows and writes the losses, which are of the accumulated type: one each, or (B,).
void write_losses(KdArguments& a, const Problem& p, bool per_row, void* loss, void* kd, void* ce) {
  std::vector<double> rows(a.is_double ? 2 * a.num_rows : a.num_rows);  // or as many floats
  a.losses = rows.data();
  run(a);
  const int64_t n = a.num_rows;
  if (a.is_double) {
    reduce(p, static_cast<const double*>(a.losses), n, per_row, loss, kd, ce);
  } else {
    reduce(p, static_cast<const float*>(a.losses), n, per_row, loss, kd, ce);
  }
}

Losses losses_of(KdArguments& a, const Problem& p, const Tensor& stats, bool per_row) {
  const auto make = [&] {
    const ScalarType dtype = accumulated_type(p);
    return per_row ? allocate<1>({a.num_rows}, dtype) : allocate<0>({}, dtype);
  };
  Tensor loss = make(), kd = make(), ce = make();
  write_losses(a, p, per_row, loss.mutable_data_ptr(), kd.mutable_data_ptr(),
               ce.mutable_data_ptr());
  return {loss, kd, ce, stats};
}

Losses kd_loss_forward(const Tensor& student, const Tensor& teacher,
                       const std::optional<Tensor>& target, const std::optional<Tensor>& weight,
                       double temperature, double alpha, double kd_scale, double ce_scale,
                       double label_smoothing, const std::optional<Tensor>& temperatures,
                       const std::vector<double>& divergences, bool standardize, bool per_row) {
  const Problem p{student,  teacher,  target,          weight,       temperature, alpha,
                  kd_scale, ce_scale, label_smoothing, temperatures, divergences, standardize};
  const Tensor stats = stats_for(p);
  KdArguments a = arguments_for(p, stats);
  return losses_of(a, p, stats, per_row);
}

Tensor kd_loss_backward(const Tensor& upstream, const Tensor& stats, const Tensor& student,
                        const Tensor& teacher, const std::optional<Tensor>& target,
                        const std::optional<Tensor>& weight, double temperature, double alpha,
                        double kd_scale, double ce_scale, double label_smoothing,
                        const std::optional<Tensor>& temperatures,
                        const std::vector<double>& divergences, bool standardize) {
  const Problem p{student,  teacher,  target,          weight,       temperature, alpha,
                  kd_scale, ce_scale, label_smoothing, temperatures, divergences, standardize};
  const Tensor grad = allocate<2>({student.size(0), student.size(1)}, student.scalar_type());
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
                                double label_smoothing, const std::optional<Tensor>& temperatures,
                                const std::vector<double>& divergences, bool standardize) {
  const Problem p{student,  teacher,  target,          weight,       temperature, alpha,
                  kd_scale, ce_scale, label_smoothing, temperatures, divergences, standardize};
  const Tensor stats = stats_for(p);
  KdArguments a = arguments_for(p, stats);
  add_gradient(a, p, grad, upstream, grad_scale);
  return losses_of(a, p, stats, false);
}

}  // namespace

Tensor kd_loss_row_weights(const Tensor& student, const Tensor& teacher,
                           const std::optional<Tensor>& ids, const std::optional<Tensor>& mask,
                           const std::optional<Tensor>& row_weight,
                           const std::optional<Tensor>& num_items, int64_t ignore_index,
                           bool is_counted) {
  const std::optional<Tensor> none;
  const std::vector<double> no_terms;
  const Problem p{student, teacher, none, none, 1, 1, 1, 1, 0, none, no_terms, false};
  const ScalarType dtype = accumulated_type(p);
  const int64_t rows = student.size(0);
  const auto stride_of = [&](const std::optional<Tensor>& tensor, ScalarType type) {
    return tensor ? vector_stride(*tensor, p, type, "row_weights") : 0;
  };
  const int64_t id_stride = stride_of(ids, ScalarType::Long);
  const int64_t mask_stride = stride_of(mask, ScalarType::Bool);
  const int64_t weight_stride = stride_of(row_weight, dtype);
  STD_TORCH_CHECK(!num_items || (num_items->dim() == 0 && num_items->scalar_type() == dtype),
                  "row_weights: expected one number of items");
  const auto* const id_at = ids ? static_cast<const int64_t*>(ids->const_data_ptr()) : nullptr;
  const auto* const mask_at = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  Tensor weights = allocate<1>({rows}, dtype);
  const auto fill = [&]<typename value_t>(value_t) {
    const auto* const given =
        row_weight ? static_cast<const value_t*>(row_weight->const_data_ptr()) : nullptr;
    auto* const out = static_cast<value_t*>(weights.mutable_data_ptr());
    int64_t counted = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const bool keep = (id_at == nullptr || id_at[r * id_stride] != ignore_index) &&
                        (mask_at == nullptr || mask_at[r * mask_stride]);
      counted += keep;
      out[r] = !keep ? value_t(0) : given ? given[r * weight_stride] : value_t(1);
    }
    if (!is_counted && !num_items) return;
    const value_t divisor = num_items ? *static_cast<const value_t*>(num_items->const_data_ptr())
                                      : static_cast<value_t>(counted);
    for (int64_t r = 0; r < rows; ++r) out[r] = out[r] == 0 ? value_t(0) : out[r] / divisor;
  };
  p.is_double() ? fill(double{}) : fill(float{});
  return weights;
}

std::array<Tensor, 3> loss_and_gradient(const Problem& p) {
  const Tensor loss = allocate<0>({}, accumulated_type(p)), stats = stats_for(p);
  const Tensor grad = allocate<2>({p.student.size(0), p.student.size(1)}, p.student.scalar_type());
  KdArguments a = arguments_for(p, stats);
  add_gradient(a, p, grad, std::nullopt, 1);
  double kd, ce;  // room for either type
  write_losses(a, p, false, loss.mutable_data_ptr(), &kd, &ce);
  return {loss, stats, grad};
}

}  // namespace dmkd

STABLE_TORCH_LIBRARY_IMPL(dmkd_fast, CPU, m) {
  m.impl("kd_loss_forward", TORCH_BOX(&dmkd::kd_loss_forward));
  m.impl("kd_loss_backward", TORCH_BOX(&dmkd::kd_loss_backward));
  m.impl("kd_loss_forward_backward", TORCH_BOX(&dmkd::kd_loss_forward_backward));
  m.impl("kd_loss_row_weights", TORCH_BOX(&dmkd::kd_loss_row_weights));
}
