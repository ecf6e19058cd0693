// EMA of adjacent columns of one row, in place, and their squared norm: ema_update_, and phase 1 of balance_.
//
// Math      u = decay * m + gain * (g * inv_scale);   m' = round(u) if |u| <= kEntryLimit else m;   returns the sum of
//           m'^2
// Traffic   fp32: reads m 4, g 4, writes m 4 bytes a column; bf16: half of it; nothing else leaves the registers.
// Parallel  one thread; vectors, compiled per instruction set.
// Sync      none.
// Numerics  every operation rounds on its own, in the state's compute type (no fused multiply-add), and bfloat16 state
//           once more, by random bits of (seed, column): m' equals the reference bit for bit. Squares are summed in
//           kStepBytes of lanes, then over the lanes by halves: an order that depends on `count` alone.
// Limits    m and g must not overlap.
#include "ema_columns.h"

#include <cstring>
#include <type_traits>

#include "simd.h"

namespace dbmtl_fused::cpu {
namespace {

// Stands for the element type of a missing gradient: its columns only decay (adding zeros would turn -0 into 0).
struct NoGradient {};
template <class Element>
constexpr bool kHasGradient = !std::is_same_v<Element, NoGradient>;

// Bytes to prefetch ahead: the processor stops on its own at the end of a 4 KiB page.
constexpr int kAhead = 2048;

template <class Real>
constexpr BitsOf<Real> kSignBit = BitsOf<Real>{1} << (8 * sizeof(Real) - 1);

template <class Real>
DBMTL_INLINE BitsOf<Real> bits_of_limit() {
  return load_bits<BitsOf<Real>>(&kEntryLimit<Real>);
}

template <class Real, int kLanes>
struct Running {
  static constexpr int kVectors = kStep<Real> / kLanes;
  Vector<Real, kLanes> squares[kVectors] = {};
  Vector<BitsOf<Real>, kLanes> room = {};  // a sign bit: some update was beyond kEntryLimit
};

constexpr uint32_t kLaneNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Random bits of kLanes columns from `column` on.
template <int kLanes>
DBMTL_INLINE Vector<uint32_t, kLanes> draw(uint32_t key, int64_t column) {
  using Words = Vector<uint32_t, kLanes>;
  const auto first = static_cast<uint32_t>(column);
  const Words low = first + load_bits<Words>(kLaneNumbers);
  const auto carry = reinterpret_cast<Words>(low < first);  // -1 where the low half wrapped
  return random_bits(low, static_cast<uint32_t>(column >> 32) - carry, key);
}

template <class State, class Element, class Real, int kLanes>
DBMTL_INLINE void ema_step(State* values, const Element* grads, const EmaCoefficients<Real>& c, Draws draws,
                           Running<Real, kLanes>& running) {
  for (int i = 0; i < running.kVectors; ++i) {
    State* const at = values + i * kLanes;
    const auto old = load<Real, kLanes>(at);
    auto updated = c.decay * old;
    if constexpr (kHasGradient<Element>) updated += c.gain * (load<Real, kLanes>(grads + i * kLanes) * c.inv_scale);
    using Bits = Vector<BitsOf<Real>, kLanes>;
    // Magnitudes are in the order of their bits, NaNs above all.
    const Bits magnitude = reinterpret_cast<Bits>(updated) & ~kSignBit<Real>;
    const auto within_limit = reinterpret_cast<Vector<Real, kLanes>>(magnitude) <= kEntryLimit<Real>;
    running.room |= bits_of_limit<Real>() - magnitude;
    if constexpr (kIsRounded<State>) updated = round_by(draw<kLanes>(draws.key, draws.column + i * kLanes), updated);
    const auto stored = within_limit ? updated : old;
    store_exact<Real, kLanes>(at, stored);
    running.squares[i] += stored * stored;
  }
}

template <class Real, int kLanes>
DBMTL_INLINE EmaColumns<Real> finish(const Running<Real, kLanes>& running) {
  BitsOf<Real> room = 0;
  for (int i = 0; i < kLanes; ++i) room |= running.room[i];
  return {sum_lanes<Real>(running.squares), (room & kSignBit<Real>) == 0};
}

template <class State, class Element>
struct EmaLoop {
  using Real = RealOf<State>;

  template <int kBytes>
  static DBMTL_INLINE EmaColumns<Real> run(State* values, const Element* grads, int64_t count, EmaCoefficients<Real> c,
                                           Draws draws) {
    Running<Real, kBytes / sizeof(Real)> running;
    int64_t p = 0;
    for (; p + kStep<Real> <= count; p += kStep<Real>) {
      prefetch<kAhead, kStep<Real> * sizeof(State)>(values + p);
      if constexpr (kHasGradient<Element>) prefetch<kAhead, kStep<Real> * sizeof(Element)>(grads + p);
      ema_step(values + p, grads + p, c, {draws.key, draws.column + p}, running);
    }
    if (p < count) {  // the rest, padded: zeros stay zero and add nothing
      const size_t rest = count - p;
      State padded_values[kStep<Real>] = {};
      Element padded_grads[kStep<Real>] = {};
      std::memcpy(padded_values, values + p, rest * sizeof(State));
      if constexpr (kHasGradient<Element>) std::memcpy(padded_grads, grads + p, rest * sizeof(Element));
      ema_step(padded_values, padded_grads, c, {draws.key, draws.column + p}, running);
      std::memcpy(values + p, padded_values, rest * sizeof(State));
    }
    return finish(running);
  }
};

}  // namespace

template <class State>
EmaColumns<RealOf<State>> ema_columns(State* values, const void* grads, DType grads_dtype, int64_t count,
                                      const EmaCoefficients<RealOf<State>>& coefficients, Draws draws) {
  const auto run = [&](auto element) {
    using Element = decltype(element);
    return run_widest<EmaLoop<State, Element>>(values, static_cast<const Element*>(grads), count, coefficients, draws);
  };
  return grads == nullptr ? run(NoGradient{}) : with_element_type(grads_dtype, run);
}

template EmaColumns<float> ema_columns(float*, const void*, DType, int64_t, const EmaCoefficients<float>&, Draws);
template EmaColumns<double> ema_columns(double*, const void*, DType, int64_t, const EmaCoefficients<double>&, Draws);
template EmaColumns<float> ema_columns(BFloat16*, const void*, DType, int64_t, const EmaCoefficients<float>&, Draws);

}  // namespace dbmtl_fused::cpu
