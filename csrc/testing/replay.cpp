// Runs one launch function of a .cu file in a process of its own, so that a crash or a sanitizer's report is a result.
//
//   replay CALL RESULT SEED ASYNC
//
// CALL is text lines, then bytes:
//   function NAME             extern "C" int NAME(const void* params, void* stream)
//   params BYTES
//   buffer BYTES SHIFT        a block of exactly that size, SHIFT bytes past a multiple of 64
//   pointer OFFSET BUFFER     params holds the buffer's address there
//   end
// followed by params and the buffers. RESULT receives the buffers. Exit codes: 0, 2 bad call, 3 the launch failed.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include <dlfcn.h>

#include "runtime.h"

struct Buffer {
  size_t bytes, shift;
  char* block;
  char* data() const { return block + shift; }
};

static int refuse(const std::string& why) {
  fprintf(stderr, "replay: %s\n", why.c_str());
  return 2;
}

int main(int argc, char** argv) {
  if (argc != 5) return refuse("wants CALL RESULT SEED ASYNC");
  std::ifstream call(argv[1], std::ios::binary);
  std::string function;
  std::vector<char> params;
  std::vector<Buffer> buffers;
  std::vector<std::pair<size_t, size_t>> pointers;
  for (std::string line; std::getline(call, line) && line != "end";) {
    std::istringstream words(line);
    std::string word;
    size_t a = 0, b = 0;
    words >> word;
    if (word == "function") {
      words >> function;
    } else if (words >> a; word == "params") {
      params.resize(a);
    } else if (words >> b; word == "buffer") {
      void* block = nullptr;
      if (posix_memalign(&block, 64, a + b ? a + b : 1)) return refuse("has no memory for '" + line + "'");
      buffers.push_back({a, b, static_cast<char*>(block)});
    } else if (word == "pointer") {
      pointers.emplace_back(a, b);
    } else {
      return refuse("does not know '" + line + "'");
    }
  }
  call.read(params.data(), std::streamsize(params.size()));
  for (const Buffer& buffer : buffers) call.read(buffer.data(), std::streamsize(buffer.bytes));
  if (!call) return refuse("the call is shorter than it says");
  for (auto [offset, index] : pointers) {
    char* address = buffers.at(index).data();
    memcpy(params.data() + offset, &address, sizeof address);
  }
  auto run = reinterpret_cast<int (*)(const void*, void*)>(dlsym(RTLD_DEFAULT, function.c_str()));
  if (!run) return refuse("has no function " + function);

  accel_host_setup(strtoull(argv[3], nullptr, 10), atoi(argv[4]));
  int code = run(params.data(), nullptr);
  if (code) {
    fprintf(stderr, "%s returned %d: %s\n", function.c_str(), code, accel_host_error());
    return 3;
  }
  std::ofstream result(argv[2], std::ios::binary);
  for (const Buffer& buffer : buffers) result.write(buffer.data(), std::streamsize(buffer.bytes));
  return result.good() ? 0 : refuse("cannot write the result");
}
