// Weighted sum of the rows, for one unit of columns: combine, and phase 2 of balance_.
//
// Math      out[p] = (out[p] if accumulate else 0) + sum_t weights[t] * rows[t, p];   sum_p out[p]^2, before rounding
// Numerics  products and sums round one by one in Real, in task order, then once to out's type: bit for bit the
//           reference.
#pragma once

#include "common.cuh"

namespace dbmtl_fused::cuda {

// kRows rows of kGroups spans are in flight at a time. kAll: T is kRows, so that no row needs a test.
template <class State, int kRows, int kGroups, bool kAll>
struct WeightedSum {
  static constexpr int kCount = kColumns<State>;
  static constexpr int kUnit = kSpan<State> * kGroups;
  using Real = RealOf<State>;

  Lane<State, kCount> rows[kGroups][kRows];

  template <bool kAligned>
  static DBMTL_DEVICE Places<kAligned, kCount> places(int64_t P, int64_t column, int group) {
    return {static_cast<int>(threadIdx.x) % kWarp, P - column - group * kSpan<State>};
  }

  // Rows first to first + kRows. read(places, lane, t, group) gets one lane's columns of a row.
  template <bool kAligned, class Read>
  DBMTL_DEVICE void load(int64_t T, int64_t P, int64_t column, int64_t first, const Read& read) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (kAll || first + row < T)
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
          read(places<kAligned>(P, column, group), rows[group][row], first + row, group);
    }
  }

  // After the first rows of the columns from `column` on were loaded: the rest, and out. Returns the sum of this lane's
  // squares.
  template <bool kAligned, class Read>
  DBMTL_DEVICE Real finish(int64_t T, int64_t P, int64_t column, const Real* weights, bool accumulate, void* out,
                           DType out_dtype, const Read& read) {
    Real sums[kGroups][kCount] = {};
    char* const columns = static_cast<char*>(out) + column * size_of(out_dtype);
    if (accumulate)
      with_element_type(out_dtype, [&](auto element) {
        using Out = decltype(element);
        Lane<Out, kCount> old[kGroups];
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
          places<kAligned>(P, column, group)
              .template load<Cache::kKeep>(old[group], reinterpret_cast<const Out*>(columns) + group * kSpan<State>);
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
#pragma unroll
          for (int i = 0; i < kCount; ++i) sums[group][i] = static_cast<Real>(widen(old[group].at[i]));
      });

    add(T, 0, weights, sums);
#pragma unroll 1
    for (int64_t first = kRows; !kAll && first < T; first += kRows) {
      load<kAligned>(T, P, column, first, read);
      add(T, first, weights, sums);
    }

    Real squares = 0;
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int i = 0; i < kCount; ++i) squares += sums[group][i] * sums[group][i];  // 0 beyond the last column

    with_element_type(out_dtype, [&](auto element) {
      using Out = decltype(element);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        Lane<Out, kCount> result;
#pragma unroll
        for (int i = 0; i < kCount; ++i) result.at[i] = narrow<Out>(sums[group][i]);
        places<kAligned>(P, column, group)
            .template store<Cache::kEvictFirst>(reinterpret_cast<Out*>(columns) + group * kSpan<State>, result);
      }
    });

    return squares;
  }

 private:
  DBMTL_DEVICE void add(int64_t T, int64_t first, const Real* weights, Real (&sums)[kGroups][kCount]) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (kAll || first + row < T) {
        const Real weight = weights[first + row];
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
#pragma unroll
          for (int i = 0; i < kCount; ++i) sums[group][i] += weight * widen(rows[group][row].at[i]);
      }
    }
  }
};

}  // namespace dbmtl_fused::cuda
