// torch op accel_native::fp8_quantize: checks, allocation, threads. accel/ops/fp8/fp8_quantize.py is the only caller and the
// place where the op is defined.

#include <string>
#include <tuple>
#include <vector>

#include "cpu/_binding.h"
#include "params.h"

namespace accel::fp8_quantize {
namespace {

constexpr int64_t GRAIN = 1 << 14;  // elements that are worth waking a thread for

template <typename F>
void in_parallel(int64_t count, int64_t elements, F f) {
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(elements, 1));
  if (count <= grain) return f(0, count);
  torch::stable::parallel_for(0, count, grain, f);
}

void run(const Params& p) {
  if (p.pieces() == 1) {
    const auto quantize = ACCEL_LEVEL(fp8::quantize);
    return in_parallel(p.batch * p.bands(), p.rows * p.width, [&](int64_t from, int64_t to) { quantize(p, from, to); });
  }
  const int64_t bands = p.batch * p.bands(), pieces = bands * p.pieces(), each = p.piece() * p.width;
  std::vector<float> largest(size_t(pieces * p.across())), factors(size_t(bands * p.across()));
  const auto measure = ACCEL_LEVEL(fp8::measure);
  in_parallel(pieces, each, [&](int64_t from, int64_t to) { measure(p, largest.data(), from, to); });
  ACCEL_LEVEL(fp8::settle)(p, largest.data(), factors.data());
  const auto encode = ACCEL_LEVEL(fp8::encode_pieces);
  in_parallel(pieces, each, [&](int64_t from, int64_t to) { encode(p, factors.data(), from, to); });
}

Format format_of(const std::string& name) {
  STD_TORCH_CHECK(name == "e4m3" || name == "e5m2", "there is no format ", name);
  return name == "e4m3" ? Format::e4m3 : Format::e5m2;
}

ScaleFormat scale_format_of(const std::string& name) {
  STD_TORCH_CHECK(name == "fp32" || name == "pow2" || name == "e8m0", "there is no format of scales ", name);
  return name == "fp32" ? ScaleFormat::fp32 : name == "pow2" ? ScaleFormat::pow2 : ScaleFormat::e8m0;
}

// Codes and scales of x or, `turned`, of xᵀ, in blocks of `rows` and `cols` of that.
std::tuple<Tensor, Tensor> make(const Tensor& x, int64_t rows, int64_t cols, Params p, bool turned) {
  if (turned) std::swap(rows, cols);
  p.turned = turned, p.rows = rows ? std::min(rows, p.height) : p.height, p.cols = cols ? std::min(cols, p.width) : p.width;
  const int64_t height = turned ? p.width : p.height, width = turned ? p.height : p.width;
  const int64_t down = turned ? p.across() : p.bands(), across = turned ? p.bands() : p.across();
  Tensor codes = torch::stable::new_empty(x, {p.batch, height, width}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(x, {p.batch, down, across},
                                           p.scale_format == ScaleFormat::e8m0 ? ScalarType::Byte : ScalarType::Float);
  p.codes = static_cast<uint8_t*>(codes.mutable_data_ptr()), p.scales = scales.mutable_data_ptr();
  run(p);
  return {codes, scales};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(Tensor x, int64_t rows, int64_t cols, std::string format,
                                                    std::string scale_format, bool transpose) {
  check_cpu(x, "x");
  STD_TORCH_CHECK(x.dim() == 3 && x.numel() > 0, "x must be (B, R, C) and not empty");
  STD_TORCH_CHECK(rows >= 0 && cols >= 0, "a block of ", rows, " x ", cols);
  Params p{};
  p.x = x.const_data_ptr(), p.batch = x.size(0), p.height = x.size(1), p.width = x.size(2);
  p.dtype = dtype_of(x, "fp8_quantize takes");
  p.format = format_of(format), p.scale_format = scale_format_of(scale_format);
  auto [codes, scales] = make(x, rows, cols, p, false);
  if (transpose) {
    auto [turned, turned_scales] = make(x, rows, cols, p, true);
    return {codes, scales, turned, turned_scales};
  }
  return {codes, scales, torch::stable::new_empty(codes, {0}), torch::stable::new_empty(scales, {0})};
}

}  // namespace
}  // namespace accel::fp8_quantize

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def(
      "fp8_quantize(Tensor x, int rows, int cols, str format, str scale_format, bool transpose) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) { m.impl("fp8_quantize", TORCH_BOX(&accel::fp8_quantize::quantize)); }
