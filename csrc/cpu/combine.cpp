// combine: squared norms to weights, and the weighted sum of the rows.
//
// Math      w_t = preference_t alpha / (sqrt(sq_norm_t) + eps);   out = scale * sum_t w_t ema[t]   (+ out if
//           accumulate);   out_sq_norm = sum_p out[p]^2;   step + 1 unless found_inf
// Traffic   fp32: 4 (T + 1) P bytes; 4P more if accumulate. bf16: half of it.
// Parallel  weighted_sum.cpp.
// Sync      one parallel region.
// Numerics  scale multiplies the weights, with one rounding; the rest in weights.cpp and weighted_sum.cpp.
// Limits    ema and out must not overlap.
#include <algorithm>
#include <vector>

#include "launch.h"
#include "weighted_sum.h"
#include "weights.h"

namespace dbmtl_fused::cpu {

template <class State>
void launch_combine(const Combine<State>& args, ParallelFor parallel_for) {
  using Real = RealOf<State>;
  const Real* const weights = args.weighting.weights;
  *args.alpha_value = compute_weights(args.sq_norms, args.T, *args.found_inf != 0, args.weighting);
  std::vector<Real> scaled(args.T);
  std::transform(weights, weights + args.T, scaled.begin(), [&](Real weight) { return *args.scale * weight; });
  std::vector<Real> partials(ceil_div(args.P, kChunk));
  // Autograd reaches the first parameters last.
  weighted_sum(args.ema, args.ema_stride, args.T, args.P, scaled.data(), args.accumulate, args.out, args.out_dtype,
               partials.data(), Order::kForwards, parallel_for);
  *args.out_sq_norm = sum_in_order(partials.data(), static_cast<int64_t>(partials.size()));
  if (args.step != nullptr && *args.found_inf == 0) ++*args.step;
}

template void launch_combine(const Combine<float>&, ParallelFor);
template void launch_combine(const Combine<double>&, ParallelFor);
template void launch_combine(const Combine<BFloat16>&, ParallelFor);

}  // namespace dbmtl_fused::cpu
