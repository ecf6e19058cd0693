// EMA of adjacent columns of one row, in place, and their squared norm: ema_update_, and phase 1 of balance_.
//
// Math      u = decay * m + gain * (g * inv_scale);   m' = u if finite else m;   returns the sum of m'^2
// Traffic   fp32: reads m 4, g 4, writes m 4 bytes a column; nothing else leaves the registers.
// Parallel  one thread; vectors, compiled per instruction set.
// Sync      none.
// Numerics  every operation rounds on its own, in the state's type (no fused multiply-add): m' equals the reference bit
//           for bit. Squares are summed in kStepBytes of lanes, then over the lanes by halves: an order that depends on
//           `count` alone.
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

// Columns of one step of the loop, in bytes of State: two of the widest vectors, so that their sums run side by side.
constexpr int kStepBytes = 128;

template <class State>
constexpr int kStep = kStepBytes / static_cast<int>(sizeof(State));

template <class State, int kLanes>
struct Running {
  static constexpr int kVectors = kStep<State> / kLanes;
  Vector<State, kLanes> squares[kVectors] = {};
  Vector<BitsOf<State>, kLanes> nonfinite = {};  // any bit: some update was not finite
};

template <class State, class Element, int kLanes>
DBMTL_INLINE void ema_step(State* values, const Element* grads, const EmaCoefficients<State>& c,
                           Running<State, kLanes>& running) {
  for (int i = 0; i < running.kVectors; ++i) {
    State* const at = values + i * kLanes;
    const auto old = load<State, kLanes>(at);
    auto updated = c.decay * old;
    if constexpr (kHasGradient<Element>) updated += c.gain * (load<State, kLanes>(grads + i * kLanes) * c.inv_scale);
    const auto residue = updated - updated;  // +0, or NaN if not finite
    const auto stored = residue == 0 ? updated : old;
    store<State, kLanes>(at, stored);
    running.nonfinite |= reinterpret_cast<Vector<BitsOf<State>, kLanes>>(residue);
    running.squares[i] += stored * stored;
  }
}

template <class State, int kLanes>
DBMTL_INLINE EmaColumns<State> finish(const Running<State, kLanes>& running) {
  State sums[kStep<State>];
  std::memcpy(sums, running.squares, kStepBytes);
  for (int half = kStep<State> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  bool finite = true;
  for (int i = 0; i < kLanes; ++i) finite &= running.nonfinite[i] == 0;
  return {sums[0], finite};
}

template <class State, class Element>
struct EmaLoop {
  template <int kBytes>
  static DBMTL_INLINE EmaColumns<State> run(State* values, const Element* grads, int64_t count,
                                            EmaCoefficients<State> c) {
    Running<State, kBytes / sizeof(State)> running;
    int64_t p = 0;
    for (; p + kStep<State> <= count; p += kStep<State>) {
      prefetch<kAhead, kStepBytes>(values + p);
      if constexpr (kHasGradient<Element>) prefetch<kAhead, kStep<State> * sizeof(Element)>(grads + p);
      ema_step(values + p, grads + p, c, running);
    }
    if (p < count) {  // the rest, padded: zeros stay zero and add nothing
      const size_t rest = count - p;
      State padded_values[kStep<State>] = {};
      Element padded_grads[kStep<State>] = {};
      std::memcpy(padded_values, values + p, rest * sizeof(State));
      if constexpr (kHasGradient<Element>) std::memcpy(padded_grads, grads + p, rest * sizeof(Element));
      ema_step(padded_values, padded_grads, c, running);
      std::memcpy(values + p, padded_values, rest * sizeof(State));
    }
    return finish(running);
  }
};

}  // namespace

template <class State>
EmaColumns<State> ema_columns(State* values, const void* grads, DType grads_dtype, int64_t count,
                              const EmaCoefficients<State>& coefficients) {
  const auto run = [&](auto element) {
    using Element = decltype(element);
    return run_widest<EmaLoop<State, Element>>(values, static_cast<const Element*>(grads), count, coefficients);
  };
  return grads == nullptr ? run(NoGradient{}) : with_element_type(grads_dtype, run);
}

template EmaColumns<float> ema_columns(float*, const void*, DType, int64_t, const EmaCoefficients<float>&);
template EmaColumns<double> ema_columns(double*, const void*, DType, int64_t, const EmaCoefficients<double>&);

}  // namespace dbmtl_fused::cpu
