// The O(T) arithmetic between the two phases, by every block for itself.
//
// Math      norms = sqrt(sq_norms);   weights = preference * alpha(norms that count) / (norms + eps), preference if
//           alpha is none, NaN if found_inf
// Traffic   none but T numbers, or 2T; block 0 writes the results.
// Parallel  a thread per task; alpha is worked out by every thread, but for the median, whose ranks are counted.
// Sync      block barriers.
// Numerics  square roots, quotients and products round to nearest; the mean adds in task order. Norms that do not count
//           are kept with their sign bit set, so that alpha needs to know nothing but the norms.
// Limits    any T; O(T^2) comparisons for the median.
#pragma once

#include "common.cuh"

namespace dbmtl_fused::cuda {

// NaNs come last, as in torch.sort.
template <class Real>
DBMTL_DEVICE bool below(Real a, Real b) {
  return a < b || (isnan(b) && !isnan(a));
}

template <class Real>
DBMTL_DEVICE bool counts(Real norm) {
  return !signbit(norm);
}

// Of the `number` norms that count.
template <class Real>
DBMTL_DEVICE Real median(const Real* norms, int64_t T, int64_t number) {
  __shared__ Real middle[2];
  for (int64_t t = threadIdx.x; t < T; t += blockDim.x) {
    if (!counts(norms[t])) continue;
    int64_t rank = 0;
    for (int64_t s = 0; s < T; ++s)
      rank += counts(norms[s]) && (below(norms[s], norms[t]) || (s < t && !below(norms[t], norms[s])));
    if (rank == (number - 1) / 2) middle[0] = norms[t];
    if (rank == number / 2) middle[1] = norms[t];
  }
  __syncthreads();
  return (middle[0] + middle[1]) / 2;
}

template <class Real>
DBMTL_DEVICE Real alpha_of(const Real* norms, int64_t T, const Weighting<Real>& weighting) {
  if (weighting.alpha == Alpha::kConstant) return static_cast<Real>(weighting.alpha_constant);
  if (weighting.alpha == Alpha::kNone) return 1;
  int64_t number = 0;
  Real largest = 0, smallest = static_cast<Real>(INFINITY), sum = 0;
  for (int64_t t = 0; t < T; ++t) {
    const Real norm = norms[t];
    if (!counts(norm)) continue;
    ++number;
    if (norm > largest || isnan(norm)) largest = norm;
    if (norm < smallest || isnan(norm)) smallest = norm;
    sum += norm;
  }
  if (number == 0) return 0;
  if (weighting.alpha == Alpha::kMax) return largest;
  if (weighting.alpha == Alpha::kMin) return smallest;
  if (weighting.alpha == Alpha::kMean) return sum / static_cast<Real>(number);
  return median(norms, T, number);
}

// Turns `weights`, (T,) of this block alone, from squared norms into scale * weights; returns alpha. Every thread of
// the block must come, and may read `weights` afterwards.
template <class Real>
DBMTL_DEVICE Real compute_weights(Real* weights, int64_t T, bool found_inf, Real scale,
                                  const Weighting<Real>& weighting) {
  __syncthreads();
  for (int64_t t = threadIdx.x; t < T; t += blockDim.x) {
    const Real norm = sqrt(weights[t]);
    const bool takes_part = weighting.preference == nullptr || weighting.preference[t] != 0;
    const bool counts = takes_part && (weighting.alpha != Alpha::kMin || norm != 0);
    weights[t] = copysign(norm, static_cast<Real>(counts ? 1 : -1));
  }
  __syncthreads();
  const Real alpha = alpha_of(weights, T, weighting);
  __syncthreads();
  for (int64_t t = threadIdx.x; t < T; t += blockDim.x) {
    const Real norm = fabs(weights[t]);
    Real balanced = weighting.alpha == Alpha::kNone ? 1 : alpha / (norm + static_cast<Real>(weighting.eps));
    if (weighting.preference != nullptr) balanced = weighting.preference[t] * balanced;
    const Real weight = found_inf ? static_cast<Real>(NAN) : balanced;
    weights[t] = scale * weight;
    if (blockIdx.x == 0) {
      weighting.norms[t] = norm;
      weighting.weights[t] = weight;
    }
  }
  __syncthreads();
  return alpha;
}

}  // namespace dbmtl_fused::cuda
