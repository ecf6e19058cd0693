// The operators as the dispatcher calls them; contracts in dbmtl_fused/_ops.py. What would corrupt memory raises.
// Nothing here waits for the device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace dbmtl_fused::cuda {

using torch::stable::Tensor;

void begin_step(const Tensor& losses, const std::optional<Tensor>& active, const Tensor& scale, const Tensor& step,
                double beta, double beta_sigma, int64_t micro_batches, std::optional<double> log_eps, bool accumulate,
                const Tensor& seeds, const Tensor& betas, const Tensor& inv_scale, const Tensor& found_inf);

// `chunks` and the slots they name are taken on trust: they are on the device.
void ema_update_(const Tensor& row, const std::vector<std::optional<Tensor>>& grads, const std::vector<int64_t>& slots,
                 const Tensor& segments, const Tensor& chunks, const Tensor& beta, const Tensor& inv_scale,
                 const std::optional<Tensor>& seed, const Tensor& partials, const Tensor& sq_norm,
                 const Tensor& found_inf, const Tensor& arrivals, bool accumulate);

// `alpha` is an owned handle: unboxing to std::string leaks the string (torch 2.11 to 2.13).
void combine(const Tensor& ema, const Tensor& sq_norms, const std::optional<Tensor>& preference,
             const Tensor& found_inf, const Tensor& scale, StringHandle alpha, double alpha_constant, double eps,
             bool accumulate, const Tensor& out, const Tensor& norms, const Tensor& weights, const Tensor& alpha_value,
             const Tensor& out_sq_norm, const std::optional<Tensor>& step, const Tensor& arrivals);

void gram(const Tensor& ema, const Tensor& out, const Tensor& arrivals);

void balance_(const Tensor& ema, const Tensor& grads, const Tensor& beta, const std::optional<Tensor>& seed,
              StringHandle alpha, double alpha_constant, double eps, const Tensor& out, const Tensor& norms,
              const Tensor& weights, const Tensor& found_inf);

}  // namespace dbmtl_fused::cuda
