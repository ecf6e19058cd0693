// ema_update_: one task's gradients, wherever they are, into its row of the EMA.
//
// Math      row = beta * row + (1 - beta) * (g * inv_scale), or row + (1 - beta) * ... if accumulate; the partials of
//           the chunks touched; sq_norm = sum of all partials
// Traffic   fp32: 12 bytes a column of the listed parameters (bf16: 6), and 4 ceil(P / kChunk) for the sum.
// Parallel  the columns of all gradients, laid end to end, are dealt to the threads in equal ranges; a chunk belongs to
//           the thread that has its first column.
// Sync      one parallel region.
// Numerics  partials are keyed by chunk and summed in chunk order: no bit depends on threads, nor on which gradients
//           share a call.
// Limits    no slot twice in one call.
#include <algorithm>
#include <atomic>
#include <vector>

#include "ema_columns.h"
#include "launch.h"
#include "weights.h"

namespace dbmtl_fused::cpu {

// Columns worth a thread: below, waking it costs more than it saves.
constexpr int64_t kGrain = 32768;

template <class State>
void launch_ema_update(const EmaUpdate<State>& args, ParallelFor parallel_for) {
  using Real = RealOf<State>;
  const EmaCoefficients<Real> coefficients{args.accumulate ? Real{1} : *args.beta, 1 - *args.beta, *args.inv_scale};
  const bool is_taken = coefficients.gain != 0;  // else nothing is looked at

  std::vector<int64_t> ends(args.num_gradients);  // of the gradients laid end to end
  int64_t total = 0;
  for (int64_t i = 0; i < args.num_gradients; ++i) ends[i] = total += args.gradients[i].numel;

  std::atomic<bool> all_within_limit{true};
  parallel_for(total, kGrain, [&](int64_t begin, int64_t end) {
    bool within_limit = true;
    for (int64_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin(); i < args.num_gradients; ++i) {
      const Gradient& gradient = args.gradients[i];
      const int64_t base = ends[i] - gradient.numel;  // its first column among all
      if (base >= end) break;
      // Chunks whose first column is in [begin, end).
      const int64_t first = ceil_div(std::max<int64_t>(begin - base, 0), kChunk);
      const int64_t last = ceil_div(std::min(end - base, gradient.numel), kChunk);
      for (int64_t c = first; c < last; ++c) {
        const int64_t offset = c * kChunk;
        const void* const grads = is_taken && gradient.data ? element(gradient.data, gradient.dtype, offset) : nullptr;
        const int64_t start = gradient.start + offset;
        const auto chunk =
            ema_columns(args.row + start, grads, gradient.dtype, std::min(kChunk, gradient.numel - offset),
                        coefficients, draws_of(args.seed, 0, start));
        args.partials[gradient.first_chunk + c] = chunk.sq_norm;
        within_limit &= chunk.within_limit;
      }
    }
    if (!within_limit) all_within_limit.store(false, std::memory_order_relaxed);
  });

  *args.sq_norm = sum_in_order(args.partials, args.C);
  if (!all_within_limit.load(std::memory_order_relaxed)) *args.found_inf = 1;
}

template void launch_ema_update(const EmaUpdate<float>&, ParallelFor);
template void launch_ema_update(const EmaUpdate<double>&, ParallelFor);
template void launch_ema_update(const EmaUpdate<BFloat16>&, ParallelFor);

}  // namespace dbmtl_fused::cpu
