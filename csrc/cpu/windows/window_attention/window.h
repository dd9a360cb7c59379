// Where the tokens of a window lie on the map: roll, padding and partition are only addresses.
#pragma once

#include "params.h"

#include <stddef.h>

#include <vector>

namespace accel::ACCEL_ISA::window {

// Where the tokens of a window lie: the memory row of each, −1 for a padded one, and its mask region.
class Window {
 public:
  explicit Window(const Params& p) : p_(p), rows_(size_t(p.tokens)), labels_(size_t(p.tokens)) {
    for (int axis = 0; axis < 3; ++axis) axes_[axis].resize(size_t(p.window[axis]));
  }

  void move_to(int64_t index) {
    if (index == index_) return;
    index_ = index;
    const int64_t image = index / p_.windows, rest = index % p_.windows;
    place(0, rest / (p_.count[1] * p_.count[2]));
    place(1, rest / p_.count[2] % p_.count[1]);
    place(2, rest % p_.count[2]);
    size_t n = 0;
    masked_ = false;
    for (const Place& z : axes_[0])
      for (const Place& y : axes_[1]) {
        const int64_t line = ((image * p_.size[0] + z.at) * p_.size[1] + y.at) * p_.size[2];
        for (const Place& x : axes_[2]) {
          rows_[n] = z.at >= 0 && y.at >= 0 && x.at >= 0 ? line + x.at : -1;
          labels_[n] = z.region * 4 + y.region * 2 + x.region;
          masked_ |= labels_[n] != labels_[0];
          ++n;
        }
      }
  }

  int64_t row(int n) const { return rows_[size_t(n)]; }
  int label(int n) const { return labels_[size_t(n)]; }
  bool masked() const { return masked_; }

 private:
  struct Place {
    int64_t at;  // coordinate on the map, −1 for padding
    int region;
  };

  void place(int axis, int64_t window) {
    const int64_t shift = p_.shift[axis], size = p_.size[axis], padded = p_.padded[axis];
    int64_t rolled = window * p_.window[axis];
    for (Place& place : axes_[axis]) {
      place.region = shift > 0 && rolled >= padded - shift;
      if (p_.roll_first) {
        place.at = rolled < size ? (rolled + shift) % size : -1;
      } else {
        const int64_t at = (rolled + shift) % padded;
        place.at = at < size ? at : -1;
      }
      ++rolled;
    }
  }

  const Params& p_;
  int64_t index_ = -1;
  std::vector<Place> axes_[3];
  std::vector<int64_t> rows_;
  std::vector<int> labels_;
  bool masked_ = false;
};

}  // namespace accel::ACCEL_ISA::window
