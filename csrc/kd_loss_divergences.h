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

// exp(-x) - 1 for x >= 0.
template <bool has_fma>
DMKD_INLINE float expm1_of(float x) {
  constexpr float log2e = 1.44269504f;
  const float far = exp_scaled<has_fma>(-x, log2e, -127.0f / log2e) - 1.0f;
  return x < 0.5f ? near_expm1<has_fma>(x) : far;
}

template <bool has_fma>
DMKD_INLINE double expm1_of(double x) {
  return std::expm1(-x);
}

// log(1 + x) for -1 < x <= 0, and x - log(1 + x) without cancellation as x -> 0.
template <bool has_fma>
DMKD_INLINE float log1p_of(float x, float& excess) {
  constexpr int32_t half_root = 0x3f3504f3;  // sqrt(1/2)
  const int32_t shifted = static_cast<int32_t>(float_to_bits(1.0f + x)) - half_root;
  // 1 + x = m * 2^k with m from sqrt(1/2) to sqrt(2); k = 0 leaves x as it is.
  const int32_t k = shifted >> 23;
  const float m = bits_to_float(static_cast<uint32_t>((shifted & 0x007fffff) + half_root));
  const float f = k == 0 ? x : m - 1.0f;
  float series = 7.0376836292e-2f;  // minimax of cephes
  series = multiply_add<has_fma>(series, f, -1.1514610310e-1f);
  series = multiply_add<has_fma>(series, f, 1.1676998740e-1f);
  series = multiply_add<has_fma>(series, f, -1.2420140846e-1f);
  series = multiply_add<has_fma>(series, f, 1.4249322787e-1f);
  series = multiply_add<has_fma>(series, f, -1.6668057665e-1f);
  series = multiply_add<has_fma>(series, f, 2.0000714765e-1f);
  series = multiply_add<has_fma>(series, f, -2.4999993993e-1f);
  series = multiply_add<has_fma>(series, f, 3.3333331174e-1f);
  const float near_excess = f * f * multiply_add<has_fma>(-f, series, 0.5f);
  const float log = multiply_add<has_fma>(static_cast<float>(k), 0.69314718f, f - near_excess);
  excess = k == 0 ? near_excess : x - log;
  return log;
}

template <bool has_fma>
DMKD_INLINE double log1p_of(double x, double& excess) {
  const double log = std::log1p(x);
  excess = x - log;
  return log;
}

// What the classes of a row share.
template <typename compute_t>
struct Shared {
  compute_t near_limit;    // of `divergence`
  compute_t first, second; // the divergence's parameters: (beta) or (alpha, beta)
  compute_t gamma, lowest; // alpha + beta, and where 2^(gamma x) is 0
};

// p, q: the class's probabilities; d = log p - log q; log2 of both for alpha_beta alone. With
// `with_zeros`, a class of probability 0 follows 0 * log 0 = 0 and has a finite slope.
template <Divergence kind, bool with_zeros, bool has_fma, typename compute_t>
DMKD_INLINE void class_part(const Shared<compute_t>& shared, compute_t p, compute_t q, compute_t d,
                            compute_t log2_p, compute_t log2_q, compute_t& term,
                            compute_t& slope) {
  constexpr compute_t half = 0.5;
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
    term = half * std::abs(difference);
    slope = difference > 0 ? half * q : difference < 0 ? -half * q : compute_t(0);
  } else if constexpr (kind == Divergence::kJsd) {
    const compute_t beta = shared.first, other = 1 - beta;
    // With m = beta p + (1 - beta) q: log(m / larger) and log(m / smaller) of p and q.
    const bool above = d > 0;  // p is the larger one
    const compute_t p_share = beta * p, q_share = other * q, size = std::abs(d);
    const compute_t larger_share = above ? p_share : q_share;
    const compute_t smaller_share = above ? q_share : p_share;
    const compute_t fall = expm1_of<has_fma>(size);  // smaller / larger - 1
    compute_t excess;
    const compute_t by_larger = log1p_of<has_fma>((above ? other : beta) * fall, excess);
    const compute_t by_smaller = by_larger + size;
    const compute_t near =
        larger_share * excess + smaller_share * near_excess<has_fma>(-by_smaller);
    compute_t larger_far = -larger_share * by_larger, smaller_far = -smaller_share * by_smaller;
    if constexpr (with_zeros) {
      larger_far = larger_share == 0 ? compute_t(0) : larger_far;
      smaller_far = smaller_share == 0 ? compute_t(0) : smaller_far;
    }
    term = size < half ? near : larger_far + smaller_far;
    slope = above ? smaller_far : larger_far;
  } else if constexpr (kind == Divergence::kAlphaBeta) {
    const compute_t alpha = shared.first, beta = shared.second, gamma = shared.gamma;
    const compute_t q_power = power_of_2<has_fma>(log2_q, gamma, shared.lowest);
    const compute_t p_power = power_of_2<has_fma>(log2_p, gamma, shared.lowest);
    const compute_t mixed = multiply_add<has_fma>(alpha, log2_p, beta * log2_q);  // p^alpha q^beta
    const compute_t mixed_power = power_of_2<has_fma>(mixed, compute_t(1), compute_t(-127));
    const compute_t p_part = alpha / gamma, q_part = beta / gamma, scale = 1 / (alpha * beta);
    const bool is_near = std::abs(d) * gamma < half;
    const compute_t near = p_power * (q_part * near_excess<has_fma>(gamma * d) -
                                      near_excess<has_fma>(beta * d));
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

}  // namespace dmkd
