// balance_: EMA, norms, weights and weighted sum of a ready gradient matrix.
//
// Math      ema = beta * ema + (1 - beta) * grads;   w_t = alpha / (|ema_t| + eps);   out = sum_t w_t ema_t
// Traffic   fp32: phase 1 reads 8TP and writes 4TP bytes, phase 2 reads 4TP and writes 4P. Together 4 (4T + 1) P, less
//           what phase 2 still finds in cache. bf16: half of it.
// Parallel  each thread takes a contiguous range of chunks of columns, with all rows, in both phases.
// Sync      two parallel regions, the weights between them.
// Numerics  partials are keyed by chunk of the row and summed in chunk order: no bit depends on threads.
// Limits    ema, grads and out must not overlap.
#include <algorithm>
#include <atomic>
#include <vector>

#include "ema_columns.h"
#include "launch.h"
#include "weighted_sum.h"
#include "weights.h"

namespace dbmtl_fused::cpu {
namespace {

// Chunks of a row before the next row has its turn: a short stretch is over before it streams at full speed.
constexpr int64_t kRun = 16;

}  // namespace

template <class State>
void launch_balance(const Balance<State>& args, ParallelFor parallel_for) {
  using Real = RealOf<State>;
  const EmaCoefficients<Real> coefficients{*args.beta, 1 - *args.beta, 1};
  const int64_t C = ceil_div(args.P, kChunk);
  std::vector<Real> partials(args.T * C);  // (T, C)
  std::atomic<bool> all_within_limit{true};

  parallel_for(C, chunk_grain(args.T), [&](int64_t begin, int64_t end) {
    bool within_limit = true;
    for (int64_t run = begin; run < end; run += kRun)
      for (int64_t t = 0; t < args.T; ++t)
        for (int64_t c = run; c < std::min(end, run + kRun); ++c) {
          const int64_t start = c * kChunk;
          const auto chunk =
              ema_columns(args.ema + t * args.ema_stride + start,
                          element(args.grads, args.grads_dtype, t * args.grads_stride + start), args.grads_dtype,
                          std::min(kChunk, args.P - start), coefficients, draws_of(args.seed, t, start));
          partials[t * C + c] = chunk.sq_norm;
          within_limit &= chunk.within_limit;
        }
    if (!within_limit) all_within_limit.store(false, std::memory_order_relaxed);
  });
  if (!all_within_limit.load(std::memory_order_relaxed)) *args.found_inf = 1;

  std::vector<Real> sq_norms(args.T);
  for (int64_t t = 0; t < args.T; ++t) sq_norms[t] = sum_in_order(partials.data() + t * C, C);
  compute_weights(sq_norms.data(), args.T, *args.found_inf != 0, args.weighting);
  weighted_sum(args.ema, args.ema_stride, args.T, args.P, args.weighting.weights, false, args.out, args.out_dtype,
               nullptr, Order::kBackwards, parallel_for);  // phase 1 went forwards
}

template void launch_balance(const Balance<float>&, ParallelFor);
template void launch_balance(const Balance<double>&, ParallelFor);
template void launch_balance(const Balance<BFloat16>&, ParallelFor);

}  // namespace dbmtl_fused::cpu
