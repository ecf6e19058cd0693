// What every backend checks before its kernels touch memory. Messages name the parameter, the rule and what was found.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "launch.h"

namespace dbmtl_fused {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

template <class Element>
constexpr ScalarType kScalarType = ScalarType::Undefined;
template <>
inline constexpr ScalarType kScalarType<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarType<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kScalarType<BFloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType kScalarType<bool> = ScalarType::Bool;
template <>
inline constexpr ScalarType kScalarType<int32_t> = ScalarType::Int;
template <>
inline constexpr ScalarType kScalarType<int64_t> = ScalarType::Long;

// As torch writes it in Python.
std::string name_of(ScalarType type);

std::string shape_of(const Tensor& tensor);

void check_columns_adjacent(const Tensor& tensor, const char* name);
void check_vector(const Tensor& tensor, const char* name, int64_t size);
void check_matrix(const Tensor& tensor, const char* name);

// Deletes the string.
Alpha parse_alpha(StringHandle handle);

// body(State{}), after the dtype of the state.
template <class Body>
void with_state_type(const Tensor& state, const char* name, const Body& body) {
  const ScalarType found = state.scalar_type();
  if (found == ScalarType::Float) return body(float{});
  if (found == ScalarType::Double) return body(double{});
  if (found == ScalarType::BFloat16) return body(BFloat16{});
  STD_TORCH_CHECK(false, name, " must be float32, float64 or bfloat16, got ", name_of(found));
}

// body(Element{}), of what is not rounded stochastically.
template <class Body>
void with_float_type(const Tensor& tensor, const char* name, const Body& body) {
  const ScalarType found = tensor.scalar_type();
  if (found == ScalarType::Float) return body(float{});
  if (found == ScalarType::Double) return body(double{});
  STD_TORCH_CHECK(false, name, " must be float32 or float64, got ", name_of(found));
}

// body(Loss{}, Real{}), after the dtypes of the losses and of the betas.
template <class Body>
void with_begin_types(const Tensor& losses, const Tensor& betas, const Body& body) {
  with_float_type(losses, "losses",
                  [&](auto loss) { with_float_type(betas, "betas", [&](auto beta) { body(loss, beta); }); });
}

// Checks of tensors that must be on one device. They return what they have checked: an address that is good there, for
// the elements asked for.
class Checks {
 public:
  // The CPU, or one GPU.
  explicit Checks(Device device) : device_(device) {}

  void check_device(const Tensor& tensor, const char* name) const;

  template <class Element>
  Element* data_of(const Tensor& tensor, const char* name) const {
    check_device(tensor, name);
    const ScalarType found = tensor.scalar_type();
    STD_TORCH_CHECK(found == kScalarType<Element>, name, " must be ", name_of(kScalarType<Element>), ", got ",
                    name_of(found));
    return static_cast<Element*>(tensor.data_ptr());
  }

  template <class Element>
  Element* scalar(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.numel() == 1, name, " must have one element, got shape ", shape_of(tensor));
    return data_of<Element>(tensor, name);
  }

  template <class Element>
  Element* vector(const Tensor& tensor, const char* name, int64_t size) const {
    check_vector(tensor, name, size);
    return data_of<Element>(tensor, name);
  }

  // Of a contiguous (size, size) matrix.
  template <class Element>
  Element* square(const Tensor& tensor, const char* name, int64_t size) const {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == size && tensor.size(1) == size && tensor.is_contiguous(),
                    name, " must have shape (", size, ", ", size, ") and be contiguous, got ", shape_of(tensor));
    return data_of<Element>(tensor, name);
  }

  // Of gradients and `out`.
  DType dtype_of(const Tensor& tensor, const char* name) const;

  // Null if there is none, as it must be unless the state is rounded.
  const int64_t* seed_of(const std::optional<Tensor>& seed, const Tensor& state, const char* state_name) const;

  template <class Real>
  Weighting<Real> weighting_of(Alpha alpha, double alpha_constant, double eps, const std::optional<Tensor>& preference,
                               const Tensor& norms, const Tensor& weights, int64_t T) const {
    return {alpha,
            alpha_constant,
            eps,
            preference ? vector<Real>(*preference, "preference", T) : nullptr,
            vector<Real>(norms, "norms", T),
            vector<Real>(weights, "weights", T)};
  }

  template <class Loss, class Real>
  BeginStep<Loss, Real> begin_step_of(const Tensor& losses, const std::optional<Tensor>& active, const Tensor& scale,
                                      const Tensor& step, double beta, double beta_sigma, int64_t micro_batches,
                                      std::optional<double> log_eps, bool accumulate, const Tensor& seeds,
                                      const Tensor& betas, const Tensor& inv_scale, const Tensor& found_inf) const {
    STD_TORCH_CHECK(losses.dim() == 1 && losses.size(0) >= 1, "losses must have shape (T,) with T >= 1, got ",
                    shape_of(losses));
    STD_TORCH_CHECK(micro_batches >= 1, "micro_batches must be >= 1, got ", micro_batches);
    const int64_t T = losses.size(0);
    return {vector<Loss>(losses, "losses", T),
            active ? vector<bool>(*active, "active", T) : nullptr,
            T,
            scalar<Loss>(scale, "scale"),
            scalar<int64_t>(step, "step"),
            beta,
            beta_sigma,
            micro_batches,
            log_eps.has_value(),
            log_eps.value_or(0),
            accumulate,
            vector<Loss>(seeds, "seeds", T),
            vector<Real>(betas, "betas", T),
            scalar<Real>(inv_scale, "inv_scale"),
            scalar<float>(found_inf, "found_inf")};
  }

  // Of ema_update_. A gradient may have any shape and stride: it is read as its first numel elements in memory.
  std::vector<Gradient> gradients_of(const std::vector<std::optional<Tensor>>& grads, const std::vector<int64_t>& slots,
                                     const Tensor& segments, int64_t P, int64_t C) const;

 private:
  Gradient gradient_of(const std::optional<Tensor>& grad, const int64_t* segment, int64_t P, int64_t C) const;

  Device device_;
};

}  // namespace dbmtl_fused
