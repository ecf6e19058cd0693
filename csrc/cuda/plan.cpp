#include "plan.h"

#include <algorithm>
#include <limits>
#include <map>

namespace dbmtl_fused::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kWordBytes = 16;
constexpr int kMinWarps = 4;

int64_t real_bytes(int64_t state_bytes) { return std::max<int64_t>(state_bytes, 4); }

// Static shared memory of the balance kernel, rounded up: weights, and sums of every warp and row. From sm_90 on cubins
// set 1 KB more aside, and no document says on whose account.
int64_t static_bytes(int64_t state_bytes) {
  return real_bytes(state_bytes) * (kSharedTasks + 16 * kMaxSlots) + 128 + 1024;
}

// Of a block, in as few warps as its units take: a barrier of few is quicker.
int threads_for(int64_t units, int64_t grid, int most) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(units, grid), kMinWarps, most / kWarp)) * kWarp;
}

// Weights of every block, where they do not fit in shared memory.
int64_t weights_in_workspace(int64_t T, int64_t grid) { return T > kSharedTasks ? T * grid : 0; }

}  // namespace

std::vector<EmaUpdateLaunch> plan_ema_update(const Gradient* gradients, const int64_t* slots, int64_t num_gradients) {
  struct Window {
    int64_t first_slot = std::numeric_limits<int64_t>::max(), last_slot = -1;
    int64_t first_chunk = std::numeric_limits<int64_t>::max(), end_chunk = -1;
  };
  std::map<int64_t, Window> windows;
  for (int64_t i = 0; i < num_gradients; ++i) {
    if (gradients[i].numel == 0) continue;
    Window& window = windows[slots[i] / kMaxPointers];
    window.first_slot = std::min(window.first_slot, slots[i]);
    window.last_slot = std::max(window.last_slot, slots[i]);
    window.first_chunk = std::min(window.first_chunk, gradients[i].first_chunk);
    window.end_chunk = std::max(window.end_chunk, gradients[i].first_chunk + ceil_div(gradients[i].numel, kChunk));
  }
  std::vector<EmaUpdateLaunch> launches;
  for (const auto& [number, window] : windows)
    launches.push_back({window.first_slot, window.last_slot + 1 - window.first_slot, window.first_chunk,
                        window.end_chunk - window.first_chunk});
  if (launches.empty()) launches.push_back({0, 0, 0, 0});
  return launches;
}

CombinePlan plan_combine(int64_t T, int64_t P, int64_t state_bytes, const Device& device) {
  CombinePlan plan;
  plan.rows = combine_rows(T, state_bytes);
  plan.units = ceil_div(P, unit_columns(state_bytes, combine_groups(plan.rows)));
  plan.grid = std::clamp<int64_t>(plan.units, 1, device.sms * combine_blocks_per_sm(state_bytes));
  plan.threads = threads_for(plan.units, plan.grid, kCombineThreads);
  plan.workspace = plan.grid + weights_in_workspace(T, plan.grid);
  return plan;
}

GramPlan plan_gram(int64_t T, int64_t P, int64_t state_bytes, const Device& device) {
  GramPlan plan;
  plan.rows = gram_rows(T, state_bytes);
  const int64_t blocks = ceil_div(T, plan.rows), warps = gram_threads(plan.rows) / kWarp;
  plan.tiles = blocks * (blocks + 1) / 2;
  plan.tiles_at_once = static_cast<int>(ceil_div(plan.tiles, ceil_div(plan.tiles, warps)));
  plan.units = ceil_div(P, unit_columns(state_bytes, gram_groups(plan.rows, state_bytes)));
  plan.grid = std::clamp<int64_t>(plan.units, 1, device.sms);
  plan.threads = static_cast<int>(warps / plan.tiles_at_once * plan.tiles_at_once) * kWarp;
  plan.workspace = plan.tiles * gram_entries(plan.rows) * plan.grid;
  return plan;
}

BalancePlan plan_balance(int64_t T, int64_t P, int64_t state_bytes, const Device& device) {
  BalancePlan plan;
  plan.slots = balance_slots(T);
  const int groups = balance_groups(plan.slots, state_bytes);
  plan.units = ceil_div(P, unit_columns(state_bytes, groups));
  plan.grid = std::clamp<int64_t>(plan.units, 1, device.sms);
  plan.threads = threads_for(plan.units, plan.grid, kBalanceThreads);
  plan.cooperative = device.cooperative;

  const int64_t row_bytes = plan.threads * kWordBytes;  // of one word of every thread
  plan.shared_limit = std::max<int64_t>(device.shared_bytes - static_bytes(state_bytes), 0);
  const int64_t most = plan.shared_limit / row_bytes;
  const int64_t all = ceil_div(plan.units, plan.grid * plan.threads / kWarp) * groups * T;
  plan.kept = plan.cooperative ? std::min(most, all) : 0;
  plan.shared_bytes = plan.kept * row_bytes;
  plan.workspace = T * plan.grid + weights_in_workspace(T, plan.grid);
  return plan;
}

}  // namespace dbmtl_fused::cuda
