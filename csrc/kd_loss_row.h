// One row of the distillation loss: its divergences, its cross-entropy, and their gradient.
//
// A row is swept from cache: maxima; exponentials into scratch (2 C values in L1/L2); then loss and
// gradient together. Divergences other than forward KL leave slopes, the first one in the
// gradient's memory and a second one in scratch, and one more sweep makes the gradient of them.

#pragma once

#include "kd_loss_divergences.h"

namespace dmkd {

template <typename compute_t, bool has_fma>
struct Row {
  const KdArguments& a;
  const int64_t n;
  const double temperature;
  const compute_t* __restrict s;  // student's logits
  const compute_t* __restrict t;  // teacher's
  compute_t* out;                 // gradient, or null
  compute_t* __restrict s_exp;    // scratch
  compute_t* __restrict t_exp;
  compute_t* slopes;  // scratch, or `out` itself
  compute_t* stats;
  compute_t* s_standard;  // scratch: standardized logits
  compute_t* t_standard;
  compute_t s_inverse_std = 1;  // of standardized logits: 1 / (standard deviation + 1e-7)
  compute_t s_chain = 0;        // and 1 / ((n - 1) standard deviation)

  // Exponentials of both at temperature T into scratch; maxima and sums into stats. Returns the
  // logarithm of the ratio of the sums. Class `without` does not count; -1: all classes count.
  DMKD_INLINE double exponentials(int64_t without = -1) {
    const Exponent<compute_t> exponent(1 / temperature);
    compute_t s_max = -std::numeric_limits<compute_t>::infinity(), t_max = s_max;
    const auto add_maxima = [&](int64_t begin, int64_t end) DMKD_LAMBDA {
      compute_t s_top = s_max, t_top = t_max;
#pragma omp simd reduction(max : s_top, t_top)
      for (int64_t i = begin; i < end; ++i) {
        s_top = s[i] > s_top ? s[i] : s_top;
        t_top = t[i] > t_top ? t[i] : t_top;
      }
      s_max = s_top;
      t_max = t_top;
    };
    if (without >= 0) add_maxima(0, without);
    add_maxima(without + 1, n);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      s_exp[i] = exp_scaled<has_fma>(s[i] - s_max, exponent);
      t_exp[i] = exp_scaled<has_fma>(t[i] - t_max, exponent);
    }
    if (without >= 0) s_exp[without] = t_exp[without] = 0;
    // In double: among many small terms and a large one, roundings would add up.
    double s_sum = 0, t_sum = 0;
#pragma omp simd reduction(+ : s_sum, t_sum)
    for (int64_t i = 0; i < n; ++i) {
      s_sum += s_exp[i];
      t_sum += t_exp[i];
    }
    const double gap = s_sum - t_sum;
    const Pair<compute_t> s_pair(s_sum), t_pair(t_sum);
    stats[0] = s_max;
    stats[1] = s_pair.high;
    stats[2] = t_max;
    stats[3] = t_pair.high;
    stats[7] = s_pair.low;
    stats[8] = t_pair.low;
    // The gradient feels this one's error in full.
    const double ratio =
        std::abs(gap) < 0.5 * t_sum ? std::log1p(gap / t_sum) : std::log(s_sum / t_sum);
    stats[4] = compute_t(((double(s_max) - double(t_max)) / temperature + ratio) * (n > 1));
    return ratio;
  }

  // What an exponential is multiplied by to become a probability.
  DMKD_INLINE Pair<compute_t> s_inverse() const { return Pair<compute_t>(1 / s_sum()); }
  DMKD_INLINE Pair<compute_t> t_inverse() const { return Pair<compute_t>(1 / t_sum()); }
  DMKD_INLINE double s_sum() const { return double(stats[1]) + double(stats[7]); }
  DMKD_INLINE double t_sum() const { return double(stats[3]) + double(stats[8]); }

  // Where d is the small difference of large numbers, its rounding weighs more than that of q - p.
  DMKD_INLINE compute_t near_limit() const {
    return std::abs(stats[4]) < compute_t(1) ? compute_t(0.5) : compute_t(0);
  }

  // With one class d is 0, which the rounding of its two parts would hide.
  DMKD_INLINE compute_t scale_of_d() const {
    return n > 1 ? compute_t(1 / temperature) : compute_t(0);
  }

  // Forward KL by the exponentials in scratch, and its gradient times `factor` into `to`; for kDkd
  // less `target_slope` for each class's probability. Only rows with infinite logits need
  // 0 * log 0 = 0, and their loss alone: it is computed again with the select.
  template <bool with_grad, bool is_dkd = false, bool with_zeros = false>
  DMKD_INLINE compute_t forward_kl(compute_t* __restrict to, compute_t factor,
                                   compute_t target_slope = 0) {
    const compute_t scale = scale_of_d(), common = stats[4], limit = near_limit();
    const Pair<compute_t> by_s = s_inverse(), by_t = t_inverse();
    compute_t loss = 0;
#pragma omp simd reduction(+ : loss)
    for (int64_t i = 0; i < n; ++i) {
      const compute_t q = times<has_fma>(s_exp[i], by_s), p = times<has_fma>(t_exp[i], by_t);
      const compute_t d = multiply_add<has_fma>(t[i] - s[i], scale, common);
      compute_t term, difference;
      divergence<has_fma>(p, q, d, limit, term, difference);
      loss += with_zeros && p == 0 ? q : term;
      if constexpr (with_grad && is_dkd) {
        to[i] = multiply_add<has_fma>(factor, difference, -(target_slope * q));
      } else if constexpr (with_grad) {
        to[i] = difference * factor;
      }
    }
    if constexpr (!with_zeros) {
      const bool finite = loss <= std::numeric_limits<compute_t>::max();
      if (!finite) loss = forward_kl<false, is_dkd, true>(to, factor);
    }
    return loss;
  }

  // The gradient of forward KL again from stats: the same operations in the same order as above.
  DMKD_INLINE void forward_kl_gradient(compute_t factor) {
    const compute_t scale = scale_of_d(), common = stats[4], limit = near_limit();
    const Exponent<compute_t> exponent(1 / temperature);
    const compute_t s_max = stats[0], t_max = stats[2];
    const Pair<compute_t> by_s = s_inverse(), by_t = t_inverse();
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const compute_t q = times<has_fma>(exp_scaled<has_fma>(s[i] - s_max, exponent), by_s);
      const compute_t p = times<has_fma>(exp_scaled<has_fma>(t[i] - t_max, exponent), by_t);
      const compute_t d = multiply_add<has_fma>(t[i] - s[i], scale, common);
      compute_t term, difference;
      divergence<has_fma>(p, q, d, limit, term, difference);
      out[i] = difference * factor;
    }
  }

  // Any sum of divergences, and its gradient times `factor` into `out`. `id`: the target, for kDkd;
  // `column_factor`: for kDist.
  DMKD_INLINE compute_t divergences(int64_t id, compute_t factor, compute_t column_factor) {
    compute_t loss = 0;
    bool is_ready = false;  // whether the exponentials in scratch are those of all classes
    double ratio = 0;
    compute_t* const scratch = slopes;
    for (int64_t k = 0; k < a.num_terms; ++k) {
      const Term& term = a.terms[k];
      // Written straight into the gradient: its cache misses overlap with the arithmetic.
      slopes = k == 0 && out != nullptr ? out : scratch;
      if (!is_ready && term.kind != Divergence::kDkd) ratio = exponentials();
      is_ready = term.kind != Divergence::kDkd && term.kind != Divergence::kDist;
      const compute_t part = factor * compute_t(term.weight);
      compute_t value = 0;
      switch (term.kind) {
        case Divergence::kForwardKl:
          if (k == 0) {
            value = out != nullptr ? forward_kl<true>(out, part) : forward_kl<false>(out, part);
          } else {
            value = sweep<Divergence::kForwardKl>(term, ratio, part, false);
          }
          break;
        case Divergence::kReverseKl:
          value = sweep<Divergence::kReverseKl>(term, ratio, part, k == 0);
          break;
        case Divergence::kJsd:
          value = sweep<Divergence::kJsd>(term, ratio, part, k == 0);
          break;
        case Divergence::kAlphaBeta:
          value = sweep<Divergence::kAlphaBeta>(term, ratio, part, k == 0);
          break;
        case Divergence::kTotalVariation:
          value = sweep<Divergence::kTotalVariation>(term, ratio, part, k == 0);
          break;
        case Divergence::kDkd:
          value = decoupled(term, id, part, k == 0);
          break;
        case Divergence::kDist:
          value = correlations(term, ratio, part, column_factor * compute_t(term.weight), k == 0);
          break;
      }
      loss += term.weight == 0 ? compute_t(0) : compute_t(term.weight) * value;
    }
    return loss;
  }

  // log p - log q from the two logits less their maxima. `is_finite`: no logit is infinite.
  template <bool is_finite>
  DMKD_INLINE compute_t difference_of_logs(compute_t y, compute_t x, const Pair<compute_t>& scale,
                                           const Pair<compute_t>& ratio) const {
    const compute_t d = multiply_add<has_fma>(y - x, scale.high, ratio.high);
    const compute_t rest = multiply_add<has_fma>(y - x, scale.low, ratio.low);
    if constexpr (!is_finite) {
      return std::abs(d) <= std::numeric_limits<compute_t>::max() ? d + rest : d;
    }
    return d + rest;
  }

  // One divergence of `class_part`; with infinite logits once more with the rules for 0.
  template <Divergence kind, bool with_zeros = false>
  DMKD_INLINE compute_t sweep(const Term& term, double ratio, compute_t factor, bool first) {
    const Pair<compute_t> scale(1 / temperature), ratio_pair(ratio);
    const Shared<compute_t> shared(kind, term, temperature, near_limit(), s_sum(), t_sum());
    compute_t loss = 0;
    if constexpr (!with_zeros && has_near_part<kind, compute_t>) {
      for (int64_t begin = 0; begin < n; begin += kPartBlock) {
        const int64_t end = std::min(begin + kPartBlock, n);
        const compute_t farthest = differences(begin, end, scale, ratio_pair);
        loss += farthest < shared.near_d
                    ? classes<kind, Reach::kNear>(shared, begin, end, scale, ratio_pair)
                    : classes<kind, Reach::kBoth>(shared, begin, end, scale, ratio_pair);
      }
    } else {
      loss = classes<kind, Reach::kBoth, with_zeros>(shared, 0, n, scale, ratio_pair);
    }
    if constexpr (!with_zeros) {
      const bool finite = loss <= std::numeric_limits<compute_t>::max();
      if (!finite) return sweep<kind, true>(term, ratio, factor, first);
    }
    constexpr compute_t common = common_factor(kind);
    if (out != nullptr) center(loss != loss ? loss : common * factor, first, s_sum());
    return common * loss;
  }

  // log p - log q of some classes in place of their slopes. Returns the largest size of them.
  DMKD_INLINE compute_t differences(int64_t begin, int64_t end, const Pair<compute_t>& scale,
                                    const Pair<compute_t>& ratio) {
    const compute_t s_max = stats[0], t_max = stats[2];
    compute_t farthest = 0;
#pragma omp simd reduction(max : farthest)
    for (int64_t i = begin; i < end; ++i) {
      const compute_t d = difference_of_logs<true>(t[i] - t_max, s[i] - s_max, scale, ratio);
      slopes[i] = d;
      farthest = std::abs(d) > farthest ? std::abs(d) : farthest;
    }
    return farthest;
  }

  // Terms of some classes, added up, and their slopes.
  template <Divergence kind, Reach reach, bool with_zeros = false>
  DMKD_INLINE compute_t classes(const Shared<compute_t>& shared, int64_t begin, int64_t end,
                                const Pair<compute_t>& scale, const Pair<compute_t>& ratio) {
    const compute_t plain_scale = scale_of_d(), common = stats[4];
    const compute_t s_max = stats[0], t_max = stats[2];
    const Pair<compute_t> by_s = s_inverse(), by_t = t_inverse();
    compute_t* __restrict const to = slopes;
    compute_t loss = 0;
#pragma omp simd reduction(+ : loss)
    for (int64_t i = begin; i < end; ++i) {
      const compute_t q = times<has_fma>(s_exp[i], by_s), p = times<has_fma>(t_exp[i], by_t);
      // Maxima first: logits that a constant sets apart keep their digits.
      const compute_t x = s[i] - s_max, y = t[i] - t_max;
      compute_t d, value, slope;
      if constexpr (kind == Divergence::kForwardKl || kind == Divergence::kTotalVariation) {
        d = multiply_add<has_fma>(t[i] - s[i], plain_scale, common);
      } else if constexpr (!with_zeros && kind == Divergence::kReverseKl) {
        // Without the low parts: that of the ratio is common to all classes and cancels in the
        // gradient, that of 1 / T is as small as the rounding of the logits.
        d = multiply_add<has_fma>(y - x, scale.high, ratio.high);
      } else if constexpr (!with_zeros && has_near_part<kind, compute_t>) {
        d = to[i];
      } else {
        d = difference_of_logs<!with_zeros>(y, x, scale, ratio);
      }
      class_part<kind, reach, with_zeros, has_fma>(shared, p, q, d, y, x, value, slope);
      loss += value;
      to[i] = slope;
    }
    return loss;
  }

  // Four at a time in the accumulated type, and from there in double.
  DMKD_INLINE double sum_of_slopes() const {
    constexpr int64_t kLanes = 16, kBlock = 4 * kLanes;
    double lanes[kLanes] = {}, total = 0;
    int64_t begin = 0;
    for (; begin + kBlock <= n; begin += kBlock) {
#pragma omp simd
      for (int64_t i = 0; i < kLanes; ++i) {
        const compute_t* const at = slopes + begin + i;
        lanes[i] += (at[0] + at[kLanes]) + (at[2 * kLanes] + at[3 * kLanes]);
      }
    }
#pragma omp simd reduction(+ : total)
    for (int64_t i = begin; i < n; ++i) total += slopes[i];
    for (int64_t i = 0; i < kLanes; ++i) total += lanes[i];
    return total;
  }

  // From slopes to the gradient: slope - q * (sum of slopes), times `factor`.
  // `s_sum`: the sum of `s_exp`.
  DMKD_INLINE void center(compute_t factor, bool first, double s_sum) {
    const double total = sum_of_slopes();
    const compute_t share = total == 0 ? compute_t(0) : compute_t(total / s_sum);
    if (first) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        out[i] = multiply_add<has_fma>(-share, s_exp[i], slopes[i]) * factor;
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        out[i] += multiply_add<has_fma>(-share, s_exp[i], slopes[i]) * factor;
      }
    }
  }

  // Defined in kd_loss_terms.h.
  DMKD_INLINE compute_t standardize();
  DMKD_INLINE void standardize_gradient();
  DMKD_INLINE compute_t decoupled(const Term& term, int64_t id, compute_t factor, bool first);
  DMKD_INLINE Binary target_against_rest(double s_gap, double t_gap, double ratio) const;
  DMKD_INLINE compute_t correlations(const Term& term, double ratio, compute_t factor,
                                     compute_t column_factor, bool first);
  DMKD_INLINE compute_t kept_correlations(const Term& term, const compute_t* sums, compute_t factor,
                                          compute_t column_factor);
  DMKD_INLINE compute_t correlations_of(const Term& term, const compute_t* sums, compute_t factor,
                                        compute_t column_factor, bool first);
  DMKD_INLINE void changes(double ratio, compute_t* __restrict p_out,
                           compute_t* __restrict change_out, compute_t mean, compute_t* sums);

  // Cross-entropy at T = 1, and its gradient times `factor` added to `out`. `logits` with maximum
  // `top`: those before standardization. id: class, or -1 with `target` as probabilities.
  DMKD_INLINE compute_t cross_entropy(const compute_t* __restrict logits, compute_t top, int64_t id,
                                      const compute_t* __restrict target, bool with_loss,
                                      compute_t factor) {
    const Exponent<compute_t> exponent(1);
    const compute_t spread = compute_t(a.label_smoothing / double(n));
    const compute_t kept = compute_t(1 - a.label_smoothing);
    compute_t mass = 1, loss = 0;
    if (id < 0 && !with_loss) {
      mass = stats[6];
    } else if (id < 0) {
      mass = 0;
#pragma omp simd reduction(+ : mass)
      for (int64_t i = 0; i < n; ++i) mass += multiply_add<has_fma>(target[i], kept, spread);
    }
    if (with_loss) {
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += exp_scaled<has_fma>(logits[i] - top, exponent);
      stats[5] = compute_t(sum);
      stats[6] = mass;
      const compute_t log_sum = std::log(stats[5]);
      if (id < 0) {
#pragma omp simd reduction(+ : loss)
        for (int64_t i = 0; i < n; ++i) {
          const compute_t weight = multiply_add<has_fma>(target[i], kept, spread);
          const compute_t term = weight * (log_sum - (logits[i] - top));
          loss += weight == 0 ? compute_t(0) : term;  // 0 * log 0 = 0
        }
      } else {
        loss = kept * (log_sum - (logits[id] - top));
        if (spread != 0) {
          compute_t gap = 0;
#pragma omp simd reduction(+ : gap)
          for (int64_t i = 0; i < n; ++i) gap += top - logits[i];
          loss += spread * (gap + compute_t(n) * log_sum);
        }
      }
    }
    if (out == nullptr) return loss;
    const compute_t inverse = mass / stats[5];
    if (id < 0) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const compute_t q = exp_scaled<has_fma>(logits[i] - top, exponent) * inverse;
        const compute_t weight = multiply_add<has_fma>(target[i], kept, spread);
        out[i] += (q - weight) * factor;
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const compute_t q = exp_scaled<has_fma>(logits[i] - top, exponent) * inverse;
        out[i] += (q - spread) * factor;
      }
      out[id] -= kept * factor;
    }
    return loss;
  }
};

}  // namespace dmkd
