// Weighted sum of the rows: phase 2 of combine and balance_.
//
// Math      out[p] = (out[p] if accumulate else 0) + sum_t weights[t] * rows[t, p];   partials of sum_p out[p]^2
// Traffic   fp32: reads 4T, writes 4 bytes a column; reads 4 more if accumulate or if out is not streamed. bf16:
//           half of it.
// Parallel  chunks of columns, in contiguous ranges; vectors, compiled per instruction set. kVectors vectors of sums
//           stay in registers while the loop goes down some rows, a chunk of them in cache until it has been down all.
// Sync      one parallel region.
// Numerics  products and sums round one by one in the state's compute type, in task order, then once to out's type: bit
//           for bit the reference. Squares are summed in kStepBytes of lanes, on every instruction set.
// Limits    rows and out must not overlap.
#include "weighted_sum.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace dbmtl_fused::cpu {
namespace {

// From so many bytes on, out goes past the caches: whoever reads it next would find little of it there, and memory is
// spared the reading of what is overwritten.
constexpr int64_t kStreamedSum = 16 << 20;

// Bytes of a row to prefetch ahead: rows are more streams than the processor follows on its own.
constexpr int kAhead = 256;

// Rows that are read side by side. More than kMostRows are too many streams for prefetching too: they are added by
// kRows, and sums wait in the first-level cache.
constexpr int64_t kMostRows = 12, kRows = 8;

// Vectors of sums: at least four are on their way at a time, and enough for a step of the squares.
template <class Real, int kLanes>
constexpr int kVectors = std::max(4, kStep<Real> / kLanes);

template <class Real, int kLanes>
struct Squares {
  static constexpr int kCount = kStep<Real> / kLanes;
  Vector<Real, kLanes> sums[kCount] = {};

  DBMTL_INLINE void add(const Vector<Real, kLanes> (&values)[kVectors<Real, kLanes>]) {
    for (int i = 0; i < kVectors<Real, kLanes>; ++i) sums[i % kCount] += values[i] * values[i];
  }
};

template <class State, class Out, bool kStream>
struct WeightedSumLoop {
  using Real = RealOf<State>;

  // Rows that are added to a block of columns at once.
  struct Group {
    const State* rows;
    int64_t stride;
    const Real* weights;
    int64_t count;
    bool first;  // what they are added to is not in the tile yet
    bool last;   // their sum is no longer for the tile
  };

  // One block of columns, of which only `rest` exist if it is not whole.
  template <int kLanes, bool kWhole>
  static DBMTL_INLINE void block(const Group& group, int64_t p, size_t rest, bool accumulate, Real* tile, Out* out,
                                 Squares<Real, kLanes>& squares) {
    constexpr int kVectors = cpu::kVectors<Real, kLanes>, kBlock = kVectors * kLanes;
    Vector<Real, kLanes> sums[kVectors] = {};
    Out padded_out[kBlock] = {};
    State padded_row[kBlock] = {};
    Out* const target = kWhole ? out + p : padded_out;
    if (!group.first) {
      std::memcpy(sums, tile + p, sizeof(sums));
    } else if (accumulate) {
      if constexpr (!kWhole) std::memcpy(padded_out, out + p, rest * sizeof(Out));
      for (int i = 0; i < kVectors; ++i) sums[i] = load<Real, kLanes>(target + i * kLanes);
    }
    for (int64_t t = 0; t < group.count; ++t) {
      const State* row = group.rows + t * group.stride + p;
      if constexpr (kWhole)
        prefetch<kAhead, kBlock * sizeof(State)>(row);
      else
        row = static_cast<const State*>(std::memcpy(padded_row, row, rest * sizeof(State)));
      for (int i = 0; i < kVectors; ++i) sums[i] += group.weights[t] * load<Real, kLanes>(row + i * kLanes);
    }
    if (!group.last) {
      std::memcpy(tile + p, sums, sizeof(sums));
      return;
    }
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (kStream && kWhole)
        stream<Real, kLanes>(target + i * kLanes, sums[i]);
      else
        store<Real, kLanes>(target + i * kLanes, sums[i]);
    }
    if constexpr (!kWhole) {
      std::memcpy(out + p, padded_out, rest * sizeof(Out));
      Real values[kBlock];  // the padding of an infinitely weighted row is NaN
      std::memcpy(values, sums, sizeof(values));
      std::fill(values + rest, values + kBlock, Real{0});
      std::memcpy(sums, values, sizeof(values));
    }
    squares.add(sums);
  }

  // Of at most kChunk columns; returns the squared norm of what goes to out.
  template <int kBytes>
  static DBMTL_INLINE Real run(const State* rows, int64_t stride, const Real* weights, int64_t T, int64_t count,
                               bool accumulate, Out* out) {
    constexpr int kLanes = kBytes / sizeof(Real);
    constexpr int kBlock = kVectors<Real, kLanes> * kLanes;
    static_assert(kChunk % kBlock == 0);
    const int64_t at_once = T <= kMostRows ? T : kRows;
    Squares<Real, kLanes> squares;
    alignas(kBytes) Real tile[kChunk];
    for (int64_t t = 0; t < T; t += at_once) {
      const Group group{rows + t * stride, stride, weights + t, std::min(at_once, T - t), t == 0, t + at_once >= T};
      int64_t p = 0;
      for (; p + kBlock <= count; p += kBlock) block<kLanes, true>(group, p, kBlock, accumulate, tile, out, squares);
      if (p < count) block<kLanes, false>(group, p, count - p, accumulate, tile, out, squares);
    }
    if constexpr (kStream) finish_streams();
    return sum_lanes<Real>(squares.sums);
  }
};

// `columns`: of all outs that are written in turn.
bool is_streamed(const void* out, DType dtype, int64_t columns, bool accumulate) {
  return !accumulate && columns * size_of(dtype) >= kStreamedSum && reinterpret_cast<uintptr_t>(out) % kStreamed == 0;
}

}  // namespace

template <class State>
void weighted_sum(const State* rows, int64_t stride, int64_t T, int64_t P, const RealOf<State>* weights,
                  bool accumulate, void* out, DType out_dtype, RealOf<State>* partials, Order order,
                  ParallelFor parallel_for) {
  with_element_type(out_dtype, [&](auto element) {
    using Out = decltype(element);
    const auto sum_chunks = [&](auto streamed) {
      parallel_for(ceil_div(P, kChunk), chunk_grain(T), [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < end - begin; ++i) {
          const int64_t c = order == Order::kForwards ? begin + i : end - 1 - i, start = c * kChunk;
          const auto sq_norm = run_widest<WeightedSumLoop<State, Out, streamed.value>>(
              rows + start, stride, weights, T, std::min(kChunk, P - start), accumulate,
              static_cast<Out*>(out) + start);
          if (partials != nullptr) partials[c] = sq_norm;
        }
      });
    };
    // Rows may be parts of longer ones, whose other parts go to outs of their own.
    if (is_streamed(out, out_dtype, std::max(P, T > 1 ? stride : 0), accumulate))
      sum_chunks(std::true_type{});
    else
      sum_chunks(std::false_type{});
  });
}

template void weighted_sum(const float*, int64_t, int64_t, int64_t, const float*, bool, void*, DType, float*, Order,
                           ParallelFor);
template void weighted_sum(const double*, int64_t, int64_t, int64_t, const double*, bool, void*, DType, double*, Order,
                           ParallelFor);
template void weighted_sum(const BFloat16*, int64_t, int64_t, int64_t, const float*, bool, void*, DType, float*, Order,
                           ParallelFor);

}  // namespace dbmtl_fused::cpu
