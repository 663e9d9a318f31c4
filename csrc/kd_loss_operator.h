// What the direct call of the loss shares with its operators.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <vector>

namespace dmkd {

using torch::stable::Tensor;

// What all three operators take after their own arguments, in the order of the schema.
struct Problem {
  const Tensor& student;
  const Tensor& teacher;
  const std::optional<Tensor>& target;
  const std::optional<Tensor>& weight;
  double temperature, alpha, kd_scale, ce_scale, label_smoothing;
  const std::optional<Tensor>& temperatures;
  const std::vector<double>& divergences;
  bool standardize;

  bool is_double() const {
    constexpr auto kDouble = torch::headeronly::ScalarType::Double;
    return student.scalar_type() == kDouble || teacher.scalar_type() == kDouble;
  }
};

// The loss of all rows, what is kept of each, and the gradient by the student's logits (B, C).
std::array<Tensor, 3> loss_and_gradient(const Problem& problem);

// The factor of each row (B,): 0 unless it counts, else its weight by `num_items` or their number.
Tensor kd_loss_row_weights(const Tensor& student, const Tensor& teacher,
                           const std::optional<Tensor>& ids, const std::optional<Tensor>& mask,
                           const std::optional<Tensor>& row_weight,
                           const std::optional<Tensor>& num_items, int64_t ignore_index,
                           bool is_counted);

}  // namespace dmkd
