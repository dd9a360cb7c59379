// torch op accel_native::fp8_gemm: checks, allocation, threads. accel/ops/fp8/fp8_gemm.py is the only caller and the place
// where the op is defined.

#include <string>
#include <vector>

#include "cpu/_binding.h"
#include "params.h"

namespace accel::fp8_gemm {
namespace {

Kind kind_of(const Tensor& x, const std::string& format, const char* name) {
  if (format.empty()) return Kind(int(dtype_of(x, "fp8_gemm takes")));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Byte, name, " must be codes as uint8");
  STD_TORCH_CHECK(format == "e4m3" || format == "e5m2", "there is no format ", format);
  return format == "e4m3" ? Kind::e4m3 : Kind::e5m2;
}

ScalarType dtype_named(const std::string& name) {
  STD_TORCH_CHECK(name == "float32" || name == "bfloat16" || name == "float16", "fp8_gemm makes no ", name);
  return name == "float32" ? ScalarType::Float : name == "bfloat16" ? ScalarType::BFloat16 : ScalarType::Half;
}

int64_t count_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Whole blocks of scales, or parts of those.
std::vector<Chunk> chunks_of(int64_t depth, int64_t block) {
  std::vector<Chunk> chunks;
  for (int64_t scale = 0; scale * block < depth; ++scale)
    for (int64_t end = std::min(depth, (scale + 1) * block), at = scale * block; at < end; at += CHUNK)
      chunks.push_back({at, int(std::min(CHUNK, end - at)), scale});
  return chunks;
}

// Columns of a task: fewer where there would be too few tasks for many workers. By sizes alone, not by the workers there
// are: with AVX2 the last bits of a sum depend on where its tile ends.
int64_t columns_of_task(const Params& p) {
  const int64_t wide = p.row_blocks() * count_of(p.outputs, TASK_COLUMNS);
  return p.few() || wide < 16 ? LEAST_COLUMNS : TASK_COLUMNS;
}

Tensor multiply(Tensor a, Tensor b, OptionalTensor a_scale, Tensor b_scale, OptionalTensor bias, std::string a_format,
                std::string b_format, int64_t a_rows, int64_t b_rows, int64_t depth, bool b_turned, std::string out_dtype) {
  check_cpu(a, "a"), check_cpu(b, "b");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.numel() > 0 && b.numel() > 0, "a and b must be matrices, not empty");
  STD_TORCH_CHECK(a_rows > 0 && b_rows > 0 && depth > 0, "a block has at least one row and one column");
  STD_TORCH_CHECK(!b_format.empty() && a_format.empty() == !a_scale, "codes have a format and scales");
  Params p{};
  p.a_kind = kind_of(a, a_format, "a"), p.b_kind = kind_of(b, b_format, "b"), p.turned = b_turned;
  p.a = a.const_data_ptr(), p.b = b.const_data_ptr();
  p.rows = a.size(0), p.depth = a.size(1), p.outputs = b.size(b_turned ? 1 : 0);
  STD_TORCH_CHECK(b.size(b_turned ? 0 : 1) == p.depth, "a and b must have the same depth");
  p.a_rows = a_rows, p.b_rows = b_rows, p.scales = count_of(p.depth, depth);
  check_f32(a_scale, "a_scale", count_of(p.rows, a_rows) * p.scales);
  check_f32(b_scale, "b_scale", count_of(p.outputs, b_rows) * p.scales);
  check_f32(bias, "bias", p.outputs);
  p.a_scale = data_or_null(a_scale), p.b_scale = data_or_null(b_scale), p.bias = data_or_null(bias);
  Tensor out = torch::stable::new_empty(a, {p.rows, p.outputs}, dtype_named(out_dtype));
  p.out = out.mutable_data_ptr(), p.out_dtype = dtype_of(out, "fp8_gemm makes");
  const std::vector<Chunk> chunks = chunks_of(p.depth, depth);
  p.chunks = chunks.data(), p.count = int64_t(chunks.size());
  p.task_columns = columns_of_task(p);
  const bool packed = p.packed();
  const int64_t together = packed ? std::min(p.row_blocks(), PACKED_BLOCKS) : p.row_blocks();
  const int64_t words = packed ? together * p.count * ACCEL_LEVEL(fp8::panel_words)(p) : 0;
  Tensor panels = torch::stable::new_empty(a, {words}, ScalarType::Float);
  if (packed) p.panels = static_cast<float*>(panels.mutable_data_ptr());
  const auto pack = ACCEL_LEVEL(fp8::pack);
  const auto run = ACCEL_LEVEL(fp8::multiply);
  for (p.from_block = 0; p.from_block < p.row_blocks(); p.from_block = p.end_block) {
    p.end_block = std::min(p.row_blocks(), p.from_block + together);
    if (packed)
      torch::stable::parallel_for(0, p.blocks() * p.count, 4, [&](int64_t from, int64_t to) { pack(p, from, to); });
    std::atomic<int64_t> next{0};
    p.next = &next;
    const int64_t workers = std::min<int64_t>(p.tasks(), torch::stable::get_num_threads());
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) { run(p); });
  }
  return out;
}

}  // namespace
}  // namespace accel::fp8_gemm

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def(
      "fp8_gemm(Tensor a, Tensor b, Tensor? a_scale, Tensor b_scale, Tensor? bias, str a_format, str b_format, int a_rows, "
      "int b_rows, int depth, bool b_turned, str out_dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) { m.impl("fp8_gemm", TORCH_BOX(&accel::fp8_gemm::multiply)); }
