#include "checks.h"

namespace dbmtl_fused {

std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

std::string shape_of(const Tensor& tensor) {
  std::string sizes;
  for (int64_t size : tensor.sizes()) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  return "(" + sizes + (tensor.dim() == 1 ? ",)" : ")");
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

void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) >= 1, name, " must have shape (T, P) with T >= 1, got ",
                  shape_of(tensor));
  check_columns_adjacent(tensor, name);
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

void Checks::check_device(const Tensor& tensor, const char* name) const {
  if (device_.is_cpu()) {
    STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  } else {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_.index(), name,
                    " must be on cuda:", device_.index());
  }
}

DType Checks::dtype_of(const Tensor& tensor, const char* name) const {
  check_device(tensor, name);
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
                      name_of(tensor.scalar_type()));
  }
}

const int64_t* Checks::seed_of(const std::optional<Tensor>& seed, const Tensor& state, const char* state_name) const {
  const ScalarType found = state.scalar_type();
  STD_TORCH_CHECK(seed.has_value() == (found == ScalarType::BFloat16), "seed must be given if and only if ", state_name,
                  " is bfloat16, got ", seed ? "one" : "none", " for ", name_of(found));
  return seed ? scalar<int64_t>(*seed, "seed") : nullptr;
}

std::vector<Gradient> Checks::gradients_of(const std::vector<std::optional<Tensor>>& grads,
                                           const std::vector<int64_t>& slots, const Tensor& segments, int64_t P,
                                           int64_t C) const {
  STD_TORCH_CHECK(segments.dim() == 2 && segments.size(1) == 3 && segments.is_contiguous(),
                  "segments must be contiguous, of shape (S, 3), got ", shape_of(segments));
  STD_TORCH_CHECK(grads.size() == slots.size(), "grads and slots must be of the same length, got ", grads.size(),
                  " and ", slots.size());
  const int64_t* const table = Checks(torch::headeronly::DeviceType::CPU).data_of<int64_t>(segments, "segments");
  const int64_t S = segments.size(0);
  std::vector<Gradient> gradients;
  gradients.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    STD_TORCH_CHECK(slots[i] >= 0 && slots[i] < S, "slots must be below the ", S, " rows of segments, got ", slots[i]);
    gradients.push_back(gradient_of(grads[i], table + 3 * slots[i], P, C));
  }
  return gradients;
}

Gradient Checks::gradient_of(const std::optional<Tensor>& grad, const int64_t* segment, int64_t P, int64_t C) const {
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

}  // namespace dbmtl_fused
