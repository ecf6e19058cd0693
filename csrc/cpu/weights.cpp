// Squared norms to weights.
//
// Math      n_t = sqrt(sq_norm_t);   alpha = max, min, ... of the n that count;   w_t = alpha / (n_t + eps), or 1,
//           times the preference; or NaN
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
#include <numeric>
#include <vector>

namespace dbmtl_fused::cpu {
namespace {

// NaN is above all numbers, as torch sorts.
template <class Real>
bool below(Real a, Real b) {
  return a < b || (std::isnan(b) && !std::isnan(a));
}

// Those that alpha is made of.
template <class Real>
std::vector<Real> norms_that_count(int64_t T, const Weighting<Real>& weighting) {
  std::vector<Real> norms;
  norms.reserve(T);
  for (int64_t t = 0; t < T; ++t) {
    const bool takes_part = weighting.preference == nullptr || weighting.preference[t] != 0;
    if (takes_part && (weighting.alpha != Alpha::kMin || weighting.norms[t] != 0)) norms.push_back(weighting.norms[t]);
  }
  return norms;
}

template <class Real>
Real alpha_of(std::vector<Real> norms, const Weighting<Real>& weighting) {
  if (weighting.alpha == Alpha::kConstant) return static_cast<Real>(weighting.alpha_constant);
  if (weighting.alpha == Alpha::kNone) return 1;
  if (norms.empty()) return 0;
  switch (weighting.alpha) {
    case Alpha::kMax:
      return *std::max_element(norms.begin(), norms.end(), below<Real>);
    case Alpha::kMin:
      for (const Real norm : norms)
        if (std::isnan(norm)) return norm;
      return *std::min_element(norms.begin(), norms.end());
    case Alpha::kMean:
      return std::accumulate(norms.begin(), norms.end(), Real{0}) / static_cast<Real>(norms.size());
    default:  // the median
      std::sort(norms.begin(), norms.end(), below<Real>);
      return (norms[(norms.size() - 1) / 2] + norms[norms.size() / 2]) / 2;
  }
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
  const Real alpha = alpha_of(norms_that_count(T, weighting), weighting);
  for (int64_t t = 0; t < T; ++t) {
    Real balanced =
        weighting.alpha == Alpha::kNone ? Real{1} : alpha / (weighting.norms[t] + static_cast<Real>(weighting.eps));
    if (weighting.preference != nullptr) balanced = weighting.preference[t] * balanced;
    weighting.weights[t] = found_inf ? std::numeric_limits<Real>::quiet_NaN() : balanced;
  }
  return alpha;
}

template float sum_in_order(const float*, int64_t);
template double sum_in_order(const double*, int64_t);
template float compute_weights(const float*, int64_t, bool, const Weighting<float>&);
template double compute_weights(const double*, int64_t, bool, const Weighting<double>&);

}  // namespace dbmtl_fused::cpu
