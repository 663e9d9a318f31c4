// The row kernel's interface: plain pointers, so that it needs nothing of PyTorch.

#pragma once

#include <cstdint>

namespace dmkd {

enum class ScalarKind { kFloat, kDouble, kHalf, kBFloat16 };

enum class Divergence {  // numbered as in dmkd_fast/loss/divergences.py
  kForwardKl,
  kReverseKl,
  kJsd,
  kAlphaBeta,
  kTotalVariation,
  kDkd,
  kDist,
};

struct Term {  // one of the divergences whose weighted sum is the KD term
  Divergence kind;
  double weight;
  double first;  // its parameters
  double second;
};

constexpr int kMaxTerms = 2;

// For kDist, by column over all rows: p, p^2, q - p, p (q - p), (q - p)^2.
constexpr int64_t kColumnSums = 5;

// What is kept of a row so that its gradient can be computed later in one sweep: maximum and sum of
// exponentials of student and teacher at temperature T, what every log p - log q has in common, the
// student's sum at T = 1, the target's, and what is lost in rounding the first two sums.
constexpr int64_t kStats = 9;

// What the pass over the columns keeps of a row: `kStats`, and the four sums of a `Correlation`.
constexpr int64_t kKept = kStats + 4;

struct Matrix {  // (B, C), any strides, any of the dtypes
  void* data;    // null: not there
  ScalarKind dtype;
  int64_t row_stride;
  int64_t class_stride;
};

// "Accumulated type" below is double if student or teacher is, and float otherwise.
struct KdArguments {
  Matrix student;
  Matrix teacher;
  Matrix probabilities;    // target as probabilities, or
  const int64_t* classes;  // target as class ids (B,); at most one of the two is there
  int64_t classes_stride;
  bool has_ce;         // whether class ids are for the cross-entropy too, not for kDkd alone
  const void* weight;  // (B,) accumulated type: factor on a row, 0 skips it; null: 1
  int64_t weight_stride;
  const void* upstream;  // accumulated type: gradient by each row's loss; null: 1
  int64_t upstream_stride;
  const void* temperatures;  // (B, 2) accumulated type: a row's temperature and the factor on its
                             // KD term; null: `temperature` and 1
  int64_t temperatures_stride;
  int64_t temperatures_class_stride;
  Term terms[kMaxTerms];
  int64_t num_terms;      // 0: forward KL alone
  bool standardize;       // logits to mean 0 and standard deviation 1 by row
  const void* columns;    // for kDist: (4, C) accumulated type: factors of p and q - p in the
                          // gradient by a column's correlation, and their means
  double columns_loss;    // for kDist: mean of 1 - correlation over the columns
  double columns_weight;  // for kDist: sum of the factors of all rows' KD terms
  // For kDist alone: (B, kKept) accumulated type, of rows whose q - p lies in `gradient`. Null:
  // nothing is kept between the two passes.
  void* kept;
  void* losses;     // (2, B) accumulated type: weight * KL and weight * CE; null: gradient only
  void* stats;      // (B, kStats) accumulated type: written with losses, else read
  Matrix gradient;  // null: loss only; classes dense
  int64_t num_rows;
  int64_t num_classes;
  double temperature;
  double kl_gradient;  // factors of the two gradients, temperature's 1 / T not included
  double ce_gradient;
  double label_smoothing;
  bool is_double;
};

// Computes rows [begin, end). Returns the first row whose class id is out of range, or -1.
int64_t kd_loss_rows(const KdArguments& arguments, int64_t begin, int64_t end);

// For kDist: adds up the columns of the rows [begin, end) into `sums` (kColumnSums, C) and returns
// the number of rows that count.
int64_t kd_loss_column_sums(const KdArguments& arguments, int64_t begin, int64_t end, double* sums);

// From the sums over all rows to `KdArguments.columns`; returns `columns_loss`.
double kd_loss_columns(const double* sums, int64_t num_classes, int64_t num_rows, bool is_double,
                       void* columns);

}  // namespace dmkd
