// What every function that XLA calls needs.

#pragma once

#include <string>
#include <vector>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jmemserve {

// Memory that a thread keeps for the next call.
inline float* scratch(int64_t floats) {
  thread_local std::vector<float> kept;
  if (int64_t(kept.size()) < floats + 16) kept.resize(floats + 16);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(kept.data()) + 63) / 64 * 64);
}

inline bool type_of(xla::ffi::DataType from, Type* to) {
  switch (from) {
    case xla::ffi::DataType::F32: *to = Type::kFloat32; return true;
    case xla::ffi::DataType::BF16: *to = Type::kBfloat16; return true;
    case xla::ffi::DataType::S8: *to = Type::kInt8; return true;
    default: return false;
  }
}

inline int64_t size_of(Type type) { return type == Type::kFloat32 ? 4 : type == Type::kBfloat16 ? 2 : 1; }

inline const char* at(const void* base, Type type, int64_t index) { return (const char*)base + index * size_of(type); }

inline xla::ffi::Error wrong(const std::string& what) { return xla::ffi::Error::InvalidArgument("jmemserve: " + what); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace jmemserve
