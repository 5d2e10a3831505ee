// Working memory of launchers: one allocation, from which pieces are handed out.
#pragma once

#include <cstdlib>
#include <new>

#include "common.h"

namespace dpm {
namespace DPM_ISA {

// Hands out pieces of a block of memory; without one it counts what is needed.
class Arena {
 public:
  DPM_INLINE explicit Arena(char* base) : base_(base) {}

  template <class T>
  DPM_INLINE T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * int64_t{sizeof(T)} + 63) / 64 * 64;
    return piece;
  }
  DPM_INLINE int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

class Memory64 {
 public:
  DPM_INLINE explicit Memory64(int64_t num_bytes)
      : data_(static_cast<char*>(std::aligned_alloc(64, num_bytes < 64 ? 64 : num_bytes))) {
    if (!data_) throw std::bad_alloc();
  }
  Memory64(const Memory64&) = delete;
  DPM_INLINE ~Memory64() { std::free(data_); }
  DPM_INLINE char* data() const { return data_; }

 private:
  char* data_;
};

}  // namespace DPM_ISA
}  // namespace dpm
