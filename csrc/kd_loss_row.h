// One row of the distillation loss: its divergences, its cross-entropy, and their gradient.
//
// A row is swept from cache: maxima; exponentials into scratch (2 C values in L1/L2); then loss and
// gradient together. Divergences other than forward KL leave slopes in scratch, and one more sweep
// makes the gradient of them.

#pragma once

#include "kd_loss_divergences.h"

namespace dmkd {

constexpr double kLog2E = 1.44269504088896340736;

template <typename compute_t, bool has_fma>
struct Row {
  const KdArguments& a;
  const int64_t n;
  const double temperature;
  const compute_t* __restrict s;  // student's logits
  const compute_t* __restrict t;  // teacher's
  compute_t* __restrict out;      // gradient, or null
  compute_t* __restrict s_exp;    // scratch
  compute_t* __restrict t_exp;
  compute_t* __restrict slopes;
  compute_t* stats;
  compute_t* s_masked;  // scratch: logits for kDkd, or standardized
  compute_t* t_masked;
  compute_t s_inverse_std = 1;  // of standardized logits: 1 / (standard deviation + 1e-7)
  compute_t s_chain = 0;        // and 1 / ((n - 1) standard deviation)

  // Exponentials of both at temperature T into scratch; maxima and sums into stats. Returns the
  // logarithm of the ratio of the sums.
  DMKD_INLINE compute_t exponentials() {
    const compute_t scale2 = compute_t(kLog2E / temperature);
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
    stats[4] = compute_t(((double(s_max) - double(t_max)) / temperature + ratio) * (n > 1));
    return compute_t(ratio);
  }

  // Where d is the small difference of large numbers, its rounding weighs more than that of q - p.
  DMKD_INLINE compute_t near_limit() const {
    return std::abs(stats[4]) < compute_t(1) ? compute_t(0.5) : compute_t(0);
  }

  // With one class d is 0, which the rounding of its two parts would hide.
  DMKD_INLINE compute_t scale_of_d() const {
    return n > 1 ? compute_t(1 / temperature) : compute_t(0);
  }

  // Forward KL by the exponentials in scratch, and its gradient times `factor` into `out`. Only
  // rows with infinite logits need 0 * log 0 = 0, and their loss alone: it is computed again with
  // the select.
  template <bool with_grad, bool with_zeros = false>
  DMKD_INLINE compute_t forward_kl(compute_t factor) {
    const compute_t scale = scale_of_d(), common = stats[4], limit = near_limit();
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
      if (!finite) loss = forward_kl<false, true>(factor);
    }
    return loss;
  }

  // The gradient of forward KL again from stats: the same operations in the same order as above.
  DMKD_INLINE void forward_kl_gradient(compute_t factor) {
    const compute_t scale = scale_of_d(), common = stats[4], limit = near_limit();
    const compute_t scale2 = compute_t(kLog2E / temperature);
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

  // Any sum of divergences, and its gradient times `factor` into `out`. `id`: the target, for kDkd;
  // `column_factor`: for kDist.
  DMKD_INLINE compute_t divergences(int64_t id, compute_t factor, compute_t column_factor) {
    compute_t loss = 0;
    bool is_ready = false;  // whether the exponentials in scratch are those of all classes
    compute_t ratio = 0;
    for (int64_t k = 0; k < a.num_terms; ++k) {
      const Term& term = a.terms[k];
      if (!is_ready && term.kind != Divergence::kDkd) ratio = exponentials();
      is_ready = term.kind != Divergence::kDkd && term.kind != Divergence::kDist;
      const compute_t part = factor * compute_t(term.weight);
      compute_t value = 0;
      switch (term.kind) {
        case Divergence::kForwardKl:
          value = sweep<Divergence::kForwardKl>(term, ratio, part, k == 0);
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

  // One divergence of `class_part`; with infinite logits once more with the rules for 0.
  template <Divergence kind, bool with_zeros = false>
  DMKD_INLINE compute_t sweep(const Term& term, compute_t ratio, compute_t factor, bool first) {
    const compute_t scale = compute_t(1 / temperature), scale2 = compute_t(kLog2E / temperature);
    const compute_t s_max = stats[0], t_max = stats[2];
    const compute_t s_inverse = 1 / stats[1], t_inverse = 1 / stats[3];
    constexpr bool with_logs = kind == Divergence::kAlphaBeta || kind == Divergence::kJsd;
    const compute_t s_log2 = with_logs ? compute_t(std::log2(double(stats[1]))) : compute_t(0);
    const compute_t t_log2 = with_logs ? compute_t(std::log2(double(stats[3]))) : compute_t(0);
    const compute_t gamma = compute_t(term.first + term.second);
    Shared<compute_t> shared{std::abs(ratio) < compute_t(1) ? compute_t(0.5) : compute_t(0),
                             compute_t(term.first),
                             compute_t(term.second),
                             gamma,
                             compute_t(-127) / gamma,
                             {}};
    if constexpr (kind == Divergence::kJsd) set_cumulants(shared, term.first);
    compute_t loss = 0, total = 0;
#pragma omp simd reduction(+ : loss, total)
    for (int64_t i = 0; i < n; ++i) {
      const compute_t q = s_exp[i] * s_inverse, p = t_exp[i] * t_inverse;
      // Maxima first: logits that a constant sets apart keep their digits.
      const compute_t x = s[i] - s_max, y = t[i] - t_max;
      const compute_t d = multiply_add<has_fma>(y - x, scale, ratio);
      compute_t log2_p = 0, log2_q = 0, value, slope;
      if constexpr (with_logs) {
        log2_p = multiply_add<has_fma>(y, scale2, -t_log2);
        log2_q = multiply_add<has_fma>(x, scale2, -s_log2);
      }
      class_part<kind, with_zeros, has_fma>(shared, p, q, d, log2_p, log2_q, value, slope);
      loss += value;
      total += slope;
      slopes[i] = slope;
    }
    if constexpr (!with_zeros) {
      const bool finite = loss <= std::numeric_limits<compute_t>::max();
      if (!finite) return sweep<kind, true>(term, ratio, factor, first);
    }
    if (out != nullptr) center(total, loss != loss ? loss : factor, first);
    return loss;
  }

  // From slopes to the gradient: slope - q * (sum of slopes), times `factor`.
  DMKD_INLINE void center(compute_t total, compute_t factor, bool first) {
    const compute_t share = total == 0 ? compute_t(0) : total / stats[1];
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
  DMKD_INLINE compute_t decoupled(const Term& term, int64_t id, compute_t factor, bool first);
  DMKD_INLINE compute_t rest(const Term& term, int64_t id, compute_t s_id, compute_t t_id,
                             compute_t ratio, compute_t factor, bool first);
  DMKD_INLINE compute_t correlations(const Term& term, compute_t ratio, compute_t factor,
                                     compute_t column_factor, bool first);
  DMKD_INLINE void changes(compute_t ratio, compute_t* __restrict p_out,
                           compute_t* __restrict change_out, compute_t mean, compute_t& teacher,
                           compute_t& student, compute_t& covariance, compute_t& variance);

  // Logits to mean 0 and standard deviation 1 in scratch. Returns the student's own maximum.
  DMKD_INLINE compute_t standardize() {
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
      s_masked[i] = (s[i] - s_mean) * s_inverse_std;
      t_masked[i] = (t[i] - t_mean) * t_inverse_std;
    }
    s = s_masked;
    t = t_masked;
    return top;
  }

  // The gradient by standardized logits in `out` becomes that by the logits.
  DMKD_INLINE void standardize_gradient() {
    compute_t dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < n; ++i) dot += out[i] * s[i];
    const compute_t chain = dot * s_chain;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      out[i] = multiply_add<has_fma>(out[i], s_inverse_std, -(chain * s[i]));
    }
  }

  // Cross-entropy at T = 1, and its gradient times `factor` added to `out`. `logits` with maximum
  // `top`: those before standardization. id: class, or -1 with `target` as probabilities.
  DMKD_INLINE compute_t cross_entropy(const compute_t* __restrict logits, compute_t top, int64_t id,
                                      const compute_t* __restrict target, bool with_loss,
                                      compute_t factor) {
    const compute_t scale2 = compute_t(kLog2E), lowest = compute_t(-127) / scale2;
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
      compute_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += exp_scaled<has_fma>(logits[i] - top, scale2, lowest);
      stats[5] = sum;
      stats[6] = mass;
      const compute_t log_sum = std::log(sum);
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
        const compute_t q = exp_scaled<has_fma>(logits[i] - top, scale2, lowest) * inverse;
        const compute_t weight = multiply_add<has_fma>(target[i], kept, spread);
        out[i] += (q - weight) * factor;
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const compute_t q = exp_scaled<has_fma>(logits[i] - top, scale2, lowest) * inverse;
        out[i] += (q - spread) * factor;
      }
      out[id] -= kept * factor;
    }
    return loss;
  }
};

}  // namespace dmkd
