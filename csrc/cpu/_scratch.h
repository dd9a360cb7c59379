// Memory of one worker, and constants of a softmax kept in powers of two.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>

namespace accel::ACCEL_ISA {

constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LN_2 = 0.69314718055994530942f;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Whether scratch begins as NaN, which the tests ask for: what is read before it was written shows then, always.
inline bool scratch_begins_as_nan() {
  static const bool wanted = std::getenv("ACCEL_NAN_SCRATCH") != nullptr;
  return wanted;
}

// Cache-line aligned scratch of one worker.
class Buffer {
 public:
  explicit Buffer(int64_t floats)
      : size_(floats), data_(static_cast<float*>(std::aligned_alloc(64, size_t(round_up(floats + 1, 16)) * sizeof(float)))) {
    if (!data_) throw std::bad_alloc();
    if (scratch_begins_as_nan()) std::fill_n(data_, size_, std::numeric_limits<float>::quiet_NaN());
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  operator float*() const { return data_; }
  float* data() const { return data_; }
  float* end() const { return data_ + size_; }

 private:
  int64_t size_;
  float* data_;
};

}  // namespace accel::ACCEL_ISA
