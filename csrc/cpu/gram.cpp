// gram: inner products of all pairs of rows.
//
// Math      out[s, t] = sum_p ema[s, p] * ema[t, p]
// Traffic   fp32: reads 4TP bytes; a chunk of all rows stays in the cache for its T^2 / 2 pairs.
// Parallel  slabs of kSlab chunks are dealt to the threads; two rows against two at a time, vectors, compiled per
//           instruction set.
// Sync      one parallel region.
// Numerics  products round on their own, sums of a chunk run in kStepBytes of lanes, those of chunks in double and in
//           order: bits depend neither on threads nor on the instruction set.
// Limits    out and ema must not overlap.
#include <algorithm>
#include <cstring>
#include <vector>

#include "launch.h"
#include "simd.h"

namespace dbmtl_fused::cpu {
namespace {

constexpr int64_t kSlab = 16;

// Rows that meet each other in one loop.
constexpr int kRows = 2;

template <class Real>
struct Products {
  Real of[kRows][kRows];
};

template <class State>
struct GramLoop {
  using Real = RealOf<State>;

  template <int kLanes>
  struct Running {
    static constexpr int kVectors = kStep<Real> / kLanes;
    Vector<Real, kLanes> sums[kRows][kRows][kVectors] = {};

    DBMTL_INLINE void add(const State* const (&left)[kRows], const State* const (&right)[kRows], int64_t p) {
      for (int i = 0; i < kVectors; ++i)
        for (int s = 0; s < kRows; ++s)
          for (int t = 0; t < kRows; ++t)
            sums[s][t][i] +=
                load<Real, kLanes>(left[s] + p + i * kLanes) * load<Real, kLanes>(right[t] + p + i * kLanes);
    }
  };

  // Rows left, left + 1 against right, right + 1; the last row stands in for those beyond.
  template <int kBytes>
  static DBMTL_INLINE Products<Real> run(const State* ema, int64_t stride, int64_t T, int64_t left, int64_t right,
                                         int64_t count) {
    const State* lefts[kRows];
    const State* rights[kRows];
    for (int i = 0; i < kRows; ++i) {
      lefts[i] = ema + std::min(left + i, T - 1) * stride;
      rights[i] = ema + std::min(right + i, T - 1) * stride;
    }
    Running<kBytes / sizeof(Real)> running;
    int64_t p = 0;
    for (; p + kStep<Real> <= count; p += kStep<Real>) running.add(lefts, rights, p);
    if (p < count) {  // the rest, padded with zeros
      State padded[2][kRows][kStep<Real>] = {};
      for (int i = 0; i < kRows; ++i) {
        std::memcpy(padded[0][i], lefts[i] + p, (count - p) * sizeof(State));
        std::memcpy(padded[1][i], rights[i] + p, (count - p) * sizeof(State));
        lefts[i] = padded[0][i];
        rights[i] = padded[1][i];
      }
      running.add(lefts, rights, 0);
    }
    Products<Real> products;
    for (int s = 0; s < kRows; ++s)
      for (int t = 0; t < kRows; ++t) products.of[s][t] = sum_lanes<Real>(running.sums[s][t]);
    return products;
  }
};

}  // namespace

template <class State>
void launch_gram(const Gram<State>& args, ParallelFor parallel_for) {
  const int64_t T = args.T, slab = kSlab * kChunk, slabs = ceil_div(args.P, slab);
  std::vector<double> partials(slabs * T * T);  // (slabs, T, T), of which the upper triangle is used

  parallel_for(slabs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t start = begin * slab; start < std::min(end * slab, args.P); start += kChunk) {
      double* const sums = partials.data() + start / slab * T * T;
      for (int64_t left = 0; left < T; left += kRows)
        for (int64_t right = left; right < T; right += kRows) {
          const auto products = run_widest<GramLoop<State>>(args.ema + start, args.ema_stride, T, left, right,
                                                            std::min(kChunk, args.P - start));
          for (int64_t s = left; s < std::min(left + kRows, T); ++s)
            for (int64_t t = right; t < std::min(right + kRows, T); ++t)
              sums[s * T + t] += products.of[s - left][t - right];
        }
    }
  });

  for (int64_t s = 0; s < T; ++s)
    for (int64_t t = s; t < T; ++t) {
      double sum = 0;
      for (int64_t i = 0; i < slabs; ++i) sum += partials[(i * T + s) * T + t];
      args.out[s * T + t] = args.out[t * T + s] = static_cast<RealOf<State>>(sum);
    }
}

template void launch_gram(const Gram<float>&, ParallelFor);
template void launch_gram(const Gram<double>&, ParallelFor);
template void launch_gram(const Gram<BFloat16>&, ParallelFor);

}  // namespace dbmtl_fused::cpu
