// Kernels that prove the host runner: some are right, some wrong in a known way.
#pragma once

#include <cstdint>

namespace proof {

// out[block] = sum of 256 elements; `barriers` = false leaves out every __syncthreads.
void block_sum(const float* x, float* out, int num_blocks, bool barriers);
// out = x, reversed within each block, through dynamic shared memory.
void reverse(const float* x, float* out, int num_blocks, int block, int64_t shared_bytes);
// out[0] = number of nonzero x by atomicAdd; then __syncthreads_count, _or and _and of x != 0.
void count(const int* x, int* out, int num_threads);
// out[thread] = its number as computed from threadIdx and blockIdx.
void number(int* out, int grid_x, int grid_y, int grid_z, int block_x, int block_y, int block_z);
// out[block] = out[block - 1] + 1, with nothing that orders the blocks.
void race_between_blocks(int* out, int num_blocks);
// out[thread] = num_barriers, by as many turns through shared memory.
void many_barriers(int* out, int num_blocks, int num_barriers);

// out (4, num_threads) = x of lane 3 of each `width` lanes, and of the lane 3 down, up, and xor.
template <class T>
void shuffle(const T* x, T* out, int num_threads, int width);
// out (3, 32): __ballot_sync, __any_sync, __all_sync of x[lane] != 0 within the lane's half warp.
void vote(const int* x, unsigned* out);
// out[lane] = x of the next lane, where lanes past `num_left` have exited.
void shuffle_from_exited(const float* x, float* out, int num_left);

// What must be an error; the names are those of the launches.
void fault(const char* name, float* out);
// out[thread] = shared memory that nobody wrote, out[64 + thread] = a sum that was never
// set to zero.
void uninitialized(float* out);

void to_half(const float* x, unsigned short* out, int64_t size);
void from_half(const unsigned short* x, float* out, int64_t size);
void to_bfloat16(const float* x, unsigned short* out, int64_t size);
void from_bfloat16(const unsigned short* x, float* out, int64_t size);
// out (kNumFunctions, size): arithmetic functions of x, in the order of numbers.cu.
constexpr int kNumFunctions = 10;
void functions(const float* x, float* out, int64_t size);
// out (kNumBitFunctions, size), likewise.
constexpr int kNumBitFunctions = 8;
void bit_functions(const unsigned* x, unsigned* out, int64_t size);

// d (16, 8) += a (16, k) b (k, 8) by one instruction: k is 16, of `bfloat16` or half, or 8, of tf32.
void multiply_halves(const unsigned short* a, const unsigned short* b, float* d, bool bfloat16);
void multiply_tf32(const float* a, const float* b, float* d);
// out (2, size): x as tf32, and as pairs of `bfloat16` or half and back.
void round_pairs(const float* x, float* out, int size, bool bfloat16);

int num_multiprocessors();

}  // namespace proof
