// No bug: the words that kernels use, each with a result that the test knows.
#include "planted.h"

namespace {

// out[i] for i < 65536: the number with these bits in bfloat16, as a float; then the same for half.
__global__ void widen(Planted p) {
  int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  unsigned pair = unsigned(i) | unsigned(i) << 16;
  p.out[i] = __float_as_int(__bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&pair)).y);
  p.out[i + p.n / 2] = __float_as_int(__half22float2(*reinterpret_cast<__half2*>(&pair)).x);
}

// in: floats; out: bfloat16 in the low half, half precision in the high half.
__global__ void narrow(Planted p) {
  int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= p.n) return;
  float x = __int_as_float(p.in[i]);
  __nv_bfloat162 b = __floats2bfloat162_rn(x, x);
  __half2 h = __floats2half2_rn(x, x);
  p.out[i] = int((*reinterpret_cast<unsigned*>(&b) & 0xffff) | (*reinterpret_cast<unsigned*>(&h) & 0xffff0000));
}

// One warp, in: 32 numbers; out: a row of 32 for each word.
__global__ void warp_words(Planted p) {
  int lane = int(threadIdx.x), x = p.in[lane], row = 0;
  auto put = [&](int value) { p.out[32 * row++ + lane] = value; };
  put(__shfl_sync(~0u, x, lane + 3, 8));
  put(__shfl_xor_sync(~0u, x, 5));
  put(__shfl_xor_sync(~0u, x, 16, 16));
  put(__shfl_down_sync(~0u, x, 3, 16));
  put(__shfl_up_sync(~0u, x, 3, 16));
  put(int(__ballot_sync(~0u, x & 1)));
  put(__any_sync(~0u, x > 1000));
  put(__all_sync(~0u, x >= 0));
  put(int(__match_any_sync(~0u, x & 3)));
  put(__popc(unsigned(x)));
  put(__ffs(x));
  put(__clz(x));
  if (lane < 16)
    put(int(__ballot_sync(0x0000ffffu, x & 1)));
  else
    put(int(__ballot_sync(0xffff0000u, x & 1)));
}

// A block of 2 × 3 × 20 threads in a grid of 2 × 2: out[k] for each block begins at 128·block.
__global__ void block_words(Planted p) {
  int i = int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
  int* out = p.out + 128 * (blockIdx.x + gridDim.x * blockIdx.y);
  int low = __syncthreads_count(i < 50), any = __syncthreads_or(i == 119), all = __syncthreads_and(i != 119);
  if (i < 32) out[i] = low + 1000 * any + 10000 * all;
  if (i == 0) {
    atomicMax(&out[32], 7);
    atomicMin(&out[33], 7);
    out[34] = atomicExch(&out[35], 9);
    out[36] = atomicCAS(&out[35], 9, 11);
  }
}

}  // namespace

extern "C" int planted_widen(const Planted* p, void* stream) {
  return accel::launch(widen, dim3(256), dim3(256), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_narrow(const Planted* p, void* stream) {
  return accel::launch(narrow, dim3(unsigned(p->n + 127) / 128), dim3(128), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_warp_words(const Planted* p, void* stream) {
  return accel::launch(warp_words, dim3(1), dim3(32), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_block_words(const Planted* p, void* stream) {
  return accel::launch(block_words, dim3(2, 2), dim3(2, 3, 20), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_no_such_launch(const Planted* p, void* stream) {
  return accel::launch(widen, dim3(0), dim3(256), 0, cudaStream_t(stream), *p);
}
