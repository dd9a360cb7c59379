// Choices sorted by expert: a stable counting sort in runs of choices. The result does not depend on how many there are,
// nor on the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"

namespace accel::moe {

namespace planning {

constexpr int64_t RUN = 1 << 14, MOST_RUNS = 16;

struct Sizes {
  int64_t choices, experts, capacity, align, rows;  // capacity −1: no limit
};

// Calls visit(run, from, to) for each run of choices.
template <typename Visit>
void each_run(int64_t choices, int64_t runs, const Visit& visit) {
  const auto some = [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; ++r) visit(r, choices * r / runs, choices * (r + 1) / runs);
  };
  if (runs == 1) return some(0, 1);
  torch::stable::parallel_for(0, runs, 1, some);
}

// An index outside of [0, experts) is of nobody. `offsets` has a place more than `counts`, one for each expert.
inline void sort(const int64_t* indices, const Sizes& s, int64_t* source, int64_t* destination, int64_t* counts,
                 int64_t* offsets) {
  const int64_t runs = std::clamp<int64_t>(s.choices / RUN, 1, MOST_RUNS);
  std::vector<int64_t> starts(size_t(runs * s.experts), 0);  // of each run: how many, then behind how many
  each_run(s.choices, runs, [&](int64_t r, int64_t from, int64_t to) {
    int64_t* mine = starts.data() + r * s.experts;
    for (int64_t i = from; i < to; ++i)
      if (indices[i] >= 0 && indices[i] < s.experts) ++mine[indices[i]];
  });
  int64_t end = 0;
  for (int64_t x = 0; x < s.experts; ++x) {
    int64_t total = 0;
    for (int64_t r = 0; r < runs; ++r) {
      const int64_t here = starts[size_t(r * s.experts + x)];
      starts[size_t(r * s.experts + x)] = total;
      total += here;
    }
    counts[x] = s.capacity < 0 ? total : std::min(total, s.capacity);
    offsets[x] = end;
    end += (counts[x] + s.align - 1) / s.align * s.align;
  }
  offsets[s.experts] = end;
  STD_TORCH_CHECK(end <= s.rows, "the plan needs ", end, " rows, and there are ", s.rows);
  std::fill(source, source + s.rows, int64_t(-1));
  each_run(s.choices, runs, [&](int64_t r, int64_t from, int64_t to) {
    int64_t* next = starts.data() + r * s.experts;
    for (int64_t i = from; i < to; ++i) {
      const int64_t x = indices[i];
      destination[i] = -1;
      if (x < 0 || x >= s.experts) continue;
      const int64_t place = next[x]++;
      if (place >= counts[x]) continue;
      destination[i] = offsets[x] + place;
      source[destination[i]] = i;
    }
  });
}

// A copy of the indices in which choices that are not among the `capacity` largest of their expert are of nobody.
inline std::vector<int64_t> drop_smallest(const int64_t* indices, const float* weights, const Sizes& s) {
  std::vector<int64_t> kept(indices, indices + s.choices), order(size_t(s.choices)), places(size_t(s.choices));
  std::vector<int64_t> counts(size_t(s.experts)), offsets(size_t(s.experts + 1));
  sort(indices, {s.choices, s.experts, -1, 1, s.choices}, order.data(), places.data(), counts.data(), offsets.data());
  const auto before = [&](int64_t a, int64_t b) {
    const float x = weights[a], y = weights[b];
    if (x > y || y > x) return x > y;
    const bool nan_x = x != x, nan_y = y != y;
    return nan_x != nan_y ? nan_y : a < b;
  };
  torch::stable::parallel_for(0, s.experts, 1, [&](int64_t from, int64_t to) {
    for (int64_t x = from; x < to; ++x) {
      if (counts[size_t(x)] <= s.capacity) continue;
      const auto first = order.begin() + offsets[size_t(x)], end = first + counts[size_t(x)];
      std::nth_element(first, first + s.capacity, end, before);
      for (auto i = first + s.capacity; i < end; ++i) kept[size_t(*i)] = -1;
    }
  });
  return kept;
}

}  // namespace planning

}  // namespace accel::moe
