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
  const compute_t s_max = stats[0], t_max = stats[2];
  const bool alone = s_max == -std::numeric_limits<compute_t>::infinity() ||
                     t_max == -std::numeric_limits<compute_t>::infinity();
  const double t_gap = (double(t[id]) - double(t_max)) / temperature;
  const double s_gap = (double(s[id]) - double(s_max)) / temperature;
  const Binary binary = alone ? Binary{double(s[id] - s[id]) + double(t[id] - t[id]), 0}
                              // as with one class: 0 or nan
                              : target_against_rest(s_gap, t_gap, ratio);
  const compute_t binary_slope = compute_t(term.first * binary.change) * factor;
  compute_t loss = 0;
  if (alone) {
    std::fill(slopes, slopes + n, compute_t(0));
  } else {
    loss = forward_kl<true, true>(slopes, compute_t(term.second) * factor, binary_slope);
  }
  slopes[id] = binary_slope;
  const compute_t whole = compute_t(term.first * binary.loss) + compute_t(term.second) * loss;
  if (out != nullptr && (!first || whole != whole)) {
    const compute_t nan_or_1 = whole != whole ? whole : compute_t(1);
    for (int64_t i = 0; i < n; ++i) {
      out[i] = (first ? compute_t(0) : out[i]) + slopes[i] * nan_or_1;
    }
  }
  return whole;
}

// The target against the rest, from its logits less the maxima of the rest, divided by T.
template <typename compute_t, bool has_fma>
DMKD_INLINE Binary Row<compute_t, has_fma>::target_against_rest(double s_gap, double t_gap,
                                                                double ratio) const {
  const double excess = s_gap - t_gap - ratio;  // of the student's log odds
  if constexpr (sizeof(compute_t) == sizeof(float)) {
    const double s_odds = std::exp(s_gap) / s_sum(), t_odds = std::exp(t_gap) / t_sum();
    const auto is_near = [](double odds) DMKD_LAMBDA { return odds > 1e-26 && odds < 1e26; };
    if (is_near(s_odds) && is_near(t_odds)) {
      return near_binary_of<has_fma>(t_odds, s_odds, excess);
    }
  }
  const double teacher = t_gap - std::log(t_sum());
  const double student = std::isinf(teacher) ? s_gap - std::log(s_sum()) : teacher + excess;
  return binary_of(teacher, student, excess);
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
  const bool is_flat = is_flat_student(sums);
  slopes = out;
  for (int64_t begin = 0; begin < n; begin += kPartBlock) {
    const int64_t end = std::min(begin + kPartBlock, n);
    compute_t least = 1;
#pragma omp simd reduction(min : least)
    for (int64_t i = begin; i < end; ++i) {
      const compute_t p = times<has_fma>(exp_scaled<has_fma>(t[i] - t_max, exponent), by_t);
      const compute_t q = p + slopes[i];
      t_exp[i] = p;
      s_exp[i] = q;
      const compute_t rest = multiply_add<has_fma>(compute_t(-0.01), p, q);
      least = rest < least ? rest : least;
    }
    if (least >= 0 && !is_flat) continue;
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
  const bool is_flat = is_flat_student(sums);
  const Correlation found = is_flat ? flat_correlation(sums[0], sums[1], sums[2], floor, floor)
                                    : correlation(sums[0], sums[1], sums[2], sums[3], floor, floor);
  const compute_t row = factor * compute_t(term.first);
  const compute_t by_b = row * compute_t(found.by_p), by_x = row * compute_t(found.by_change);
  const compute_t column_part = column_factor * compute_t(term.second / double(n));
  const compute_t parallel = compute_t(double(sums[2]) / double(sums[0]));
  const compute_t* const columns = static_cast<const compute_t*>(a.columns);
  const compute_t* __restrict const column_p = columns;
  const compute_t* __restrict const column_change = columns + n;
  const compute_t* __restrict const p_mean = columns + 2 * n;
  const compute_t* __restrict const change_mean = columns + 3 * n;
  compute_t* __restrict const to = slopes;
  compute_t residual = 0;
#pragma omp simd reduction(+ : residual)
  for (int64_t i = 0; i < n; ++i) {
    const compute_t b = t_exp[i] - mean, change = to[i];
    const compute_t x = is_flat ? s_exp[i] - mean : change;
    const compute_t apart = multiply_add<has_fma>(-parallel, b, x);
    residual = multiply_add<has_fma>(apart, apart, residual);
    const compute_t column = multiply_add<has_fma>(column_p[i], t_exp[i] - p_mean[i],
                                                   column_change[i] * (change - change_mean[i]));
    const compute_t by_row = multiply_add<has_fma>(by_b, b, by_x * x);
    to[i] = s_exp[i] * multiply_add<has_fma>(column_part, column, by_row);
  }
  if (out != nullptr) center(compute_t(1), first, 1.0);
  // The residual is what subtracting the part of x along b from x^2 would blur.
  const double row_loss = found.by_norms > 0 ? found.by_norms * double(residual) : found.loss;
  return compute_t(term.first * row_loss + term.second * a.columns_loss);
}

// p and q - p of every class. `sums`: of squares of b = p - mean and of a = q - mean, of b (q - p),
// and of (q - p)^2. Where a is much smaller than b, as for a student with nearly equal logits, the
// last two would lose it: the third is then that of b a, and the last one -1 (`is_flat_student`).
template <typename compute_t, bool has_fma>
DMKD_INLINE void Row<compute_t, has_fma>::changes(double ratio, compute_t* __restrict p_out,
                                                  compute_t* __restrict change_out, compute_t mean,
                                                  compute_t* sums) {
  const compute_t s_max = stats[0], t_max = stats[2];
  const compute_t scale = compute_t(1 / temperature), common = compute_t(ratio);
  const Pair<compute_t> by_s = s_inverse(), by_t = t_inverse();
  const compute_t limit = std::abs(ratio) < 1 ? compute_t(0.5) : compute_t(0);
  compute_t b_squares = 0, products = 0, squares = 0;
#pragma omp simd reduction(+ : b_squares, products, squares)
  for (int64_t i = 0; i < n; ++i) {
    const compute_t q = times<has_fma>(s_exp[i], by_s), p = times<has_fma>(t_exp[i], by_t);
    const compute_t d = multiply_add<has_fma>((t[i] - t_max) - (s[i] - s_max), scale, common);
    compute_t value, change;
    divergence<has_fma>(p, q, d, limit, value, change);
    p_out[i] = p;
    change_out[i] = change;
    const compute_t b = p - mean;
    b_squares = multiply_add<has_fma>(b, b, b_squares);
    products = multiply_add<has_fma>(b, change, products);
    squares = multiply_add<has_fma>(change, change, squares);
  }
  compute_t a_squares = b_squares + 2 * products + squares;
  if (a_squares < compute_t(0.25) * (b_squares + squares)) {
    a_squares = products = 0;
    squares = -1;
    const compute_t scale_of_q = compute_t(1 / s_sum());
#pragma omp simd reduction(+ : a_squares, products)
    for (int64_t i = 0; i < n; ++i) {
      const compute_t a = s_exp[i] * scale_of_q - mean, b = p_out[i] - mean;
      a_squares = multiply_add<has_fma>(a, a, a_squares);
      products = multiply_add<has_fma>(b, a, products);
    }
  }
  sums[0] = b_squares;
  sums[1] = a_squares;
  sums[2] = products;
  sums[3] = squares;
}

// Logits to mean 0 and standard deviation 1 in scratch. Returns the student's own maximum.
template <typename compute_t, bool has_fma>
DMKD_INLINE compute_t Row<compute_t, has_fma>::standardize() {
  compute_t top = -std::numeric_limits<compute_t>::infinity(), s_sum = 0, t_sum = 0;
#pragma omp simd reduction(max : top) reduction(+ : s_sum, t_sum)
  for (int64_t i = 0; i < n; ++i) {
    top = s[i] > top ? s[i] : top;
    s_sum += s[i];
    t_sum += t[i];
  }
  const compute_t s_mean = s_sum / compute_t(n), t_mean = t_sum / compute_t(n);
  compute_t s_squares = 0, t_squares = 0;
#pragma omp simd reduction(+ : s_squares, t_squares)
  for (int64_t i = 0; i < n; ++i) {
    const compute_t x = s[i] - s_mean, y = t[i] - t_mean;
    s_squares += x * x;
    t_squares += y * y;
  }
  const double freedom = n > 1 ? double(n - 1) : 1;
  const double s_std = std::sqrt(double(s_squares) / freedom);
  const double t_std = std::sqrt(double(t_squares) / freedom);
  s_inverse_std = compute_t(1 / (s_std + 1e-7));
  s_chain = s_std > 0 ? compute_t(1 / (freedom * s_std)) : compute_t(0);
  const compute_t t_inverse_std = compute_t(1 / (t_std + 1e-7));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    s_standard[i] = (s[i] - s_mean) * s_inverse_std;
    t_standard[i] = (t[i] - t_mean) * t_inverse_std;
  }
  s = s_standard;
  t = t_standard;
  return top;
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
