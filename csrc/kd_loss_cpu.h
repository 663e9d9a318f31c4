// The row kernel's interface: plain pointers, so that it needs nothing of PyTorch.

#pragma once

#include <cstdint>

namespace dmkd {

enum class ScalarKind { kFloat, kDouble, kHalf, kBFloat16 };

struct KdArguments {
  const void* student;      // (B, C) in `dtype`; rows `student_stride` elements apart
  const void* teacher;      // (B, C) in `dtype`; rows `teacher_stride` elements apart
  void* loss;               // (B,) float, or double for kDouble; null if not wanted
  void* grad;               // (B, C) in `dtype`, contiguous; null if not wanted
  const void* row_grad;     // gradient of the result by each row's loss, in the loss's type
  int64_t row_grad_stride;  // 0 for one value for all rows
  int64_t classes;
  int64_t student_stride;
  int64_t teacher_stride;
  double temperature;
  ScalarKind dtype;
};

// Computes rows [begin, end).
void kd_loss_rows(const KdArguments& arguments, int64_t begin, int64_t end);

// "avx512", "avx2" or "scalar": what this machine runs.
const char* kd_loss_instruction_set();

}  // namespace dmkd
