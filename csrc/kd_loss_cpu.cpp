// Distillation loss KL(softmax(t / T) || softmax(s / T)), cross-entropy, and their gradient, by
// row.
//
// A row is swept from cache: maxima; exponentials into scratch (2 C values in L1/L2); then loss and
// gradient together. Rows of other dtypes or strides are widened into scratch first, so there is
// one set of loops. Rows are independent and each has a fixed order of operations: the result does
// not depend on the number of threads. With a row's maxima and sums already known (`stats`), the
// gradient alone takes one sweep and comes out in the same bits.
// B rows, C classes. Definition: dmkd_fast/loss/reference.py.

#include "kd_loss_cpu.h"

#include <algorithm>
#include <vector>

#include "instruction_sets.h"
#include "scalar_types.h"

namespace dmkd {
namespace {

constexpr double kLog2E = 1.44269504088896340736;

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

template <typename compute_t, bool has_fma>
struct Row {
  const KdArguments& a;
  const int64_t n;
  const compute_t* __restrict s;  // student's logits
  const compute_t* __restrict t;  // teacher's
  compute_t* __restrict out;      // gradient, or null
  compute_t* __restrict s_exp;    // scratch
  compute_t* __restrict t_exp;
  compute_t* stats;

  // Exponentials of both at temperature T into scratch; maxima and sums into stats.
  DMKD_INLINE void exponentials() {
    const compute_t scale2 = compute_t(kLog2E / a.temperature);
    const compute_t lowest = compute_t(-127) / scale2;
    compute_t s_max = -std::numeric_limits<compute_t>::infinity(), t_max = s_max;
#pragma omp simd reduction(max : s_max, t_max)
    for (int64_t i = 0; i < n; ++i) {
      s_max = s[i] > s_max ? s[i] : s_max;
      t_max = t[i] > t_max ? t[i] : t_max;
    }
    compute_t s_sum = 0, t_sum = 0, gap = 0;
#pragma omp simd reduction(+ : s_sum, t_sum, gap)
    for (int64_t i = 0; i < n; ++i) {
      const compute_t es = exp_scaled<has_fma>(s[i] - s_max, scale2, lowest);
      const compute_t et = exp_scaled<has_fma>(t[i] - t_max, scale2, lowest);
      s_exp[i] = es;
      t_exp[i] = et;
      s_sum += es;
      t_sum += et;
      gap += es - et;
    }
    stats[0] = s_max;
    stats[1] = s_sum;
    stats[2] = t_max;
    stats[3] = t_sum;
    // The gradient feels this one's error in full. Near the teacher the sums' own rounding would be
    // most of it; that of their difference, added up separately, is not.
    const double ratio = std::abs(gap) < compute_t(0.5) * t_sum
                             ? std::log1p(double(gap) / double(t_sum))
                             : std::log(double(s_sum) / double(t_sum));
    stats[4] = compute_t((double(s_max) - double(t_max)) / a.temperature + ratio);
  }

  // Where d is the small difference of large numbers, its rounding weighs more than that of q - p.
  DMKD_INLINE compute_t near_limit() const {
    return std::abs(stats[4]) < compute_t(1) ? compute_t(0.5) : compute_t(0);
  }

  // KL by the exponentials in scratch, and its gradient times `factor` into `out`. Only rows with
  // infinite logits need 0 * log 0 = 0, and their loss alone: it is computed again with the select.
  template <bool with_grad, bool with_zeros = false>
  DMKD_INLINE compute_t divergences(compute_t factor) {
    const compute_t scale = compute_t(1 / a.temperature), common = stats[4], limit = near_limit();
    const compute_t s_inverse = 1 / stats[1], t_inverse = 1 / stats[3];
    compute_t loss = 0;
#pragma omp simd reduction(+ : loss)
    for (int64_t i = 0; i < n; ++i) {
      const compute_t q = s_exp[i] * s_inverse, p = t_exp[i] * t_inverse;
      const compute_t d = multiply_add<has_fma>(t[i] - s[i], scale, common);
      compute_t term, difference;
      divergence<has_fma>(p, q, d, limit, term, difference);
      loss += with_zeros && p == 0 ? q : term;
      if constexpr (with_grad) out[i] = difference * factor;
    }
    if constexpr (!with_zeros) {
      const bool finite = loss <= std::numeric_limits<compute_t>::max();
      if (!finite) loss = divergences<false, true>(factor);
    }
    return loss;
  }

  // The gradient again from stats: the same operations in the same order as above.
  DMKD_INLINE void gradient(compute_t factor) {
    const compute_t scale = compute_t(1 / a.temperature), common = stats[4], limit = near_limit();
    const compute_t scale2 = compute_t(kLog2E / a.temperature);
    const compute_t lowest = compute_t(-127) / scale2;
    const compute_t s_max = stats[0], s_inverse = 1 / stats[1];
    const compute_t t_max = stats[2], t_inverse = 1 / stats[3];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const compute_t q = exp_scaled<has_fma>(s[i] - s_max, scale2, lowest) * s_inverse;
      const compute_t p = exp_scaled<has_fma>(t[i] - t_max, scale2, lowest) * t_inverse;
      const compute_t d = multiply_add<has_fma>(t[i] - s[i], scale, common);
      compute_t term, difference;
      divergence<has_fma>(p, q, d, limit, term, difference);
      out[i] = difference * factor;
    }
  }

  // Cross-entropy at T = 1, and its gradient times `factor` added to `out`.
  // id: class, or -1 with `target` as probabilities.
  DMKD_INLINE compute_t cross_entropy(int64_t id, const compute_t* __restrict target,
                                      bool with_loss, compute_t factor) {
    const compute_t scale2 = compute_t(kLog2E), lowest = compute_t(-127) / scale2;
    const compute_t spread = compute_t(a.label_smoothing / double(n));
    const compute_t kept = compute_t(1 - a.label_smoothing);
    const compute_t top = stats[0];
    compute_t mass = 1, loss = 0;
    if (id < 0 && !with_loss) {
      mass = stats[6];
    } else if (id < 0) {
      mass = 0;
#pragma omp simd reduction(+ : mass)
      for (int64_t i = 0; i < n; ++i) mass += multiply_add<has_fma>(target[i], kept, spread);
    }
    if (with_loss) {
      compute_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += exp_scaled<has_fma>(s[i] - top, scale2, lowest);
      stats[5] = sum;
      stats[6] = mass;
      const compute_t log_sum = std::log(sum);
      if (id < 0) {
#pragma omp simd reduction(+ : loss)
        for (int64_t i = 0; i < n; ++i) {
          const compute_t weight = multiply_add<has_fma>(target[i], kept, spread);
          const compute_t term = weight * (log_sum - (s[i] - top));
          loss += weight == 0 ? compute_t(0) : term;  // 0 * log 0 = 0
        }
      } else {
        loss = kept * (log_sum - (s[id] - top));
        if (spread != 0) {
          compute_t gap = 0;
#pragma omp simd reduction(+ : gap)
          for (int64_t i = 0; i < n; ++i) gap += top - s[i];
          loss += spread * (gap + compute_t(n) * log_sum);
        }
      }
    }
    if (out == nullptr) return loss;
    const compute_t inverse = mass / stats[5];
    if (id < 0) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const compute_t q = exp_scaled<has_fma>(s[i] - top, scale2, lowest) * inverse;
        const compute_t weight = multiply_add<has_fma>(target[i], kept, spread);
        out[i] += (q - weight) * factor;
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const compute_t q = exp_scaled<has_fma>(s[i] - top, scale2, lowest) * inverse;
        out[i] += (q - spread) * factor;
      }
      out[id] -= kept * factor;
    }
    return loss;
  }
};

template <typename compute_t, bool has_fma>
DMKD_INLINE int64_t rows(const KdArguments& a, int64_t begin, int64_t end) {
  const int64_t n = a.num_classes;
  const int64_t padded = (n + 15) / 16 * 16;
  thread_local std::vector<compute_t> scratch;
  scratch.resize(6 * padded);
  compute_t* const memory = scratch.data();
  const bool in_place = a.gradient.dtype == ScalarKind::kFloat
                            ? sizeof(compute_t) == sizeof(float)
                            : a.gradient.dtype == ScalarKind::kDouble;
  const bool has_target = a.probabilities.data != nullptr || a.classes != nullptr;
  auto* const losses = static_cast<compute_t*>(a.losses);

  for (int64_t r = begin; r < end; ++r) {
    const compute_t weight =
        a.weight ? static_cast<const compute_t*>(a.weight)[r * a.weight_stride] : compute_t(1);
    compute_t* const stats = static_cast<compute_t*>(a.stats) + r * kStats;
    compute_t* out = nullptr;
    if (a.gradient.data != nullptr) {
      out = in_place ? static_cast<compute_t*>(a.gradient.data) + r * a.gradient.row_stride
                     : memory + 5 * padded;
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

    Row<compute_t, has_fma> row{a,
                                n,
                                row_of(a.student, r, memory, n),
                                row_of(a.teacher, r, memory + padded, n),
                                out,
                                memory + 2 * padded,
                                memory + 3 * padded,
                                stats};
    const compute_t upstream =
        weight *
        (a.upstream ? static_cast<const compute_t*>(a.upstream)[r * a.upstream_stride] : 1);
    // In one factor each, so that nothing is rounded to the gradient's dtype before it is scaled.
    const compute_t factor = upstream * compute_t(a.kl_gradient / a.temperature);
    if (losses) {
      row.exponentials();
      losses[r] = weight * (out ? row.template divergences<true>(factor)
                                : row.template divergences<false>(factor));
      losses[a.num_rows + r] = stats[5] = stats[6] = 0;
    } else {
      row.gradient(factor);
    }
    if (has_target) {
      const compute_t* target =
          a.classes ? nullptr : row_of(a.probabilities, r, memory + 4 * padded, n);
      const compute_t ce =
          row.cross_entropy(id, target, losses != nullptr, upstream * compute_t(a.ce_gradient));
      if (losses) losses[a.num_rows + r] = weight * ce;
    }
    if (out) store_row(a.gradient, r, out, n);
  }
  return -1;
}

DMKD_FLATTEN_AVX512 int64_t run_avx512(const KdArguments& a, int64_t begin, int64_t end) {
  return rows<float, true>(a, begin, end);
}

DMKD_FLATTEN_AVX2 int64_t run_avx2(const KdArguments& a, int64_t begin, int64_t end) {
  return rows<float, true>(a, begin, end);
}

int64_t run_baseline(const KdArguments& a, int64_t begin, int64_t end) {
  return rows<float, kBaselineHasFma>(a, begin, end);
}

// float64 is for checking gradients, not for speed.
int64_t run_double(const KdArguments& a, int64_t begin, int64_t end) {
  return rows<double, false>(a, begin, end);
}

}  // namespace

int64_t kd_loss_rows(const KdArguments& arguments, int64_t begin, int64_t end) {
  static const auto run = best_of(run_baseline, run_avx2, run_avx512);
  return (arguments.is_double ? run_double : run)(arguments, begin, end);
}

}  // namespace dmkd
