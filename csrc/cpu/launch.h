// Entry points of the CPU's kernels.
#pragma once

#include <cstdint>
#include <functional>

#include "../launch.h"

namespace dbmtl_fused::cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, count), each on a thread of its own and no shorter than
// `grain` except for the last. The same count and grain give the same thread the same range: kernels count on it for
// cache reuse, not for their results.
using ParallelFor = void (*)(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body);

template <class Loss, class Real>
void launch_begin_step(const BeginStep<Loss, Real>& args);

template <class State>
void launch_ema_update(const EmaUpdate<State>& args, ParallelFor parallel_for);

template <class State>
void launch_combine(const Combine<State>& args, ParallelFor parallel_for);

template <class State>
void launch_gram(const Gram<State>& args, ParallelFor parallel_for);

template <class State>
void launch_balance(const Balance<State>& args, ParallelFor parallel_for);

}  // namespace dbmtl_fused::cpu
