// The row kernel's interface: plain pointers, so that it needs nothing of PyTorch.

#pragma once

#include <cstdint>

namespace dmkd {

enum class ScalarKind { kFloat, kDouble, kHalf, kBFloat16 };

// What is kept of a row so that its gradient can be computed later in one sweep: maximum and sum of
// exponentials of student and teacher at temperature T, what every log p - log q has in common, the
// student's sum at T = 1, and the target's.
constexpr int64_t kStats = 7;

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
  const void* weight;  // (B,) accumulated type: factor on a row, 0 skips it; null: 1
  int64_t weight_stride;
  const void* upstream;  // accumulated type: gradient by each row's loss; null: 1
  int64_t upstream_stride;
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

}  // namespace dmkd
