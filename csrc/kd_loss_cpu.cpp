// Distillation loss of softmax(t / T) and softmax(s / T), cross-entropy, and their gradient, by
// row.
//
// Rows of other dtypes or strides are widened into scratch first, so there is one set of loops
// (kd_loss_row.h). Rows are independent and each has a fixed order of operations: the result does
// not depend on the number of threads. With a row's maxima and sums already known (`stats`), the
// gradient of forward KL takes one sweep; that of other divergences is computed as with the loss.
// Both come out in the same bits.
// B rows, C classes. Definition: dmkd_fast/loss/reference.py.

#include "kd_loss_cpu.h"

#include <algorithm>
#include <vector>

#include "instruction_sets.h"
#include "kd_loss_terms.h"

namespace dmkd {
namespace {

template <typename compute_t, typename scalar_t>
DMKD_INLINE void widen_row(const scalar_t* __restrict source, int64_t stride,
                           compute_t* __restrict target, int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) target[i] = widen<compute_t>(source[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) target[i] = widen<compute_t>(source[i * stride]);
  }
}

// Row `r` as dense values of the accumulated type: the tensor's own memory, or a copy in scratch.
template <typename compute_t>
DMKD_INLINE const compute_t* row_of(const Matrix& m, int64_t r, compute_t* scratch, int64_t n) {
  const int64_t start = r * m.row_stride;
  const bool same = (m.dtype == ScalarKind::kDouble) == (sizeof(compute_t) == sizeof(double));
  switch (m.dtype) {
    case ScalarKind::kFloat:
    case ScalarKind::kDouble:
      if (same && m.class_stride == 1) return static_cast<const compute_t*>(m.data) + start;
      if (m.dtype == ScalarKind::kFloat) {
        widen_row(static_cast<const float*>(m.data) + start, m.class_stride, scratch, n);
      } else {
        widen_row(static_cast<const double*>(m.data) + start, m.class_stride, scratch, n);
      }
      break;
    case ScalarKind::kHalf:
      widen_row(static_cast<const Half*>(m.data) + start, m.class_stride, scratch, n);
      break;
    case ScalarKind::kBFloat16:
      widen_row(static_cast<const BFloat16*>(m.data) + start, m.class_stride, scratch, n);
      break;
  }
  return scratch;
}

template <typename compute_t, typename scalar_t>
DMKD_INLINE void narrow_row(const compute_t* __restrict source, scalar_t* __restrict target,
                            int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(target + i, source[i]);
}

// Writes a gradient row that was computed in scratch; in the accumulated type it already lies
// there.
template <typename compute_t>
DMKD_INLINE void store_row(const Matrix& m, int64_t r, const compute_t* row, int64_t n) {
  const int64_t start = r * m.row_stride;
  switch (m.dtype) {
    case ScalarKind::kFloat:
      if (sizeof(compute_t) != sizeof(float)) {
        narrow_row(row, static_cast<float*>(m.data) + start, n);
      }
      return;
    case ScalarKind::kDouble:
      return;
    case ScalarKind::kHalf:
      return narrow_row(row, static_cast<Half*>(m.data) + start, n);
    case ScalarKind::kBFloat16:
      return narrow_row(row, static_cast<BFloat16*>(m.data) + start, n);
  }
}

// Scratch of a thread, in rows of `padded` values.
enum Scratch {
  kStudent,
  kTeacher,
  kStudentExp,
  kTeacherExp,
  kTarget,
  kOut,
  kSlopes,
  kStudentCopy,
  kTeacherCopy,
  kScratchRows
};

template <typename compute_t>
DMKD_INLINE compute_t* scratch_of(int64_t padded, int64_t extra_rows = 0) {
  thread_local std::vector<compute_t> scratch;
  scratch.resize((kScratchRows + extra_rows) * padded);
  return scratch.data();
}

DMKD_INLINE int64_t padded_size(int64_t n) { return (n + 15) / 16 * 16; }

// A row's temperature, and the factor on its KD term.
template <typename compute_t>
DMKD_INLINE double temperature_of(const KdArguments& a, int64_t r, double& kd_factor) {
  if (a.temperatures == nullptr) {
    kd_factor = 1;
    return a.temperature;
  }
  const auto* pair = static_cast<const compute_t*>(a.temperatures) + r * a.temperatures_stride;
  kd_factor = pair[a.temperatures_class_stride];
  return pair[0];
}

template <typename compute_t>
DMKD_INLINE compute_t weight_of(const KdArguments& a, int64_t r) {
  return a.weight ? static_cast<const compute_t*>(a.weight)[r * a.weight_stride] : compute_t(1);
}

template <typename compute_t, bool has_fma>
DMKD_INLINE int64_t rows(const KdArguments& a, int64_t begin, int64_t end) {
  const int64_t n = a.num_classes, padded = padded_size(n);
  compute_t* const memory = scratch_of<compute_t>(padded);
  const bool in_place = a.gradient.dtype == ScalarKind::kFloat
                            ? sizeof(compute_t) == sizeof(float)
                            : a.gradient.dtype == ScalarKind::kDouble;
  const bool has_target = a.probabilities.data != nullptr || (a.classes != nullptr && a.has_ce);
  const bool is_forward_kl = a.num_terms == 0 && !a.standardize;
  auto* const losses = static_cast<compute_t*>(a.losses);

  for (int64_t r = begin; r < end; ++r) {
    const compute_t weight = weight_of<compute_t>(a, r);
    compute_t* const stats = static_cast<compute_t*>(a.stats) + r * kStats;
    compute_t* out = nullptr;
    if (a.gradient.data != nullptr) {
      out = in_place ? static_cast<compute_t*>(a.gradient.data) + r * a.gradient.row_stride
                     : memory + kOut * padded;
    }
    if (weight == 0) {  // Skipped, whatever its logits are.
      if (losses) {
        losses[r] = losses[a.num_rows + r] = 0;
        std::fill(stats, stats + kStats, compute_t(0));
      }
      if (out) {
        std::fill(out, out + n, compute_t(0));
        store_row(a.gradient, r, out, n);
      }
      continue;
    }
    const int64_t id = a.classes ? a.classes[r * a.classes_stride] : -1;
    if (a.classes && (id < 0 || id >= n)) return r;

    double kd_factor;
    const double temperature = temperature_of<compute_t>(a, r, kd_factor);
    Row<compute_t, has_fma> row{a,
                                n,
                                temperature,
                                row_of(a.student, r, memory + kStudent * padded, n),
                                row_of(a.teacher, r, memory + kTeacher * padded, n),
                                out,
                                memory + kStudentExp * padded,
                                memory + kTeacherExp * padded,
                                memory + kSlopes * padded,
                                stats,
                                memory + kStudentCopy * padded,
                                memory + kTeacherCopy * padded};
    const compute_t* const logits = row.s;
    const compute_t upstream =
        weight *
        (a.upstream ? static_cast<const compute_t*>(a.upstream)[r * a.upstream_stride] : 1);
    // In one factor each, so that nothing is rounded to the gradient's dtype before it is scaled.
    compute_t factor = upstream * compute_t(a.kl_gradient / temperature * kd_factor);
    compute_t top, kd = 0;
    if (!is_forward_kl) {
      compute_t own[kStats] = {};  // The backward pass leaves those of the forward pass alone.
      row.stats = own;
      const compute_t column_factor = compute_t(a.columns_weight * (a.kl_gradient / temperature));
      top = a.standardize ? row.standardize() : compute_t(0);
      if (a.kept != nullptr) {
        const compute_t* const kept = static_cast<const compute_t*>(a.kept) + r * kKept;
        std::copy(kept, kept + kStats, own);
        const compute_t share = compute_t(a.terms[0].weight);
        kd =
            row.kept_correlations(a.terms[0], kept + kStats, factor * share, column_factor * share);
        kd = share == 0 ? compute_t(0) : share * kd;
      } else {
        kd = row.divergences(id, factor, column_factor);
      }
      if (!a.standardize) top = id >= 0 && logits[id] > own[0] ? logits[id] : own[0];
      if (out && a.standardize) row.standardize_gradient();
      if (losses) std::copy(own, own + kStats, stats);
      row.stats = stats;
    } else if (losses) {
      row.exponentials();
      kd = out ? row.template forward_kl<true>(out, factor)
               : row.template forward_kl<false>(out, factor);
      top = stats[0];
    } else {
      row.forward_kl_gradient(factor);
      top = stats[0];
    }
    if (losses) {
      losses[r] = weight * compute_t(kd_factor) * kd;
      losses[a.num_rows + r] = stats[5] = stats[6] = 0;
    }
    if (has_target) {
      const compute_t* target =
          a.classes ? nullptr : row_of(a.probabilities, r, memory + kTarget * padded, n);
      const compute_t ce = row.cross_entropy(logits, top, id, target, losses != nullptr,
                                             upstream * compute_t(a.ce_gradient));
      if (losses) losses[a.num_rows + r] = weight * ce;
    }
    if (out) store_row(a.gradient, r, out, n);
  }
  return -1;
}

constexpr int64_t kGroup = 8;  // rows whose columns are added up together

template <typename compute_t, bool has_fma>
DMKD_INLINE int64_t column_sums(const KdArguments& a, int64_t begin, int64_t end, double* sums) {
  const int64_t n = a.num_classes, padded = padded_size(n);
  compute_t* const memory = scratch_of<compute_t>(padded, 2 * kGroup);
  compute_t* const p = memory + kScratchRows * padded;
  compute_t* change[kGroup];
  int64_t filled = 0, counted = 0;
  for (int64_t r = begin; r < end; ++r) {
    if (weight_of<compute_t>(a, r) != 0) {
      double kd_factor;
      compute_t stats[kStats] = {}, row_sums[4];
      Row<compute_t, has_fma> row{a,
                                  n,
                                  temperature_of<compute_t>(a, r, kd_factor),
                                  row_of(a.student, r, memory + kStudent * padded, n),
                                  row_of(a.teacher, r, memory + kTeacher * padded, n),
                                  nullptr,
                                  memory + kStudentExp * padded,
                                  memory + kTeacherExp * padded,
                                  nullptr,
                                  stats,
                                  memory + kStudentCopy * padded,
                                  memory + kTeacherCopy * padded};
      if (a.standardize) row.standardize();
      const double ratio = row.exponentials();
      const bool is_kept = a.kept != nullptr;
      change[filled] = is_kept
                           ? static_cast<compute_t*>(a.gradient.data) + r * a.gradient.row_stride
                           : p + (kGroup + filled) * padded;
      row.changes(ratio, p + filled * padded, change[filled],
                  is_kept ? compute_t(1.0 / double(n)) : compute_t(0), row_sums);
      if (is_kept) {
        compute_t* const kept = static_cast<compute_t*>(a.kept) + r * kKept;
        std::copy(stats, stats + kStats, kept);
        std::copy(row_sums, row_sums + 4, kept + kStats);
      }
      ++filled;
      ++counted;
    }
    if (filled == 0 || (filled < kGroup && r + 1 < end)) continue;
    for (; filled < kGroup; ++filled) {
      change[filled] = p + (kGroup + filled) * padded;
      std::fill(p + filled * padded, p + filled * padded + n, compute_t(0));
      std::fill(change[filled], change[filled] + n, compute_t(0));
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      double p_sum = 0, squares = 0, change_sum = 0, products = 0, change_squares = 0;
      for (int64_t k = 0; k < kGroup; ++k) {
        const double x = p[k * padded + i], y = change[k][i];
        p_sum += x;
        // A product of two floats is exact in double: the bits are those without fused operations.
        squares = multiply_add<has_fma>(x, x, squares);
        change_sum += y;
        products = multiply_add<has_fma>(x, y, products);
        change_squares = multiply_add<has_fma>(y, y, change_squares);
      }
      sums[i] += p_sum;
      sums[n + i] += squares;
      sums[2 * n + i] += change_sum;
      sums[3 * n + i] += products;
      sums[4 * n + i] += change_squares;
    }
    filled = 0;
  }
  return counted;
}

// The same code compiled three times; the machine decides at run time. `flatten` pulls everything
// into the function that carries the target attribute. With `sums` the columns are added up.
using Run = int64_t (*)(const KdArguments&, int64_t, int64_t, double*);

template <typename compute_t, bool has_fma>
DMKD_INLINE int64_t run(const KdArguments& a, int64_t begin, int64_t end, double* sums) {
  return sums == nullptr ? rows<compute_t, has_fma>(a, begin, end)
                         : column_sums<compute_t, has_fma>(a, begin, end, sums);
}

DMKD_FLATTEN_AVX512 int64_t run_avx512(const KdArguments& a, int64_t begin, int64_t end,
                                       double* sums) {
  return run<float, true>(a, begin, end, sums);
}

DMKD_FLATTEN_AVX2 int64_t run_avx2(const KdArguments& a, int64_t begin, int64_t end, double* sums) {
  return run<float, true>(a, begin, end, sums);
}

int64_t run_baseline(const KdArguments& a, int64_t begin, int64_t end, double* sums) {
  return run<float, kBaselineHasFma>(a, begin, end, sums);
}

// float64 is for checking gradients, not for speed.
int64_t run_double(const KdArguments& a, int64_t begin, int64_t end, double* sums) {
  return run<double, false>(a, begin, end, sums);
}

int64_t dispatch(const KdArguments& arguments, int64_t begin, int64_t end, double* sums) {
  static const Run chosen = best_of(run_baseline, run_avx2, run_avx512);
  return (arguments.is_double ? run_double : chosen)(arguments, begin, end, sums);
}

}  // namespace

int64_t kd_loss_rows(const KdArguments& arguments, int64_t begin, int64_t end) {
  return dispatch(arguments, begin, end, nullptr);
}

int64_t kd_loss_column_sums(const KdArguments& arguments, int64_t begin, int64_t end,
                            double* sums) {
  return dispatch(arguments, begin, end, sums);
}

double kd_loss_columns(const double* sums, int64_t num_classes, int64_t num_rows, bool is_double,
                       void* columns) {
  double loss = 0;
  const double rows = double(num_rows);
  for (int64_t i = 0; i < num_classes; ++i) {
    const double* const at = sums + i;
    const double p = at[0] / rows, change = at[2 * num_classes] / rows;
    const double teacher = at[num_classes] - rows * p * p;
    const double covariance = at[3 * num_classes] - rows * p * change;
    const double variance = at[4 * num_classes] - rows * change * change;
    const double q = p + change;
    const Correlation found =
        correlation(teacher, teacher + 2 * covariance + variance, covariance, variance,
                    kConstant * at[num_classes], kConstant * rows * q * q);
    loss += found.loss;
    const double values[] = {found.by_p, found.by_change, p, change};
    for (int64_t k = 0; k < 4; ++k) {
      if (is_double) {
        static_cast<double*>(columns)[k * num_classes + i] = values[k];
      } else {
        static_cast<float*>(columns)[k * num_classes + i] = static_cast<float>(values[k]);
      }
    }
  }
  return loss / double(num_classes);
}

}  // namespace dmkd
