// The CPU launchers of `noise` and of plain random numbers.
#include "noise.h"

#include "lane_noise.h"
#include "loop.h"

namespace dpm {
namespace DPM_ISA {
namespace {

template <class Storage>
void run(const NoiseArgs& args, int num_threads) {
  using T = VectorOf<Storage>;
  const auto* rows = static_cast<const NoiseRow<ScalarOf<Storage>>*>(args.coefficients);
  const bool is_run = dpm::is_run({args.x_0, args.x_t});
  const auto visit = [&](int64_t n, int64_t piece, const auto& numbers) {
    const NoiseRow<ScalarOf<Storage>> row = rows[n];
    for_elements<T>(args.extent, is_run, n, piece, numbers, [&](const auto& e, const float* eps) {
      const T x_0 = load<Storage>(args.x_0, args.dtype, e);
      store<Storage>(args.x_t, args.dtype, e, noised(row, x_0, lanes_as<T>(eps)));
    });
  };
  for_random<Normals>(args.extent, args.source, true, num_threads, visit);
}

template <class Storage>
void run_gradient(const NoiseGradientArgs& args, int num_threads) {
  using T = VectorOf<Storage>;
  const auto* rows = static_cast<const NoiseRow<ScalarOf<Storage>>*>(args.coefficients);
  const bool is_run = dpm::is_run({args.grad_x_t, args.x_0, args.grad_x_0});
  if (!args.grad_coefficients) {
    return for_pieces(args.extent, num_threads, [&](int64_t n, int64_t piece) {
      for_elements<T>(args.extent, is_run, n, piece, [&](const auto& e) {
        const T gradient = load<Storage>(args.grad_x_t, args.dtype, e);
        store<Storage>(args.grad_x_0, args.dtype, e, gradient * rows[n].signal);
      });
    });
  }
  const int64_t num_pieces = args.extent.num_pieces();
  double* const sums = num_pieces > 1 ? args.pieces : args.grad_coefficients;
  const auto visit = [&](int64_t n, int64_t piece, const auto& numbers) {
    Sum<T> signal, spread;
    for_elements<T>(args.extent, is_run, n, piece, numbers, [&](const auto& e, const float* eps) {
      const T gradient = load<Storage>(args.grad_x_t, args.dtype, e);
      store<Storage>(args.grad_x_0, args.dtype, e, gradient * rows[n].signal);
      signal.add(gradient * load<Storage>(args.x_0, args.dtype, e), e.count);
      spread.add(gradient * lanes_as<T>(eps), e.count);
    });
    sums[(n * num_pieces + piece) * kNoiseSums] = signal.total();
    sums[(n * num_pieces + piece) * kNoiseSums + 1] = spread.total();
  };
  for_random<Normals>(args.extent, args.source, true, num_threads, visit);
  if (num_pieces == 1) return;
  for (int64_t n = 0; n < args.extent.N; ++n) {
    for (int k = 0; k < kNoiseSums; ++k) noise_write_pieces(args, n, k);
  }
}

// Events too small to fill the lanes: those of 16 examples side by side.
template <class Random>
void fill_small(const FillArgs& args, int num_threads) {
  const int64_t D = args.num_elements;
  const NoiseSource& source = args.source;
  for_pieces({(args.N + 15) / 16, 1, 16 * D}, num_threads, [&](int64_t block, int64_t) {
    const int64_t n = 16 * block;
    const int count = static_cast<int>(smaller(16, args.N - n));
    const LaneExamples examples(source.seed, source.example_ids + n, count);
    float lanes[kMostPacked * 16];
    fill_lanes<Random>(examples.at(source.stream, source.t + n, count), D, lanes);
    for (int64_t d = 0; d < D; ++d) {
      store16(static_cast<float*>(args.out) + n * D + d, load<f32x16>(lanes + 16 * d), D, count);
    }
  });
}

template <class Random, class Storage>
void run_fill(const FillArgs& args, int num_threads) {
  using Element = typename Random::Element;
  using T = VectorOf<Storage>;
  if constexpr (std::is_same_v<Storage, float> && !std::is_same_v<Random, RandomWords>) {
    if (args.num_elements <= kMostPacked) return fill_small<Random>(args, num_threads);
  }
  const Extent extent{args.N, 1, args.num_elements};
  const Strided out{args.out, args.num_elements, 0, 1};
  const auto write = [&](const auto& e, const Element* numbers) {
    if constexpr (std::is_same_v<Random, RandomWords>) {
      for (int i = 0; i < e.count; ++i) at<int64_t>(out, e)[i] = numbers[i];
    } else {
      store<Storage>(out, args.dtype, e, lanes_as<T>(numbers));
    }
  };
  for_random<Random>(extent, args.source, true, num_threads,
                     [&](int64_t n, int64_t piece, const auto& numbers) {
                       for_elements<T>(extent, true, n, piece, numbers, write);
                     });
}

}  // namespace

void noise(const NoiseArgs& args, int num_threads) {
  with_storage(args.dtype, args.dtype,
               [&](auto storage) { run<decltype(storage)>(args, num_threads); });
}

void noise_gradient(const NoiseGradientArgs& args, int num_threads) {
  with_storage(args.dtype, args.dtype,
               [&](auto storage) { run_gradient<decltype(storage)>(args, num_threads); });
}

void fill(const FillArgs& args, int num_threads) {
  with_storage(args.dtype, args.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    switch (args.random) {
      case RandomKind::words: return run_fill<RandomWords, Storage>(args, num_threads);
      case RandomKind::uniforms: return run_fill<Uniforms, Storage>(args, num_threads);
      case RandomKind::normals: return run_fill<Normals, Storage>(args, num_threads);
    }
  });
}

}  // namespace DPM_ISA
}  // namespace dpm
