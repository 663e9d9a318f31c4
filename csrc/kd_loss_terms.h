// The divergences of a row that take more than one sweep: decoupled KD and DIST; and standardized
// logits.

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
  double student = teacher + excess;
  if (std::isinf(teacher)) {
    student = (double(s_id) - double(s_max)) / temperature - std::log(s_sum());
  }
  const bool is_near =
      sizeof(compute_t) == sizeof(float) && std::abs(teacher) < 60 && std::abs(student) < 60;
  const Binary binary = alone ? Binary{double(s_id - s_id) + double(t_id - t_id), 0}
                        // as with one class: 0 or nan
                        : is_near ? near_binary_of<has_fma>(teacher, excess)
                                  : binary_of(teacher, student, excess);
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
  compute_t sums[4];
  changes(ratio, t_exp, slopes, compute_t(1.0 / double(n)), sums);
  const compute_t by_s = compute_t(1 / s_sum());
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) s_exp[i] *= by_s;
  return correlations_of(term, sums, factor, column_factor, first);
}

// The same where q - p is in `out`, and `stats` and `sums` are what was kept with it.
template <typename compute_t, bool has_fma>
DMKD_INLINE compute_t Row<compute_t, has_fma>::kept_correlations(const Term& term,
                                                                 const compute_t* sums,
                                                                 compute_t factor,
                                                                 compute_t column_factor) {
  const Exponent<compute_t> exponent(1 / temperature);
  const compute_t s_max = stats[0], t_max = stats[2], by_s = compute_t(1 / s_sum());
  const Pair<compute_t> by_t = t_inverse();
  for (int64_t begin = 0; begin < n; begin += kPartBlock) {
    const int64_t end = std::min(begin + kPartBlock, n);
    compute_t least = 1;
#pragma omp simd reduction(min : least)
    for (int64_t i = begin; i < end; ++i) {
      const compute_t p = times<has_fma>(exp_scaled<has_fma>(t[i] - t_max, exponent), by_t);
      const compute_t change = out[i], q = p + change;
      t_exp[i] = p;
      slopes[i] = change;
      s_exp[i] = q;
      const compute_t rest = q - compute_t(0.01) * p;
      least = rest < least ? rest : least;
    }
    if (least >= 0) continue;
    // Where q is much less than p, their difference has lost it.
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      s_exp[i] = exp_scaled<has_fma>(s[i] - s_max, exponent) * by_s;
    }
  }
  return correlations_of(term, sums, factor, column_factor, true);
}

// The same from p in `t_exp`, q in `s_exp`, and q - p in `slopes`. `sums`: see `changes`.
template <typename compute_t, bool has_fma>
DMKD_INLINE compute_t Row<compute_t, has_fma>::correlations_of(const Term& term,
                                                               const compute_t* sums,
                                                               compute_t factor,
                                                               compute_t column_factor,
                                                               bool first) {
  const compute_t mean = compute_t(1.0 / double(n));
  const double floor = kConstant / double(n);
  const Correlation found = correlation(sums[0], sums[1], sums[2], sums[3], floor, floor);
  const compute_t row = factor * compute_t(term.first);
  const compute_t by_p = row * compute_t(found.by_p), by_change = row * compute_t(found.by_change);
  const compute_t column_part = column_factor * compute_t(term.second / double(n));
  const compute_t parallel = compute_t(double(sums[2]) / double(sums[0]));
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
    slopes[i] = s_exp[i] * (by_p * b + by_change * change + column_part * column);
  }
  if (out != nullptr) center(compute_t(1), first, 1.0);
  // The residual is the part of variance * teacher - covariance^2 that subtraction would blur.
  const double row_loss = found.by_norms > 0 ? found.by_norms * double(residual) : found.loss;
  return compute_t(term.first * row_loss + term.second * a.columns_loss);
}

// p and q - p of every class. `sums`: of squares of b = p - mean and of q - mean, of b (q - p), and
// of (q - p)^2.
template <typename compute_t, bool has_fma>
DMKD_INLINE void Row<compute_t, has_fma>::changes(double ratio, compute_t* __restrict p_out,
                                                  compute_t* __restrict change_out, compute_t mean,
                                                  compute_t* sums) {
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
  sums[0] = b_squares;
  sums[1] = a_squares;
  sums[2] = products;
  sums[3] = squares;
}

// The gradient by standardized logits in `out` becomes that by the logits.
template <typename compute_t, bool has_fma>
DMKD_INLINE void Row<compute_t, has_fma>::standardize_gradient() {
  compute_t dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < n; ++i) dot += out[i] * s[i];
  const compute_t chain = dot * s_chain;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = multiply_add<has_fma>(out[i], s_inverse_std, -(chain * s[i]));
  }
}

}  // namespace dmkd
