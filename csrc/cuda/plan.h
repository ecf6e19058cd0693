// Launch plans: what grid, how much shared memory, which parameter block. Plain functions of the problem and of the
// device's properties; no CUDA.
#pragma once

#include <cstdint>
#include <vector>

#include "../launch.h"

namespace dbmtl_fused::cuda {

// What plans need to know of a device.
struct Device {
  int64_t sms;           // streaming multiprocessors
  int64_t shared_bytes;  // shared memory a block may ask for
  bool cooperative;      // whether a grid can wait for itself
};

// Tasks up to which a block's weights are in shared memory; beyond, in the workspace.
constexpr int64_t kSharedTasks = 256;

// What a warp works on at a time: one span (see common.cuh) of each of `groups` adjacent groups of columns, in all
// rows. They are dealt to the blocks in turn, and within a block to its warps: unit u belongs to block u % grid.
constexpr int64_t unit_columns(int64_t state_bytes, int groups) { return 32 * (16 / state_bytes) * groups; }

// --- ema_update_

// Slots whose pointers fit in one launch, and the sizes of parameter block that kernels are compiled for.
constexpr int kPointerBlocks[] = {64, 512, 4000};
constexpr int64_t kMaxPointers = kPointerBlocks[2];

// One launch: the chunks between the first and the last of the gradients in a window of slots.
struct EmaUpdateLaunch {
  int64_t first_slot;
  int64_t num_slots;
  int64_t first_chunk;
  int64_t num_chunks;  // 0: only the partials are summed
};

// `slots` are those of `gradients`. At least one launch: sq_norm is due even if nothing is listed.
std::vector<EmaUpdateLaunch> plan_ema_update(const Gradient* gradients, const int64_t* slots, int64_t num_gradients);

// --- combine

constexpr int kCombineThreads = 256;  // at most
constexpr int combine_blocks_per_sm(int64_t state_bytes) { return state_bytes == 2 ? 2 : 4; }

// Rows that the kernel is compiled for: T itself if it is small and the state float32; else 0, any number.
constexpr int64_t kMaxCombineRows = 8;
constexpr int combine_rows(int64_t T, int64_t state_bytes) {
  return state_bytes == 4 && T <= kMaxCombineRows ? static_cast<int>(T) : 0;
}
constexpr int combine_groups(int rows) { return rows >= 1 && rows <= 4 ? 2 : 1; }

struct CombinePlan {
  int rows;
  int64_t units;
  int64_t grid;
  int threads;
  int64_t workspace;  // numbers
};

CombinePlan plan_combine(int64_t T, int64_t P, int64_t state_bytes, const Device& device);

// --- gram

// `out` is made of tiles, those of its upper triangle: a block of rows against another or itself. Rows of a block, for
// which the kernel is compiled: T itself if it is small, else what leaves room for a sum of every entry of a tile.
constexpr int64_t kMaxSmallGram = 4;
constexpr int max_gram_rows(int64_t state_bytes) { return state_bytes == 4 ? 8 : 4; }
constexpr int gram_rows(int64_t T, int64_t state_bytes) {
  return T <= kMaxSmallGram ? static_cast<int>(T) : max_gram_rows(state_bytes);
}
constexpr int gram_groups(int rows, int64_t state_bytes) {
  return rows <= 2 ? 4 : rows < max_gram_rows(state_bytes) ? 2 : 1;
}

// One block on each multiprocessor; with more rows, more registers for every thread.
constexpr int gram_threads(int rows) { return rows <= 4 ? 512 : 384; }

// Entries of a tile, and what fills them up to a power of two.
constexpr int gram_entries(int rows) {
  int entries = 1;
  while (entries < rows * rows) entries *= 2;
  return entries;
}

struct GramPlan {
  int rows;
  int64_t tiles;
  int tiles_at_once;  // in one pass over all columns, each of which is as many warps' as a block has room for
  int64_t units;
  int64_t grid;
  int threads;
  int64_t workspace;  // numbers
};

GramPlan plan_gram(int64_t T, int64_t P, int64_t state_bytes, const Device& device);

// --- balance_

// Registers of half a multiprocessor's threads: as many bytes in flight as a full one could have, and no spills.
constexpr int kBalanceThreads = 512;

// Phase 1 takes the rows in blocks of up to so many, as even as can be: what the kernel is compiled for.
constexpr int kMaxSlots = 4;
constexpr int balance_slots(int64_t T) {
  const int64_t blocks = ceil_div(T, kMaxSlots);
  return static_cast<int>(ceil_div(T, blocks));
}

// With few rows, several spans of each are in flight instead; fewer where a word is more columns to work on.
constexpr int balance_groups(int slots, int64_t state_bytes) {
  if (state_bytes == 2) return 1;
  return slots == 1 ? 4 : slots <= 3 ? 2 : 1;
}

struct BalancePlan {
  int slots;  // rows of a block
  int64_t units;
  int64_t grid;
  int threads;
  int64_t kept;  // words of state that every thread keeps in shared memory from phase 1 to phase 2
  int64_t shared_bytes;
  int64_t shared_limit;  // the most that any problem of this state takes on this device
  bool cooperative;      // else two launches
  int64_t workspace;     // numbers
};

BalancePlan plan_balance(int64_t T, int64_t P, int64_t state_bytes, const Device& device);

}  // namespace dbmtl_fused::cuda
