// Where each view is cut from its image: the interface, and what it shares with reference.py.

#pragma once

#include <cstdint>

namespace dmkd {

struct BoxRecipe {
  int64_t height, width, pad;         // of the images, and their black border
  int64_t area_low, area_high;        // share of the image's area, in 2^-24
  int64_t shape_low, shape_high;      // log2(width / height) / 2, in 2^-24, within [-8, 8)
  int64_t spare_height, spare_width;  // of the crop when no try fits
  int64_t tries;                      // 0: the spare crop always, anywhere; else in the middle
  float flip;                         // probability
};

// The crop (top, left, height, width) and flip of image `id` used for the `use`-th time.
void view_box(const BoxRecipe& recipe, uint64_t seed, uint64_t id, uint32_t use, int32_t* box,
              bool* flip);

}  // namespace dmkd
