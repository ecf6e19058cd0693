#include "host.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>
#include <type_traits>

#include "launch.h"

namespace dbmtl_fused::cpu {
namespace {

using torch::headeronly::ScalarType;

template <class Element>
constexpr ScalarType kScalarType = std::is_same_v<Element, float>    ? ScalarType::Float
                                   : std::is_same_v<Element, double> ? ScalarType::Double
                                                                     : ScalarType::Long;

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

std::string shape_of(const Tensor& tensor) {
  std::string sizes;
  for (int64_t size : tensor.sizes()) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  return "(" + sizes + (tensor.dim() == 1 ? ",)" : ")");
}

void check_on_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
}

// The checks below return what they have checked: an address that is good for the elements asked for.

template <class Element>
Element* data_of(const Tensor& tensor, const char* name) {
  check_on_cpu(tensor, name);
  const ScalarType found = tensor.scalar_type();
  STD_TORCH_CHECK(found == kScalarType<Element>, name, " must be ", torch::headeronly::toString(kScalarType<Element>),
                  ", got ", torch::headeronly::toString(found));
  return static_cast<Element*>(tensor.data_ptr());
}

template <class Element>
Element* scalar(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1, name, " must have one element, got shape ", shape_of(tensor));
  return data_of<Element>(tensor, name);
}

void check_columns_adjacent(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.stride(last) == 1 || tensor.size(last) <= 1, name, " must have adjacent columns, got stride ",
                  tensor.stride(last));
}

void check_vector(const Tensor& tensor, const char* name, int64_t size) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, " must have shape (", size, ",), got ",
                  shape_of(tensor));
  check_columns_adjacent(tensor, name);
}

template <class Element>
Element* vector(const Tensor& tensor, const char* name, int64_t size) {
  check_vector(tensor, name, size);
  return data_of<Element>(tensor, name);
}

void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) >= 1, name, " must have shape (T, P) with T >= 1, got ",
                  shape_of(tensor));
  check_columns_adjacent(tensor, name);
}

DType dtype_of(const Tensor& tensor, const char* name) {
  check_on_cpu(tensor, name);
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// body(float{}) or body(double{}), after the dtype of the state.
template <class Body>
void with_state_type(const Tensor& state, const char* name, const Body& body) {
  const ScalarType found = state.scalar_type();
  if (found == ScalarType::Float) return body(float{});
  if (found == ScalarType::Double) return body(double{});
  STD_TORCH_CHECK(false, name, " must be float32 or float64, got ", torch::headeronly::toString(found));
}

Alpha parse_alpha(StringHandle handle) {
  size_t length = 0;
  const char* text = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
  const std::string mode(text, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  if (mode == "max") return Alpha::kMax;
  if (mode == "min") return Alpha::kMin;
  if (mode == "mean") return Alpha::kMean;
  if (mode == "median") return Alpha::kMedian;
  if (mode == "constant") return Alpha::kConstant;
  if (mode == "none") return Alpha::kNone;
  STD_TORCH_CHECK(false, "alpha must be max, min, mean, median, constant or none, got ", mode);
}

template <class State>
Weighting<State> weighting_of(Alpha alpha, double alpha_constant, double eps, const Tensor& norms,
                              const Tensor& weights, int64_t T) {
  return {alpha, alpha_constant, eps, vector<State>(norms, "norms", T), vector<State>(weights, "weights", T)};
}

// A gradient of any shape and stride, read as its first numel elements in memory.
Gradient gradient_of(const std::optional<Tensor>& grad, const int64_t* segment, int64_t P, int64_t C) {
  const int64_t start = segment[0], numel = segment[1], first_chunk = segment[2];
  STD_TORCH_CHECK(start >= 0 && numel >= 0 && start <= P - numel, "segments must lie in row's ", P,
                  " columns, got start ", start, " and numel ", numel);
  STD_TORCH_CHECK(first_chunk >= 0 && first_chunk <= C - ceil_div(numel, kChunk), "the chunks of segments must lie in ",
                  C, " partials, got numel ", numel, " and first_chunk ", first_chunk);
  if (!grad) return {nullptr, DType::kFloat32, start, numel, first_chunk};

  STD_TORCH_CHECK(grad->numel() == numel, "grads must have as many elements as their segments, got ", grad->numel(),
                  " for ", numel);
  const DType dtype = dtype_of(*grad, "grads");
  int64_t storage_bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(grad->get(), &storage_bytes));
  STD_TORCH_CHECK((grad->storage_offset() + numel) * size_of(dtype) <= storage_bytes,
                  "grads must be dense, got a view of shape ", shape_of(*grad), " that repeats elements");
  return {grad->data_ptr(), dtype, start, numel, first_chunk};
}

}  // namespace

void ema_update_(const Tensor& row, const std::vector<std::optional<Tensor>>& grads, const std::vector<int64_t>& slots,
                 const Tensor& segments, const Tensor& beta, const Tensor& inv_scale, const Tensor& partials,
                 const Tensor& sq_norm, const Tensor& found_inf, bool accumulate) {
  STD_TORCH_CHECK(row.dim() == 1, "row must have shape (P,), got ", shape_of(row));
  STD_TORCH_CHECK(partials.dim() == 1, "partials must have shape (C,), got ", shape_of(partials));
  STD_TORCH_CHECK(segments.dim() == 2 && segments.size(1) == 3 && segments.is_contiguous(),
                  "segments must be contiguous, of shape (S, 3), got ", shape_of(segments));
  STD_TORCH_CHECK(grads.size() == slots.size(), "grads and slots must be of the same length, got ", grads.size(),
                  " and ", slots.size());
  const int64_t P = row.size(0), C = partials.size(0), S = segments.size(0);
  const int64_t* const table = data_of<int64_t>(segments, "segments");

  std::vector<Gradient> gradients;
  gradients.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    STD_TORCH_CHECK(slots[i] >= 0 && slots[i] < S, "slots must be below the ", S, " rows of segments, got ", slots[i]);
    gradients.push_back(gradient_of(grads[i], table + 3 * slots[i], P, C));
  }

  with_state_type(row, "row", [&](auto element) {
    using State = decltype(element);
    EmaUpdate<State> args;
    args.row = vector<State>(row, "row", P);
    args.gradients = gradients.data();
    args.num_gradients = static_cast<int64_t>(gradients.size());
    args.beta = scalar<State>(beta, "beta");
    args.inv_scale = scalar<State>(inv_scale, "inv_scale");
    args.partials = vector<State>(partials, "partials", C);
    args.C = C;
    args.sq_norm = scalar<State>(sq_norm, "sq_norm");
    args.found_inf = scalar<float>(found_inf, "found_inf");
    args.accumulate = accumulate;
    launch_ema_update(args, parallel_for);
  });
}

void combine(const Tensor& ema, const Tensor& sq_norms, const Tensor& found_inf, const Tensor& scale,
             StringHandle alpha, double alpha_constant, double eps, bool accumulate, const Tensor& out,
             const Tensor& norms, const Tensor& weights, const Tensor& alpha_value) {
  const Alpha mode = parse_alpha(alpha);
  check_matrix(ema, "ema");
  const int64_t T = ema.size(0), P = ema.size(1);
  check_vector(out, "out", P);

  with_state_type(ema, "ema", [&](auto element) {
    using State = decltype(element);
    Combine<State> args;
    args.ema = data_of<State>(ema, "ema");
    args.ema_stride = ema.stride(0);
    args.T = T;
    args.P = P;
    args.sq_norms = vector<State>(sq_norms, "sq_norms", T);
    args.found_inf = scalar<float>(found_inf, "found_inf");
    args.scale = scalar<State>(scale, "scale");
    args.weighting = weighting_of<State>(mode, alpha_constant, eps, norms, weights, T);
    args.accumulate = accumulate;
    args.out_dtype = dtype_of(out, "out");
    args.out = out.data_ptr();
    args.alpha_value = scalar<State>(alpha_value, "alpha_value");
    launch_combine(args, parallel_for);
  });
}

void balance_(const Tensor& ema, const Tensor& grads, const Tensor& beta, StringHandle alpha, double alpha_constant,
              double eps, const Tensor& out, const Tensor& norms, const Tensor& weights, const Tensor& found_inf) {
  const Alpha mode = parse_alpha(alpha);
  check_matrix(ema, "ema");
  check_matrix(grads, "grads");
  const int64_t T = ema.size(0), P = ema.size(1);
  STD_TORCH_CHECK(grads.size(0) == T && grads.size(1) == P, "grads must have ema's shape ", shape_of(ema), ", got ",
                  shape_of(grads));
  check_vector(out, "out", P);

  with_state_type(ema, "ema", [&](auto element) {
    using State = decltype(element);
    Balance<State> args;
    args.ema = data_of<State>(ema, "ema");
    args.ema_stride = ema.stride(0);
    args.grads_dtype = dtype_of(grads, "grads");
    args.grads = grads.data_ptr();
    args.grads_stride = grads.stride(0);
    args.T = T;
    args.P = P;
    args.beta = scalar<State>(beta, "beta");
    args.weighting = weighting_of<State>(mode, alpha_constant, eps, norms, weights, T);
    args.out_dtype = dtype_of(out, "out");
    args.out = out.data_ptr();
    args.found_inf = scalar<float>(found_inf, "found_inf");
    launch_balance(args, parallel_for);
  });
}

}  // namespace dbmtl_fused::cpu
