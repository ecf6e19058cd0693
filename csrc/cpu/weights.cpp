// Squared norms to weights.
//
// Math      n_t = sqrt(sq_norm_t);   alpha = max, min, ... of n;   w_t = alpha / (n_t + eps), or 1, or NaN
// Traffic   O(T), and O(P / kChunk) for sums of partials.
// Parallel  one thread.
// Sync      none.
// Numerics  one rounding an operation, in the state's compute type. Bit for bit the reference, with two exceptions on
//           its side: torch's sqrt (MKL) is now and then one ulp off, and its mean of more than four norms associates
//           otherwise. A NaN norm reaches alpha: max and min return it, median sorts it last.
// Limits    T >= 1.
#include "weights.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace dbmtl_fused::cpu {
namespace {

// NaN is above all numbers, as torch sorts.
template <class Real>
bool below(Real a, Real b) {
  return a < b || (std::isnan(b) && !std::isnan(a));
}

template <class Real>
Real alpha_of(const Real* norms, int64_t T, const Weighting<Real>& weighting) {
  switch (weighting.alpha) {
    case Alpha::kMax:
      return *std::max_element(norms, norms + T, below<Real>);
    case Alpha::kMin:
      for (int64_t t = 0; t < T; ++t)
        if (std::isnan(norms[t])) return norms[t];
      return *std::min_element(norms, norms + T);
    case Alpha::kMean: {
      Real sum = 0;
      for (int64_t t = 0; t < T; ++t) sum += norms[t];
      return sum / static_cast<Real>(T);
    }
    case Alpha::kMedian: {
      std::vector<Real> ordered(norms, norms + T);
      std::sort(ordered.begin(), ordered.end(), below<Real>);
      return (ordered[(T - 1) / 2] + ordered[T / 2]) / 2;
    }
    case Alpha::kConstant:
      return static_cast<Real>(weighting.alpha_constant);
    case Alpha::kNone:
      return 1;
  }
  __builtin_unreachable();
}

}  // namespace

template <class Real>
Real sum_in_order(const Real* partials, int64_t count) {
  double sum = 0;
  for (int64_t c = 0; c < count; ++c) sum += partials[c];
  return static_cast<Real>(sum);
}

template <class Real>
Real compute_weights(const Real* sq_norms, int64_t T, bool found_inf, const Weighting<Real>& weighting) {
  for (int64_t t = 0; t < T; ++t) weighting.norms[t] = std::sqrt(sq_norms[t]);
  const Real alpha = alpha_of(weighting.norms, T, weighting);
  for (int64_t t = 0; t < T; ++t) {
    const Real balanced =
        weighting.alpha == Alpha::kNone ? Real{1} : alpha / (weighting.norms[t] + static_cast<Real>(weighting.eps));
    weighting.weights[t] = found_inf ? std::numeric_limits<Real>::quiet_NaN() : balanced;
  }
  return alpha;
}

template float sum_in_order(const float*, int64_t);
template double sum_in_order(const double*, int64_t);
template float compute_weights(const float*, int64_t, bool, const Weighting<float>&);
template double compute_weights(const double*, int64_t, bool, const Weighting<double>&);

}  // namespace dbmtl_fused::cpu
