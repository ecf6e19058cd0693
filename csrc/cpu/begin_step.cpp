// begin_step: from losses to the seeds of their backward passes and the coefficients of their rows.
//
// Math      seed_t = scale / micro_batches / (max(loss_t, 0) + log_eps);   beta_t = beta / (step + 1)^beta_sigma, or 1
//           where the loss is unusable or scale vanishes;   inv_scale = 1 / scale, or 1 where that vanishes
// Traffic   O(T).
// Parallel  one thread.
// Sync      none.
// Numerics  seeds: one rounding an operation, in the losses' type; the bits of autograd's derivative of the log. The
//           schedule is computed in double and rounded once.
// Limits    none.
#include <algorithm>
#include <cmath>
#include <limits>

#include "launch.h"

namespace dbmtl_fused::cpu {

template <class Loss, class Real>
void launch_begin_step(const BeginStep<Loss, Real>& args) {
  const Loss scale = *args.scale / static_cast<Loss>(args.micro_batches), log_eps = static_cast<Loss>(args.log_eps);
  const double k = static_cast<double>(*args.step + 1);
  const Real beta_k = static_cast<Real>(args.beta / std::pow(k, args.beta_sigma));
  const Real factor = static_cast<Real>(*args.scale);
  const bool vanishes = std::abs(factor) < std::numeric_limits<Real>::min();
  *args.inv_scale = vanishes ? Real{1} : 1 / factor;
  bool found_inf = false;
  for (int64_t t = 0; t < args.T; ++t) {
    const Loss loss = args.losses[t];
    const bool active = args.active == nullptr || args.active[t];
    const bool usable = std::isfinite(loss) && (!args.log || loss >= -static_cast<Loss>(kNegativeLossTolerance));
    const Loss seed = args.log ? scale / (std::max(loss, Loss{0}) + log_eps) : scale;
    args.seeds[t] = !active ? Loss{0} : usable ? seed : std::numeric_limits<Loss>::quiet_NaN();
    args.betas[t] = active && usable && !vanishes ? beta_k : Real{1};
    found_inf |= active && !usable;
  }
  if (found_inf || !args.accumulate) *args.found_inf = found_inf ? 1.0f : 0.0f;
}

template void launch_begin_step(const BeginStep<float, float>&);
template void launch_begin_step(const BeginStep<float, double>&);
template void launch_begin_step(const BeginStep<double, float>&);
template void launch_begin_step(const BeginStep<double, double>&);

}  // namespace dbmtl_fused::cpu
