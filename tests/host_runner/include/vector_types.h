// CUDA's small vectors with CUDA's alignment: a 16-byte access must be aligned here too.
#pragma once

#define HOST_RUNNER_VECTORS(name, scalar)                                                   \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };                              \
  struct name##3 { scalar x, y, z; };                                                       \
  struct alignas(sizeof(scalar) > 4 ? 16 : 4 * sizeof(scalar)) name##4 { scalar x, y, z, w; }; \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                      \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }         \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

HOST_RUNNER_VECTORS(char, signed char)
HOST_RUNNER_VECTORS(uchar, unsigned char)
HOST_RUNNER_VECTORS(short, short)
HOST_RUNNER_VECTORS(ushort, unsigned short)
HOST_RUNNER_VECTORS(int, int)
HOST_RUNNER_VECTORS(uint, unsigned)
HOST_RUNNER_VECTORS(longlong, long long)
HOST_RUNNER_VECTORS(ulonglong, unsigned long long)
HOST_RUNNER_VECTORS(float, float)
HOST_RUNNER_VECTORS(double, double)

#undef HOST_RUNNER_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
