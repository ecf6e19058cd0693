// Weighted sum of the rows: phase 2 of combine and balance_.
//
// Math      out[p] = (out[p] if accumulate else 0) + sum_t weights[t] * rows[t, p];   partials of sum_p out[p]^2
// Traffic   fp32: reads 4T, writes 4 bytes a column; reads 4 more if accumulate, or to write less than kStreamedSum.
// bf16:
//           half of it.
// Parallel  chunks of columns, in contiguous ranges; vectors, compiled per instruction set. kVectors vectors of sums
//           stay in registers while the loop goes down the rows.
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

// Bytes of a row to prefetch ahead: with many rows, more streams than the processor follows on its own.
constexpr int kAhead = 512;

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

  // One block of columns, of which only `rest` exist if it is not whole.
  template <int kLanes, bool kWhole>
  static DBMTL_INLINE void block(const State* rows, int64_t stride, const Real* weights, int64_t T, size_t rest,
                                 bool accumulate, Out* out, Squares<Real, kLanes>& squares) {
    constexpr int kVectors = cpu::kVectors<Real, kLanes>, kBlock = kVectors * kLanes;
    Vector<Real, kLanes> sums[kVectors] = {};
    Out padded_out[kBlock] = {};
    State padded_row[kBlock] = {};
    Out* const target = kWhole ? out : padded_out;
    if (accumulate) {
      if constexpr (!kWhole) std::memcpy(padded_out, out, rest * sizeof(Out));
      for (int i = 0; i < kVectors; ++i) sums[i] = load<Real, kLanes>(target + i * kLanes);
    }
    for (int64_t t = 0; t < T; ++t) {
      const State* row = rows + t * stride;
      if constexpr (kWhole)
        prefetch<kAhead, kBlock * sizeof(State)>(row);
      else
        row = static_cast<const State*>(std::memcpy(padded_row, row, rest * sizeof(State)));
      for (int i = 0; i < kVectors; ++i) sums[i] += weights[t] * load<Real, kLanes>(row + i * kLanes);
    }
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (kStream && kWhole)
        stream<Real, kLanes>(target + i * kLanes, sums[i]);
      else
        store<Real, kLanes>(target + i * kLanes, sums[i]);
    }
    if constexpr (!kWhole) {
      std::memcpy(out, padded_out, rest * sizeof(Out));
      Real values[kBlock];  // the padding of an infinitely weighted row is NaN
      std::memcpy(values, sums, sizeof(values));
      std::fill(values + rest, values + kBlock, Real{0});
      std::memcpy(sums, values, sizeof(values));
    }
    squares.add(sums);
  }

  // Returns the squared norm of what goes to out.
  template <int kBytes>
  static DBMTL_INLINE Real run(const State* rows, int64_t stride, const Real* weights, int64_t T, int64_t count,
                               bool accumulate, Out* out) {
    constexpr int kLanes = kBytes / sizeof(Real);
    constexpr int kBlock = kVectors<Real, kLanes> * kLanes;
    Squares<Real, kLanes> squares;
    int64_t p = 0;
    for (; p + kBlock <= count; p += kBlock)
      block<kLanes, true>(rows + p, stride, weights, T, kBlock, accumulate, out + p, squares);
    if (p < count) block<kLanes, false>(rows + p, stride, weights, T, count - p, accumulate, out + p, squares);
    if constexpr (kStream) finish_streams();
    return sum_lanes<Real>(squares.sums);
  }
};

bool is_streamed(const void* out, DType dtype, int64_t P, bool accumulate) {
  return !accumulate && P * size_of(dtype) >= kStreamedSum && reinterpret_cast<uintptr_t>(out) % kStreamed == 0;
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
    if (is_streamed(out, out_dtype, P, accumulate))
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
