// Sums over the rows of each column, for DIST's correlations between rows.

#pragma once

#include <algorithm>
#include <cmath>

#include "scalar_types.h"

namespace dmkd {

constexpr int64_t kGroup = 8;  // rows whose columns are added up together

// Sums of p, p^2, q - p, p (q - p) and (q - p)^2 of each column. Rows of a group are added up in
// the accumulated type, and groups in double. p and q - p are taken less an origin, a value of that
// column in the first group, so that the sums of nearly constant columns keep their digits.
template <typename compute_t, bool has_fma>
struct Columns {
  const int64_t n, padded;
  compute_t* const p;         // scratch of kGroup rows
  compute_t* const p_origin;  // scratch of one row
  compute_t* const change_origin;
  compute_t* change[kGroup];  // q - p of the rows of a group

  // The smallest values of the first group: one outlier must not become the origin.
  DMKD_INLINE void choose_origins(int64_t filled) {
    std::copy(p, p + n, p_origin);
    std::copy(change[0], change[0] + n, change_origin);
    for (int64_t k = 1; k < filled; ++k) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const compute_t x = p[k * padded + i], y = change[k][i];
        p_origin[i] = x < p_origin[i] ? x : p_origin[i];
        change_origin[i] = std::abs(y) < std::abs(change_origin[i]) ? y : change_origin[i];
      }
    }
  }

  // `filled`: rows of the group. The missing rows are taken at the origins, so they add nothing.
  DMKD_INLINE void add_group(int64_t filled, double* sums) {
    for (; filled < kGroup; ++filled) {
      change[filled] = change_origin;
      std::copy(p_origin, p_origin + n, p + filled * padded);
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      compute_t p_sum = 0, squares = 0, change_sum = 0, products = 0, change_squares = 0;
      for (int64_t k = 0; k < kGroup; ++k) {
        const compute_t x = p[k * padded + i] - p_origin[i], y = change[k][i] - change_origin[i];
        p_sum += x;
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
  }

  // From the sums of differences to those of p and q - p. `counted`: rows in them.
  DMKD_INLINE void leave_origins(int64_t counted, double* sums) const {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const double x = p_origin[i], y = change_origin[i], rows = double(counted);
      double* const at = sums + i;
      at[4 * n] += y * (2 * at[2 * n] + rows * y);
      at[3 * n] += x * at[2 * n] + y * (at[0] + rows * x);
      at[2 * n] += rows * y;
      at[n] += x * (2 * at[0] + rows * x);
      at[0] += rows * x;
    }
  }
};

}  // namespace dmkd
