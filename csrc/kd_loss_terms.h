// The divergences of a row that take more than one sweep: decoupled KD and DIST.

#pragma once

#include "kd_loss_row.h"

namespace dmkd {

// Decoupled KD: `first` times the KL of target against rest, plus `second` times that among the
// rest, whose exponentials leave the target out.
template <typename compute_t, bool has_fma>
DMKD_INLINE compute_t Row<compute_t, has_fma>::decoupled(const Term& term, int64_t id,
                                                         compute_t factor, bool first) {
  const double ratio = exponentials(id);
  const compute_t s_id = s[id], t_id = t[id];
  const bool alone = stats[0] == -std::numeric_limits<compute_t>::infinity() ||
                     stats[2] == -std::numeric_limits<compute_t>::infinity();
  const compute_t s_max = stats[0], t_max = stats[2];
  // Log odds of the target for the teacher, and by how much the student's exceed them.
  const double teacher = (double(t_id) - double(t_max)) / temperature - std::log(t_sum());
  const double excess =
      ((double(s_id) - double(s_max)) - (double(t_id) - double(t_max))) / temperature - ratio;
  const bool is_near = sizeof(compute_t) == sizeof(float) && std::abs(teacher) < 60 &&
                       std::abs(teacher + excess) < 60;
  const Binary binary = alone ? Binary{double(s_id - s_id) + double(t_id - t_id), 0}
                        // as with one class: 0 or nan
                        : is_near ? near_binary_of<has_fma>(teacher, excess)
                                  : binary_of(teacher, excess);
  const compute_t scale = scale_of_d(), common = stats[4];
  const Pair<compute_t> by_s = alone ? Pair<compute_t>(0) : s_inverse();
  const Pair<compute_t> by_t = alone ? Pair<compute_t>(0) : t_inverse();
  const compute_t limit = near_limit();
  const compute_t others = compute_t(term.second);
  const compute_t binary_slope = compute_t(term.first * binary.change);
  compute_t* __restrict const part = out != nullptr && first ? out : slopes;
  compute_t loss = 0;
#pragma omp simd reduction(+ : loss)
  for (int64_t i = 0; i < n; ++i) {
    const compute_t q_i = times<has_fma>(s_exp[i], by_s), p_i = times<has_fma>(t_exp[i], by_t);
    const compute_t d = multiply_add<has_fma>(t[i] - s[i], scale, common);
    compute_t value, difference;
    divergence<has_fma>(p_i, q_i, d, limit, value, difference);
    loss += p_i == 0 ? q_i : value;
    part[i] = multiply_add<has_fma>(others, difference, -(binary_slope * q_i)) * factor;
  }
  if (alone) {
    loss = 0;
    std::fill(part, part + n, compute_t(0));
  }
  part[id] = binary_slope * factor;
  const compute_t whole = compute_t(term.first * binary.loss) + others * loss;
  if (out != nullptr && (!first || whole != whole)) {
    const compute_t nan_or_1 = whole != whole ? whole : compute_t(1);
    for (int64_t i = 0; i < n; ++i) {
      out[i] = (first ? compute_t(0) : out[i]) + part[i] * nan_or_1;
    }
  }
  return whole;
}

// DIST: `first` times 1 - correlation over the classes, plus `second` times the mean of
// 1 - correlation over the columns. `column_factor`: that of the latter's gradient.
template <typename compute_t, bool has_fma>
DMKD_INLINE compute_t Row<compute_t, has_fma>::correlations(const Term& term, double ratio,
                                                            compute_t factor,
                                                            compute_t column_factor, bool first) {
  const compute_t mean = compute_t(1.0 / double(n));
  compute_t teacher = 0, student = 0, covariance = 0, variance = 0;
  changes(ratio, t_exp, slopes, mean, teacher, student, covariance, variance);
  const Correlation found = correlation(teacher, student, covariance, variance,
                                        kConstant / double(n), kConstant / double(n));
  const compute_t row = factor * compute_t(term.first);
  const compute_t by_p = row * compute_t(found.by_p), by_change = row * compute_t(found.by_change);
  const compute_t column_part = column_factor * compute_t(term.second / double(n));
  const compute_t parallel = compute_t(double(covariance) / double(teacher));
  const compute_t by_s = compute_t(1 / s_sum());
  const compute_t* const columns = static_cast<const compute_t*>(a.columns);
  const compute_t* __restrict const column_p = columns;
  const compute_t* __restrict const column_change = columns + n;
  const compute_t* __restrict const p_mean = columns + 2 * n;
  const compute_t* __restrict const change_mean = columns + 3 * n;
  compute_t residual = 0;
#pragma omp simd reduction(+ : residual)
  for (int64_t i = 0; i < n; ++i) {
    const compute_t b = t_exp[i] - mean, change = slopes[i];
    const compute_t apart = change - parallel * b;
    residual += apart * apart;
    const compute_t column =
        column_p[i] * (t_exp[i] - p_mean[i]) + column_change[i] * (change - change_mean[i]);
    slopes[i] = s_exp[i] * by_s * (by_p * b + by_change * change + column_part * column);
  }
  if (out != nullptr) center(compute_t(1), first);
  // The residual is the part of variance * teacher - covariance^2 that subtraction would blur.
  const double row_loss = found.by_norms > 0 ? found.by_norms * double(residual) : found.loss;
  return compute_t(term.first * row_loss + term.second * a.columns_loss);
}

// p and q - p of every class, and the sums of a `Correlation`, p and q less `mean`.
template <typename compute_t, bool has_fma>
DMKD_INLINE void Row<compute_t, has_fma>::changes(double ratio, compute_t* __restrict p_out,
                                                  compute_t* __restrict change_out, compute_t mean,
                                                  compute_t& teacher, compute_t& student,
                                                  compute_t& covariance, compute_t& variance) {
  const compute_t s_max = stats[0], t_max = stats[2];
  const compute_t scale = compute_t(1 / temperature), common = compute_t(ratio);
  const Pair<compute_t> by_s = s_inverse(), by_t = t_inverse();
  const compute_t limit = std::abs(ratio) < 1 ? compute_t(0.5) : compute_t(0);
  compute_t b_squares = 0, a_squares = 0, products = 0, squares = 0;
#pragma omp simd reduction(+ : b_squares, a_squares, products, squares)
  for (int64_t i = 0; i < n; ++i) {
    const compute_t q = times<has_fma>(s_exp[i], by_s), p = times<has_fma>(t_exp[i], by_t);
    const compute_t d = multiply_add<has_fma>((t[i] - t_max) - (s[i] - s_max), scale, common);
    compute_t value, change;
    divergence<has_fma>(p, q, d, limit, value, change);
    p_out[i] = p;
    change_out[i] = change;
    const compute_t b = p - mean, both = b + change;
    b_squares += b * b;
    a_squares += both * both;
    products += b * change;
    squares += change * change;
  }
  teacher = b_squares;
  student = a_squares;
  covariance = products;
  variance = squares;
}

}  // namespace dmkd
