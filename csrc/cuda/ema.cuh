// EMA of one lane's columns, and their squared norm: ema_update_, and phase 1 of balance_.
//
// Math      u = decay * m + gain * (g * inv_scale);   m' = u, rounded to State, if |u| <= kEntryLimit, else m
// Numerics  every operation rounds on its own, in Real (-fmad=false: no fused multiply-add): m' equals the reference
//           bit for bit, random bits of the rounding included. Squares are those of the stored values.
#pragma once

#include "common.cuh"

namespace dbmtl_fused::cuda {

template <class Real>
struct EmaCoefficients {
  Real decay, gain, inv_scale;
};

template <class State, class Element>
struct EmaLane {
  static constexpr int kCount = kColumns<State>;
  using Real = RealOf<State>;

  Lane<State, kCount> values;
  Lane<Element, kCount> grads;

  template <bool kAligned>
  DBMTL_DEVICE void load(const Places<kAligned, kCount>& places, const State* row, const Element* gradient) {
    places.template load<Cache::kKeep>(values, row);
    if constexpr (kHasGradient<Element>) places.template load<Cache::kEvictFirst>(grads, gradient);
  }

  // `column` is the span's first one in the row, `key` the row's; false if an entry was held back.
  template <bool kAligned>
  DBMTL_DEVICE bool update(const Places<kAligned, kCount>& places, const EmaCoefficients<Real>& coefficients,
                           uint32_t key, int64_t column) {
    bool within_limit = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Real updated = coefficients.decay * widen(values.at[i]);
      if constexpr (kHasGradient<Element>)
        updated += coefficients.gain * (static_cast<Real>(widen(grads.at[i])) * coefficients.inv_scale);
      const bool fits = fabs(updated) <= kEntryLimit<Real>;  // NaN does not
      if constexpr (kIsRounded<State>) {
        const auto p = static_cast<uint64_t>(column + places.column(i));
        const uint32_t random = random_bits(static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32), key);
        if (fits) values.at[i] = State{static_cast<uint16_t>((__float_as_uint(updated) + random) >> 16)};
      } else {
        if (fits) values.at[i] = updated;
      }
      within_limit &= fits;
    }
    return within_limit;
  }

  // Sum of the squares in the order of columns. Every lane of the warp must come.
  template <bool kAligned>
  DBMTL_DEVICE Real squares(const Places<kAligned, kCount>& places) const {
    Real sum = 0;
    if constexpr (kAligned) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum += widen(values.at[i]) * widen(values.at[i]);
    } else {
#pragma unroll 1
      for (int i = 0; i < kCount; ++i) {  // what this lane would have if its columns were adjacent
        const int column = places.lane * kCount + i;
        Real value = 0;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const Real other = __shfl_sync(kAllLanes, widen(values.at[j]), column % kWarp);
          if (j == column / kWarp) value = other;
        }
        sum += value * value;
      }
    }
    return sum;
  }
};

// What does not go by whole words: spans `first`, `first + step`, ... below `end` of a row of P columns, whose squares
// are added to `sum`. column_of(span) is a span's first column, counted from `row`, which is column `start` for the
// rounding; keep(span, values) gets what was stored.
template <class State, class Element, class ColumnOf, class Keep, class Sum>
DBMTL_DEVICE bool ema_loose(int64_t first, int64_t step, int64_t end, int64_t P, State* row, const Element* gradient,
                            const EmaCoefficients<RealOf<State>>& coefficients, uint32_t key, int64_t start,
                            const ColumnOf& column_of, const Keep& keep, Sum& sum) {
  bool within_limit = true;
#pragma unroll 1
  for (int64_t span = first; span < end; span += step) {
    const int64_t column = column_of(span);
    const Places<false, kColumns<State>> places{static_cast<int>(threadIdx.x) % kWarp, P - column};
    EmaLane<State, Element> lane;
    lane.load(places, row + column, gradient + column);
    within_limit &= lane.update(places, coefficients, key, start + column);
    sum += lane.squares(places);
    places.template store<Cache::kKeep>(row + column, lane.values);
    keep(span, lane.values);
  }
  return within_limit;
}

}  // namespace dbmtl_fused::cuda
