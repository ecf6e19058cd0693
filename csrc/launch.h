// What a host file asks of its backend's kernels: the arguments of every operator as raw pointers. No torch types, so
// that kernels compile and can be tested without torch. Symbols and shapes are those of dbmtl_fused/_ops.py. State is
// float, double or BFloat16, Real what it is computed in. Addresses are the device's, but for that of `gradients`.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dbmtl_fused {

constexpr int64_t kChunk = 4096;  // CHUNK of _ops.py: columns summed into one partial squared norm

// NEGATIVE_LOSS_TOLERANCE of _ops.py: under the log, a loss that is no further below zero counts as zero.
constexpr double kNegativeLossTolerance = 1e-6;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct BFloat16 {
  uint16_t bits;
};

// State that is rounded stochastically.
template <class State>
constexpr bool kIsRounded = std::is_same_v<State, BFloat16>;

template <class State>
using RealOf = std::conditional_t<kIsRounded<State>, float, State>;

// ENTRY_LIMIT of _ops.py: an entry of the EMA that would be larger stays as it was, so that no squared norm overflows.
// It is a bfloat16: no random step of the rounding goes beyond it. At the other end, norms below about 1e-19 (double:
// 1e-154) count as zero, as their squares underflow.
template <class Real>
constexpr Real kEntryLimit = Real{0x1p46F};
template <>
inline constexpr double kEntryLimit<double> = 0x1p490;

// Element type of gradients and of `out`; the state's is the template argument.
enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat64 ? 8 : 2; }

// Address of data[index].
inline const void* element(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * size_of(dtype);
}

enum class Alpha : uint8_t { kMax, kMin, kMean, kMedian, kConstant, kNone };

// Loss is float or double, Real what betas are held in.
template <class Loss, class Real>
struct BeginStep {
  const Loss* losses;  // (T,)
  const bool* active;  // (T,); null: all
  int64_t T;
  const Loss* scale;
  const int64_t* step;
  double beta;
  double beta_sigma;
  int64_t micro_batches;
  bool log;  // whether log_eps counts
  double log_eps;
  bool accumulate;
  Loss* seeds;  // (T,)
  Real* betas;  // (T,)
  Real* inv_scale;
  float* found_inf;
};

// The gradient of one parameter and where its columns are.
struct Gradient {
  const void* data;  // (numel,); null counts as zeros
  DType dtype;
  int64_t start;
  int64_t numel;
  int64_t first_chunk;
};

template <class State>
struct EmaUpdate {
  using Real = RealOf<State>;

  State* row;  // (P,)
  const Gradient* gradients;
  int64_t num_gradients;
  const Real* beta;
  const Real* inv_scale;
  const int64_t* seed;  // null unless kIsRounded<State>
  Real* partials;       // (C,)
  int64_t C;
  Real* sq_norm;
  float* found_inf;
  bool accumulate;
};

// How squared norms become weights.
template <class Real>
struct Weighting {
  Alpha alpha;
  double alpha_constant;
  double eps;
  const Real* preference;  // (T,); null: 1 for all
  Real* norms;             // (T,)
  Real* weights;           // (T,)
};

template <class State>
struct Combine {
  using Real = RealOf<State>;

  const State* ema;  // (T, P)
  int64_t ema_stride;
  int64_t T;
  int64_t P;
  const Real* sq_norms;  // (T,)
  const float* found_inf;
  const Real* scale;
  Weighting<Real> weighting;
  bool accumulate;
  void* out;  // (P,)
  DType out_dtype;
  Real* alpha_value;
  Real* out_sq_norm;
  int64_t* step;  // null: not to be counted
};

template <class State>
struct Gram {
  const State* ema;  // (T, P)
  int64_t ema_stride;
  int64_t T;
  int64_t P;
  RealOf<State>* out;  // (T, T)
};

template <class State>
struct Balance {
  using Real = RealOf<State>;

  State* ema;  // (T, P)
  int64_t ema_stride;
  const void* grads;  // (T, P)
  DType grads_dtype;
  int64_t grads_stride;
  int64_t T;
  int64_t P;
  const Real* beta;
  const int64_t* seed;  // of the first row; null unless kIsRounded<State>
  Weighting<Real> weighting;
  void* out;  // (P,)
  DType out_dtype;
  float* found_inf;
};

}  // namespace dbmtl_fused
