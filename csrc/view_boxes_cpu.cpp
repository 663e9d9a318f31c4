// A view's crop and flip from (seed, image id, use): Philox4x32-10, then integers, one square root
// and products in double, all rounded the same on every device. Words 0 and 1 are the first try, 2
// to 4 position and flip, 6 and 7 the second try, and so on. Definition:
// dmkd_fast/views/reference.py.

#include "view_boxes_cpu.h"

#include <algorithm>
#include <cmath>

namespace dmkd {
namespace {

constexpr uint32_t kStream = 1u << 24;  // noise.STREAM_VIEWS
// 2^f for f in [0, 1), both in fixed point; lowest degree first; relative error 2.1e-7.
constexpr int64_t kExp2[6] = {1073741824, 744261544, 257920167, 59763036, 9874991, 1921638};

struct Words {
  uint64_t seed, id;
  uint32_t use;
  uint32_t block = ~0u;
  uint32_t words[4] = {};

  // The top 24 bits of word `i`.
  int64_t top(uint32_t i) {
    if (i / 4 != block) {
      block = i / 4;
      uint32_t c[4] = {static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32), use | kStream,
                       block};
      auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
      for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const uint64_t p0 = static_cast<uint64_t>(c[0]) * 0xD2511F53u;
        const uint64_t p1 = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
        c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
        c[1] = static_cast<uint32_t>(p1);
        c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
        c[3] = static_cast<uint32_t>(p0);
      }
      std::copy(c, c + 4, words);
    }
    return words[i % 4] >> 8;
  }

  float uniform(uint32_t i) { return (static_cast<float>(top(i)) + 0.5f) * 0x1p-24f; }
};

// root * 2^(power - 12), power in 2^-24, rounded to an integer.
int64_t side(double root, int64_t power) {
  const int64_t fraction = power & 0xffffff;
  int64_t factor = kExp2[5];
  for (int i = 4; i >= 0; --i) factor = kExp2[i] + ((factor * fraction) >> 24);
  factor <<= (power >> 24) + 8;
  return static_cast<int64_t>(std::floor(root * static_cast<double>(factor) * 0x1p-50 + 0.5));
}

int64_t position(float uniform, int64_t room, int64_t pad) {
  const auto place = static_cast<int64_t>(std::floor(uniform * static_cast<float>(room + 1)));
  return std::min(place, room) - pad;  // a uniform number may round to 1
}

}  // namespace

void view_box(const BoxRecipe& r, uint64_t seed, uint64_t id, uint32_t use, int32_t* box,
              bool* flip) {
  Words words{seed, id, use};
  int64_t height = r.spare_height, width = r.spare_width;
  bool fits = r.tries == 0;
  for (int64_t i = 0; i < r.tries && !fits; ++i) {
    const auto first = static_cast<uint32_t>(i == 0 ? 0 : 4 + 2 * i);
    const int64_t share = r.area_low + (((r.area_high - r.area_low) * words.top(first)) >> 24);
    const int64_t shape =
        r.shape_low + (((r.shape_high - r.shape_low) * words.top(first + 1)) >> 24);
    const double root = std::sqrt(static_cast<double>(r.height * r.width * share));
    const int64_t rows = side(root, -shape), columns = side(root, shape);
    fits = rows > 0 && rows <= r.height && columns > 0 && columns <= r.width;
    if (fits) {
      height = rows;
      width = columns;
    }
  }
  const int64_t down = r.height + 2 * r.pad - height, right = r.width + 2 * r.pad - width;
  box[0] = static_cast<int32_t>(fits ? position(words.uniform(2), down, r.pad) : down / 2 - r.pad);
  box[1] =
      static_cast<int32_t>(fits ? position(words.uniform(3), right, r.pad) : right / 2 - r.pad);
  box[2] = static_cast<int32_t>(height);
  box[3] = static_cast<int32_t>(width);
  *flip = words.uniform(4) < r.flip;
}

}  // namespace dmkd
