// One class's part of each divergence D(p, q) of teacher p and student q at temperature T.
//
// `class_part` returns the class's term of D and its slope q * dD/dq. The gradient by s / T is then
// slope - q * (sum of slopes). Terms are written so that each is non-negative and keeps its digits
// as q -> p, which sums of rounded logarithms do not. Definitions: dmkd_fast/loss/reference.py.

#pragma once

#include <algorithm>

#include "kd_loss_cpu.h"
#include "scalar_types.h"

namespace dmkd {

// exp(-x) - 1 + x. In float only where |x| < 1/2.
template <bool has_fma, typename compute_t>
DMKD_INLINE compute_t near_excess(compute_t x) {
  if constexpr (sizeof(compute_t) == sizeof(float)) return x * (x * excess_series<has_fma>(x));
  return std::expm1(-x) + x;
}

// exp(-x) - 1. In float only where |x| < 1/2.
template <bool has_fma, typename compute_t>
DMKD_INLINE compute_t near_expm1(compute_t x) {
  if constexpr (sizeof(compute_t) == sizeof(float)) return near_excess<has_fma>(x) - x;
  return std::expm1(-x);
}

// log x for x > 0, minimax of cephes.
template <bool has_fma>
DMKD_INLINE float log_of(float x) {
  constexpr int32_t half_root = 0x3f3504f3;  // sqrt(1/2): x = m * 2^k with m from it to sqrt(2)
  const int32_t shifted = static_cast<int32_t>(float_to_bits(x)) - half_root;
  const float k = static_cast<float>(shifted >> 23);
  const float f = bits_to_float(static_cast<uint32_t>((shifted & 0x007fffff) + half_root)) - 1.0f;
  float series = 7.0376836292e-2f;
  series = multiply_add<has_fma>(series, f, -1.1514610310e-1f);
  series = multiply_add<has_fma>(series, f, 1.1676998740e-1f);
  series = multiply_add<has_fma>(series, f, -1.2420140846e-1f);
  series = multiply_add<has_fma>(series, f, 1.4249322787e-1f);
  series = multiply_add<has_fma>(series, f, -1.6668057665e-1f);
  series = multiply_add<has_fma>(series, f, 2.0000714765e-1f);
  series = multiply_add<has_fma>(series, f, -2.4999993993e-1f);
  series = multiply_add<has_fma>(series, f, 3.3333331174e-1f);
  const float log_m = multiply_add<has_fma>(f * f, multiply_add<has_fma>(f, series, -0.5f), f);
  return multiply_add<has_fma>(k, 0.69314718f, log_m);
}

template <bool has_fma>
DMKD_INLINE double log_of(double x) {
  return std::log(x);
}

// log(a / b) with `change` = b / a - 1.
template <bool has_fma>
DMKD_INLINE float log_ratio(float a, float b, float change) {
  if (std::abs(change) >= 0.25f) return log_of<has_fma>(a / b);
  const float z = change / (2.0f + change), z2 = z * z;  // log(1 + x) by the area tangent's series
  float series = multiply_add<has_fma>(z2, 0.11111111f, 0.14285714f);
  series = multiply_add<has_fma>(z2, series, 0.2f);
  series = multiply_add<has_fma>(z2, series, 0.33333333f);
  return -2.0f * z * multiply_add<has_fma>(z2, series, 1.0f);
}

// KL between teacher and student on {target, rest}, and q - p of the target.
struct Binary {
  double loss, change;
};

// log(sigmoid(a) / sigmoid(b)), with `change` = sigmoid(b) / sigmoid(a) - 1. Where `change` has
// lost the digits of the ratio, each sigmoid has a logarithm of its own.
DMKD_INLINE double log_ratio_of_sigmoids(double a, double b, double change) {
  if (change > -0.5 && change <= std::numeric_limits<double>::max()) return -std::log1p(change);
  return (std::min(a, 0.0) - std::log1p(std::exp(-std::abs(a)))) -
         (std::min(b, 0.0) - std::log1p(std::exp(-std::abs(b))));
}

// `teacher`, `student`: log odds of the target; `excess`: by how much the student's exceed the
// teacher's, where those are finite.
DMKD_INLINE Binary binary_of(double teacher, double student, double excess) {
  // sigmoid(x) and sigmoid(-x), by one exponential.
  const double t_small = std::exp(-std::abs(teacher)), s_small = std::exp(-std::abs(student));
  const double t_large = 1 / (1 + t_small), s_large = 1 / (1 + s_small);
  const double p = teacher > 0 ? t_large : t_small * t_large;
  const double p_rest = teacher > 0 ? t_small * t_large : t_large;
  const double q = student > 0 ? s_large : s_small * s_large;
  const double q_rest = student > 0 ? s_small * s_large : s_large;
  const double size = -std::expm1(-std::abs(excess));
  double change = excess > 0 ? size * q * p_rest : -size * p * q_rest;
  if (std::isinf(teacher)) change = teacher > 0 ? -q_rest : q;
  double loss = 0;
  if (p != 0) loss += p * log_ratio_of_sigmoids(teacher, student, change / p);
  if (p_rest != 0) loss += p_rest * log_ratio_of_sigmoids(-teacher, -student, -change / p_rest);
  return {loss < 0 ? 0 : loss, change};
}

// The same with fewer calls of slow functions; the loss in float. Odds are far enough from 0 and
// infinity that no probability is 0.
template <bool has_fma>
DMKD_INLINE Binary near_binary_of(double teacher_odds, double student_odds, double excess) {
  const double x = std::abs(excess);
  const double p_rest = 1 / (1 + teacher_odds), q_rest = 1 / (1 + student_odds);
  const double p = teacher_odds * p_rest, q = student_odds * q_rest;
  const double near_size = x * (1 - x * (1.0 / 2 - x * (1.0 / 6 - x * (1.0 / 24 - x / 120))));
  const double size = x < 0.01 ? near_size : 1 - std::exp(-x);
  const double change = excess > 0 ? size * q * p_rest : -size * p * q_rest;
  float term, rest_term, unused;
  const float d = log_ratio<has_fma>(float(p), float(q), float(change / p));
  const float rest_d = log_ratio<has_fma>(float(p_rest), float(q_rest), float(-change / p_rest));
  divergence<has_fma>(float(p), float(q), d, 0.0f, term, unused);
  divergence<has_fma>(float(p_rest), float(q_rest), rest_d, 0.0f, rest_term, unused);
  return {double(term) + double(rest_term), change};
}

// Which differences d of a block of classes a part has to serve.
enum class Reach { kNear, kBoth };

// Whether a part is cheaper where all d are near 0, in float.
template <Divergence kind, typename compute_t>
constexpr bool has_near_part = sizeof(compute_t) == sizeof(float) &&
                               (kind == Divergence::kJsd || kind == Divergence::kAlphaBeta);

constexpr int64_t kPartBlock = 128;  // classes that take the same part

// What the classes of a row share.
template <typename compute_t>
struct Shared {
  compute_t near_limit;     // of `divergence`
  compute_t first, second;  // the divergence's parameters: (beta) or (alpha, beta)
  compute_t rest;           // of kJsd: 1 - beta
  compute_t gamma;          // alpha + beta
  compute_t near_d;         // the size of d below which the series below is exact
  Exponent<compute_t> by_temperature, power;  // of e^(x / T) and of its gamma-th power
  compute_t p_power, q_power, mixed;          // factors of p^gamma, q^gamma and p^alpha q^beta
  compute_t series[7];  // of a term as q -> p, by powers of d from the second on
  compute_t slopes[8];  // of kAlphaBeta's slope, from the first on

  // The sums are those of the exponentials.
  DMKD_INLINE Shared(Divergence kind, const Term& term, double temperature, compute_t near_limit,
                     double s_sum, double t_sum)
      : near_limit(near_limit),
        first(compute_t(term.first)),
        second(compute_t(term.second)),
        rest(compute_t(1 - term.first)),
        gamma(compute_t(term.first + term.second)),
        by_temperature(1 / temperature),
        power((term.first + term.second) / temperature) {
    if (kind == Divergence::kAlphaBeta) {
      const double s_log = std::log(s_sum), t_log = std::log(t_sum);
      p_power = compute_t(std::exp(-(term.first + term.second) * t_log));
      q_power = compute_t(std::exp(-(term.first + term.second) * s_log));
      near_d = compute_t(0.5 / (term.first + term.second));
      mixed = compute_t(std::exp(-term.first * t_log - term.second * s_log));
      set_differences(term.first, term.second);
    } else if (kind == Divergence::kJsd) {
      near_d = compute_t(0.5);
      set_cumulants(term.first);
    }
  }

  // Of a draw that is 1 with probability beta: the n-th over n!.
  DMKD_INLINE void set_cumulants(double beta) {
    const double v = beta * (1 - beta), skew = 1 - 2 * beta;
    const double values[] = {v / 2,
                             v * skew / 6,
                             v * (1 - 6 * v) / 24,
                             v * skew * (1 - 12 * v) / 120,
                             v * (1 + v * (-30 + 120 * v)) / 720,
                             v * skew * (1 + v * (-60 + 360 * v)) / 5040,
                             v * (1 + v * (-126 + v * (1680 - 5040 * v))) / 40320};
    for (int i = 0; i < 7; ++i) series[i] = compute_t(values[i]);
  }

  // beta / gamma (exp(-gamma d) - 1 + gamma d) - (exp(-beta d) - 1 + beta d).
  DMKD_INLINE void set_differences(double alpha, double beta) {
    const double both = alpha + beta;
    double of_both = beta * both / 2, of_beta = beta * beta / 2;
    for (int i = 0; i < 7; ++i) {
      series[i] = compute_t(of_both - of_beta);
      of_both *= -both / (i + 3);
      of_beta *= -beta / (i + 3);
    }
    // (exp(-gamma d) - exp(-beta d)) / alpha.
    double both_power = -both, beta_power = -beta;
    for (int i = 0; i < 8; ++i) {
      slopes[i] = compute_t((both_power - beta_power) / alpha);
      both_power *= -both / (i + 2);
      beta_power *= -beta / (i + 2);
    }
  }
};

// A constant factor of term and slope that `class_part` leaves out.
constexpr double common_factor(Divergence kind) {
  return kind == Divergence::kTotalVariation ? 0.5 : 1.0;
}

// p, q: the class's probabilities; d = log p - log q; y, x: logits less their maxima. With
// `with_zeros`, a class of probability 0 follows 0 * log 0 = 0 and has a finite slope.
template <Divergence kind, Reach reach, bool with_zeros, bool has_fma, typename compute_t>
DMKD_INLINE void class_part(const Shared<compute_t>& shared, compute_t p, compute_t q, compute_t d,
                            compute_t y, compute_t x, compute_t& term, compute_t& slope) {
  if constexpr (kind == Divergence::kForwardKl) {
    divergence<has_fma>(p, q, d, shared.near_limit, term, slope);
    if constexpr (with_zeros) term = p == 0 ? q : term;
  } else if constexpr (kind == Divergence::kReverseKl) {
    compute_t unused;
    divergence<has_fma>(q, p, -d, shared.near_limit, term, unused);
    slope = -(q * d);
    if constexpr (with_zeros) {
      term = q == 0 ? p : term;
      slope = std::abs(d) <= std::numeric_limits<compute_t>::max() ? slope : compute_t(0);
    }
  } else if constexpr (kind == Divergence::kTotalVariation) {
    compute_t unused, difference;
    divergence<has_fma>(p, q, d, shared.near_limit, unused, difference);
    term = std::abs(difference);
    slope = difference == 0 ? compute_t(0) : std::copysign(q, difference);
  } else if constexpr (kind == Divergence::kJsd) {
    // With m = beta p + (1 - beta) q, log(m / q) is the cumulant generating function K at d, and
    // the term is m (d K' - K): near d = 0 by the cumulants, elsewhere by logarithms.
    const compute_t beta = shared.first, rest = shared.rest;
    const compute_t p_part = beta * p, q_part = rest * q;
    const compute_t m = p_part + q_part;
    compute_t by_q, near;  // log(m / q), and the term
    if constexpr (sizeof(compute_t) == sizeof(float)) {
      const float* const c = shared.series;
      float k = c[6], bregman = 7 * c[6];
      for (int n = 5; n >= 0; --n) {
        k = multiply_add<has_fma>(k, d, c[n]);
        bregman = multiply_add<has_fma>(bregman, d, float(n + 1) * c[n]);
      }
      by_q = d * multiply_add<has_fma>(d, k, beta);
      near = m * (d * (d * bregman));
    } else {
      by_q = std::log1p(beta * std::expm1(d));
      const compute_t by_p = by_q - d;
      near = p_part * (std::expm1(by_p) - by_p) + q_part * (std::expm1(by_q) - by_q);
    }
    if constexpr (reach == Reach::kNear) {
      term = near;
      slope = -q_part * by_q;
      return;
    }
    // log(m / p) where p is the larger one, else log(m / q).
    const compute_t ratio = std::min(p, q) / std::max(p, q);
    const compute_t own = d > 0 ? beta : rest, other = d > 0 ? rest : beta;
    const compute_t by_larger = log_of<has_fma>(multiply_add<has_fma>(other, ratio, own));
    compute_t p_far = -p_part * (by_larger + std::max(-d, compute_t(0)));
    compute_t q_far = -q_part * (by_larger + std::max(d, compute_t(0)));
    if constexpr (with_zeros) {
      p_far = p == 0 ? compute_t(0) : p_far;
      q_far = q == 0 ? compute_t(0) : q_far;
    }
    const bool is_near = std::abs(d) < shared.near_d;
    term = is_near ? near : p_far + q_far;
    slope = is_near ? -q_part * by_q : q_far;
  } else if constexpr (kind == Divergence::kAlphaBeta) {
    const compute_t alpha = shared.first, beta = shared.second, gamma = shared.gamma;
    const auto power_of = [&](compute_t logit, compute_t factor) DMKD_LAMBDA {
      return exp_scaled<has_fma>(logit, shared.power) * factor;
    };
    const compute_t p_power = power_of(y, shared.p_power);
    const compute_t p_part = alpha / gamma, q_part = beta / gamma, scale = 1 / (alpha * beta);
    compute_t near;
    if constexpr (sizeof(compute_t) == sizeof(float)) {
      const float* const c = shared.series;
      float k = c[6];
      for (int n = 5; n >= 0; --n) k = multiply_add<has_fma>(k, d, c[n]);
      near = p_power * (d * (d * k));
    } else {
      near = p_power * (q_part * near_excess<has_fma>(gamma * d) - near_excess<has_fma>(beta * d));
    }
    if constexpr (reach == Reach::kNear) {
      const compute_t* const c = shared.slopes;
      compute_t k = c[7];
      for (int n = 6; n >= 0; --n) k = multiply_add<has_fma>(k, d, c[n]);
      term = near * scale;
      slope = (p_power * d) * k;
      return;
    }
    const compute_t q_power = power_of(x, shared.q_power);
    const compute_t mean = multiply_add<has_fma>(alpha, y, beta * x);  // of log(p^alpha q^beta) * T
    const compute_t mixed_power = exp_scaled<has_fma>(mean, shared.by_temperature) * shared.mixed;
    const bool is_near = std::abs(d) < shared.near_d;
    const compute_t far = p_part * p_power + q_part * q_power - mixed_power;
    term = (is_near ? near : far) * scale;
    slope = (is_near ? -(q_power * near_expm1<has_fma>(-(alpha * d))) : q_power - mixed_power) *
            (1 / alpha);
  }
}

// 1 - correlation of a and b, with centered b and a = b + change; the gradient by a is
// by_p * b + by_change * change, which loses no digits as a -> b.
struct Correlation {
  double loss, by_p, by_change;
  double by_norms;  // 1 - correlation divided by |change - its part along b|^2; 0: use `loss`
};

// A vector counts as constant, with correlation 0, where its squares around the mean are at most
// this share of its squares.
constexpr double kConstant = 1e-13;

// From the squares of b and a, their floors, and the sums of b * change and change^2.
DMKD_INLINE Correlation correlation(double teacher, double student, double covariance,
                                    double variance, double teacher_floor, double student_floor) {
  if (teacher <= teacher_floor || student <= student_floor) return {1, 0, 0, 0};
  const double norms = std::sqrt(teacher * student), dot = teacher + covariance;
  const double by_norms = dot > 0 ? teacher / (norms * (norms + dot)) : 0;
  const double apart = std::max(0.0, variance - covariance * covariance / teacher);
  return {dot > 0 ? by_norms * apart : 1 - dot / norms,
          -(covariance + variance) / (student * norms), dot / (norms * student), by_norms};
}

// The same where a is much smaller than b, from the sum `dot` of a * b. The gradient by a is then
// by_p * b + by_change * a, and `by_norms` is for a less its part along b.
DMKD_INLINE Correlation flat_correlation(double teacher, double student, double dot,
                                         double teacher_floor, double student_floor) {
  if (teacher <= teacher_floor || student <= student_floor) return {1, 0, 0, 0};
  const double norms = std::sqrt(teacher * student);
  const double by_norms = dot > 0 ? teacher / (norms * (norms + dot)) : 0;
  return {1 - dot / norms, -1 / norms, dot / (norms * student), by_norms};
}

// Whether `sums` of `Row::changes` are those of `flat_correlation`.
template <typename compute_t>
DMKD_INLINE bool is_flat_student(const compute_t* sums) {
  return sums[3] < 0;
}

}  // namespace dmkd
