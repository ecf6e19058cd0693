#include "host.h"

#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cpu/launch.h"

namespace dbmtl_fused::cpu {
namespace {

const Checks kOnCpu(torch::headeronly::DeviceType::CPU);

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace

void begin_step(const Tensor& losses, const std::optional<Tensor>& active, const Tensor& scale, const Tensor& step,
                double beta, double beta_sigma, int64_t micro_batches, std::optional<double> log_eps, bool accumulate,
                const Tensor& seeds, const Tensor& betas, const Tensor& inv_scale, const Tensor& found_inf) {
  with_begin_types(losses, betas, [&](auto loss, auto real) {
    launch_begin_step(kOnCpu.begin_step_of<decltype(loss), decltype(real)>(
        losses, active, scale, step, beta, beta_sigma, micro_batches, log_eps, accumulate, seeds, betas, inv_scale,
        found_inf));
  });
}

void ema_update_(const Tensor& row, const std::vector<std::optional<Tensor>>& grads, const std::vector<int64_t>& slots,
                 const Tensor& segments, const Tensor& /*chunks*/, const Tensor& beta, const Tensor& inv_scale,
                 const std::optional<Tensor>& seed, const Tensor& partials, const Tensor& sq_norm,
                 const Tensor& found_inf, const Tensor& /*arrivals*/, bool accumulate) {
  STD_TORCH_CHECK(row.dim() == 1, "row must have shape (P,), got ", shape_of(row));
  STD_TORCH_CHECK(partials.dim() == 1, "partials must have shape (C,), got ", shape_of(partials));
  const int64_t P = row.size(0), C = partials.size(0);
  const std::vector<Gradient> gradients = kOnCpu.gradients_of(grads, slots, segments, P, C);

  with_state_type(row, "row", [&](auto element) {
    using State = decltype(element);
    using Real = RealOf<State>;
    EmaUpdate<State> args;
    args.row = kOnCpu.vector<State>(row, "row", P);
    args.gradients = gradients.data();
    args.num_gradients = static_cast<int64_t>(gradients.size());
    args.beta = kOnCpu.scalar<Real>(beta, "beta");
    args.inv_scale = kOnCpu.scalar<Real>(inv_scale, "inv_scale");
    args.seed = kOnCpu.seed_of(seed, row, "row");
    args.partials = kOnCpu.vector<Real>(partials, "partials", C);
    args.C = C;
    args.sq_norm = kOnCpu.scalar<Real>(sq_norm, "sq_norm");
    args.found_inf = kOnCpu.scalar<float>(found_inf, "found_inf");
    args.accumulate = accumulate;
    launch_ema_update(args, parallel_for);
  });
}

void combine(const Tensor& ema, const Tensor& sq_norms, const std::optional<Tensor>& preference,
             const Tensor& found_inf, const Tensor& scale, StringHandle alpha, double alpha_constant, double eps,
             bool accumulate, const Tensor& out, const Tensor& norms, const Tensor& weights, const Tensor& alpha_value,
             const Tensor& out_sq_norm, const std::optional<Tensor>& step, const Tensor& arrivals) {
  const Alpha mode = parse_alpha(alpha);
  check_matrix(ema, "ema");
  const int64_t T = ema.size(0), P = ema.size(1);
  check_vector(out, "out", P);
  kOnCpu.scalar<int32_t>(arrivals, "arrivals");

  with_state_type(ema, "ema", [&](auto element) {
    using State = decltype(element);
    using Real = RealOf<State>;
    Combine<State> args;
    args.ema = kOnCpu.data_of<State>(ema, "ema");
    args.ema_stride = ema.stride(0);
    args.T = T;
    args.P = P;
    args.sq_norms = kOnCpu.vector<Real>(sq_norms, "sq_norms", T);
    args.found_inf = kOnCpu.scalar<float>(found_inf, "found_inf");
    args.scale = kOnCpu.scalar<Real>(scale, "scale");
    args.weighting = kOnCpu.weighting_of<Real>(mode, alpha_constant, eps, preference, norms, weights, T);
    args.accumulate = accumulate;
    args.out_dtype = kOnCpu.dtype_of(out, "out");
    args.out = out.data_ptr();
    args.alpha_value = kOnCpu.scalar<Real>(alpha_value, "alpha_value");
    args.out_sq_norm = kOnCpu.scalar<Real>(out_sq_norm, "out_sq_norm");
    args.step = step ? kOnCpu.scalar<int64_t>(*step, "step") : nullptr;
    launch_combine(args, parallel_for);
  });
}

void gram(const Tensor& ema, const Tensor& out, const Tensor& arrivals) {
  check_matrix(ema, "ema");
  kOnCpu.scalar<int32_t>(arrivals, "arrivals");

  with_state_type(ema, "ema", [&](auto element) {
    using State = decltype(element);
    Gram<State> args;
    args.ema = kOnCpu.data_of<State>(ema, "ema");
    args.ema_stride = ema.stride(0);
    args.T = ema.size(0);
    args.P = ema.size(1);
    args.out = kOnCpu.square<RealOf<State>>(out, "out", args.T);
    launch_gram(args, parallel_for);
  });
}

void balance_(const Tensor& ema, const Tensor& grads, const Tensor& beta, const std::optional<Tensor>& seed,
              StringHandle alpha, double alpha_constant, double eps, const Tensor& out, const Tensor& norms,
              const Tensor& weights, const Tensor& found_inf) {
  const Alpha mode = parse_alpha(alpha);
  check_matrix(ema, "ema");
  check_matrix(grads, "grads");
  const int64_t T = ema.size(0), P = ema.size(1);
  STD_TORCH_CHECK(grads.size(0) == T && grads.size(1) == P, "grads must have ema's shape ", shape_of(ema), ", got ",
                  shape_of(grads));
  check_vector(out, "out", P);

  with_state_type(ema, "ema", [&](auto element) {
    using State = decltype(element);
    using Real = RealOf<State>;
    Balance<State> args;
    args.ema = kOnCpu.data_of<State>(ema, "ema");
    args.ema_stride = ema.stride(0);
    args.grads_dtype = kOnCpu.dtype_of(grads, "grads");
    args.grads = grads.data_ptr();
    args.grads_stride = grads.stride(0);
    args.T = T;
    args.P = P;
    args.beta = kOnCpu.scalar<Real>(beta, "beta");
    args.seed = kOnCpu.seed_of(seed, ema, "ema");
    args.weighting = kOnCpu.weighting_of<Real>(mode, alpha_constant, eps, std::nullopt, norms, weights, T);
    args.out_dtype = kOnCpu.dtype_of(out, "out");
    args.out = out.data_ptr();
    args.found_inf = kOnCpu.scalar<float>(found_inf, "found_inf");
    launch_balance(args, parallel_for);
  });
}

}  // namespace dbmtl_fused::cpu
