// What host.cpp asks of a backend: every operator as a function on raw pointers. No torch types, so that kernels
// compile and can be tested without torch. Symbols and shapes are those of dbmtl_fused/_ops.py; State is float or
// double.
#pragma once

#include <cstdint>
#include <functional>

namespace dbmtl_fused {

constexpr int64_t kChunk = 4096;  // CHUNK of _ops.py: columns summed into one partial squared norm

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Element type of gradients and of `out`; the state's is the template argument.
enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat64 ? 8 : 2; }

// Address of data[index].
inline const void* element(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * size_of(dtype);
}

enum class Alpha : uint8_t { kMax, kMin, kMean, kMedian, kConstant, kNone };

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
  State* row;  // (P,)
  const Gradient* gradients;
  int64_t num_gradients;
  const State* beta;
  const State* inv_scale;
  State* partials;  // (C,)
  int64_t C;
  State* sq_norm;
  float* found_inf;
  bool accumulate;
};

// How squared norms become weights.
template <class State>
struct Weighting {
  Alpha alpha;
  double alpha_constant;
  double eps;
  State* norms;    // (T,)
  State* weights;  // (T,)
};

template <class State>
struct Combine {
  const State* ema;  // (T, P)
  int64_t ema_stride;
  int64_t T;
  int64_t P;
  const State* sq_norms;  // (T,)
  const float* found_inf;
  const State* scale;
  Weighting<State> weighting;
  bool accumulate;
  void* out;  // (P,)
  DType out_dtype;
  State* alpha_value;
};

template <class State>
struct Balance {
  State* ema;  // (T, P)
  int64_t ema_stride;
  const void* grads;  // (T, P)
  DType grads_dtype;
  int64_t grads_stride;
  int64_t T;
  int64_t P;
  const State* beta;
  Weighting<State> weighting;
  void* out;  // (P,)
  DType out_dtype;
  float* found_inf;
};

namespace cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, count), each on a thread of its own and no shorter than
// `grain` except for the last. The same count and grain give the same thread the same range: kernels count on it for
// cache reuse, not for their results.
using ParallelFor = void (*)(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body);

template <class State>
void launch_ema_update(const EmaUpdate<State>& args, ParallelFor parallel_for);

template <class State>
void launch_combine(const Combine<State>& args, ParallelFor parallel_for);

template <class State>
void launch_balance(const Balance<State>& args, ParallelFor parallel_for);

}  // namespace cpu
}  // namespace dbmtl_fused
