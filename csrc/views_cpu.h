// The views kernel's interface: plain pointers, so that it needs nothing of PyTorch.

#pragma once

#include <cstdint>

namespace dmkd {

enum class ViewDtype { kFloat, kHalf, kBFloat16 };

struct ViewsArguments {
  const uint8_t* slots;  // (N, c, H, W); each slot dense
  int64_t slot_stride;   // bytes from one slot to the next
  int64_t num_slots, channels, height, width;
  const int64_t* indices;  // (B,)
  const int32_t* boxes;    // (B, 4): top, left, height, width
  const uint8_t* flips;    // (B,)
  const float* mean;       // (c,) of pixel values in [0, 1]
  const float* std;        // (c,)
  void* out;               // (B, S, S, c), dense
  ViewDtype dtype;
  int64_t size;  // S
  int64_t pad;
};

// Whether row `row` reads an existing slot, and inside the image and its border.
bool is_slot(const ViewsArguments& arguments, int64_t row);
bool is_inside(const ViewsArguments& arguments, int64_t row);

// Renders rows [begin, end), which must have passed both checks.
void view_rows(const ViewsArguments& arguments, int64_t begin, int64_t end);

}  // namespace dmkd
