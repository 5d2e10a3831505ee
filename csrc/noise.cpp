// The CPU launchers of `noise` and of plain random numbers.
#include "noise.h"

#include "loop.h"

namespace dpm {
namespace DPM_ISA {
namespace {

// Elements of an event: with more, lanes are used well by one example.
constexpr int64_t kMostPacked = 16;

DPM_INLINE uint32_t group_of_piece(int64_t piece) {
  return static_cast<uint32_t>(piece * (Extent::kPiece / 4));
}

// visit(n, piece, numbers) for every piece of every example and its random numbers, of which 16
// beyond the last may be read.
template <class Random, class Visit>
DPM_INLINE void for_random(const Extent& extent, const NoiseSource& source, int num_threads,
                           Visit visit) {
  using Element = typename Random::Element;
  const int64_t num_elements = extent.num_elements();
  if (num_elements > kMostPacked) {
    return for_pieces(extent, num_threads, [&](int64_t n, int64_t piece) {
      Element numbers[Extent::kPiece + 16];
      const int64_t count = smaller(Extent::kPiece, num_elements - piece * Extent::kPiece);
      fill_blocks<Random>(example_noise(source, n), group_of_piece(piece), count, numbers);
      visit(n, piece, numbers);
    });
  }
  const int num_groups = static_cast<int>((num_elements + 3) / 4);
  const int64_t num_packed = ManyExamples::kLanes / num_groups;
  const Extent packs{(extent.N + num_packed - 1) / num_packed, 1, num_packed * num_elements};
  for_pieces(packs, num_threads, [&](int64_t pack, int64_t) {
    const int64_t first = pack * num_packed, end = smaller(first + num_packed, extent.N);
    Element numbers[4 * ManyExamples::kLanes + 16];
    fill_blocks<Random>(ManyExamples(source, first, end, num_groups), numbers);
    for (int64_t n = first; n < end; ++n) visit(n, 0, numbers + (n - first) * 4 * num_groups);
  });
}

template <class Storage>
void run(const NoiseArgs& args, int num_threads) {
  using T = VectorOf<Storage>;
  const auto* rows = static_cast<const NoiseRow<ScalarOf<Storage>>*>(args.coefficients);
  const bool is_run = dpm::is_run({args.x_0, args.x_t});
  const auto visit = [&](int64_t n, int64_t piece, const float* eps) {
    for_elements<T>(args.extent, is_run, n, piece, [&](const auto& e) {
      const T x_0 = load<Storage>(args.x_0, args.dtype, e);
      const T noise = lanes_as<T>(eps + e.index);
      store<Storage>(args.x_t, args.dtype, e, noised(rows[n], x_0, noise));
    });
  };
  for_random<Normals>(args.extent, args.source, num_threads, visit);
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
  const auto visit = [&](int64_t n, int64_t piece, const float* eps) {
    Sum<T> signal, spread;
    for_elements<T>(args.extent, is_run, n, piece, [&](const auto& e) {
      const T gradient = load<Storage>(args.grad_x_t, args.dtype, e);
      store<Storage>(args.grad_x_0, args.dtype, e, gradient * rows[n].signal);
      signal.add(gradient * load<Storage>(args.x_0, args.dtype, e), e.count);
      spread.add(gradient * lanes_as<T>(eps + e.index), e.count);
    });
    sums[(n * num_pieces + piece) * kNoiseSums] = signal.total();
    sums[(n * num_pieces + piece) * kNoiseSums + 1] = spread.total();
  };
  for_random<Normals>(args.extent, args.source, num_threads, visit);
  if (num_pieces == 1) return;
  for (int64_t n = 0; n < args.extent.N; ++n) {
    for (int k = 0; k < kNoiseSums; ++k) noise_write_pieces(args, n, k);
  }
}

// `count` numbers as another type.
template <class From>
DPM_INLINE void convert_to(DType dtype, void* out, int64_t offset, const From* x, int64_t count) {
  if constexpr (std::is_same_v<From, uint32_t>) {
    for (int64_t i = 0; i < count; ++i) static_cast<int64_t*>(out)[offset + i] = x[i];
  } else if (dtype == DType::float64) {
    for (int64_t i = 0; i < count; ++i) static_cast<double*>(out)[offset + i] = x[i];
  } else {
    const Strided tensor{out, 0, 0, 1};
    for (int64_t i = 0; i < count; i += 16) {
      const int lanes = static_cast<int>(smaller(16, count - i));
      const Elements<false> e{0, 0, offset + i, lanes, 0};
      store<Stored>(tensor, dtype, e, load<f32x16>(x + i));
    }
  }
}

template <class Random>
void run_fill(const FillArgs& args, int num_threads) {
  using Element = typename Random::Element;
  const Extent extent{args.N, 1, args.num_elements};
  const auto offset = [&](int64_t n, int64_t piece) {
    return n * args.num_elements + piece * Extent::kPiece;
  };
  const auto count = [&](int64_t piece) {
    return smaller(Extent::kPiece, args.num_elements - piece * Extent::kPiece);
  };
  if (std::is_same_v<Element, float> && args.dtype == DType::float32 &&
      args.num_elements > kMostPacked) {
    return for_pieces(extent, num_threads, [&](int64_t n, int64_t piece) {
      Element* out = static_cast<Element*>(args.out) + offset(n, piece);
      dpm::fill<Random>(example_noise(args.source, n), group_of_piece(piece), count(piece), out);
    });
  }
  for_random<Random>(extent, args.source, num_threads,
                     [&](int64_t n, int64_t piece, const Element* numbers) {
                       convert_to(args.dtype, args.out, offset(n, piece), numbers, count(piece));
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
  switch (args.random) {
    case RandomKind::words: return run_fill<RandomWords>(args, num_threads);
    case RandomKind::uniforms: return run_fill<Uniforms>(args, num_threads);
    case RandomKind::normals: return run_fill<Normals>(args, num_threads);
  }
}

}  // namespace DPM_ISA
}  // namespace dpm
