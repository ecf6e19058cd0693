#include "host.h"

#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "launch.h"
#include "stream.h"

namespace dbmtl_fused::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, const DeviceOf& device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device.index()), "cudaDeviceGetAttribute");
  return value;
}

Device properties_of(const DeviceOf& device) {
  return {attribute(cudaDevAttrMultiProcessorCount, device), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrCooperativeLaunch, device) != 0};
}

// Numbers of the type of `like`, on the current stream; null if there are none. Freed memory is reused in stream order.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t size) {
    if (size > 0) memory_ = torch::stable::new_empty(like, {size});
  }

  template <class Real>
  Real* data() const {
    return memory_ ? static_cast<Real*>(memory_->data_ptr()) : nullptr;
  }

 private:
  std::optional<Tensor> memory_;
};

}  // namespace

void begin_step(const Tensor& losses, const std::optional<Tensor>& active, const Tensor& scale, const Tensor& step,
                double beta, double beta_sigma, int64_t micro_batches, std::optional<double> log_eps, bool accumulate,
                const Tensor& seeds, const Tensor& betas, const Tensor& inv_scale, const Tensor& found_inf) {
  const Checks checks(losses.device());
  with_begin_types(losses, betas, [&](auto loss, auto real) {
    const auto args = checks.begin_step_of<decltype(loss), decltype(real)>(
        losses, active, scale, step, beta, beta_sigma, micro_batches, log_eps, accumulate, seeds, betas, inv_scale,
        found_inf);
    const DeviceOf device(losses);
    check(launch_begin_step(args, device.stream()), "begin_step");
  });
}

void ema_update_(const Tensor& row, const std::vector<std::optional<Tensor>>& grads, const std::vector<int64_t>& slots,
                 const Tensor& segments, const Tensor& chunks, const Tensor& beta, const Tensor& inv_scale,
                 const std::optional<Tensor>& seed, const Tensor& partials, const Tensor& sq_norm,
                 const Tensor& found_inf, const Tensor& arrivals, bool accumulate) {
  STD_TORCH_CHECK(row.dim() == 1, "row must have shape (P,), got ", shape_of(row));
  STD_TORCH_CHECK(partials.dim() == 1, "partials must have shape (C,), got ", shape_of(partials));
  const int64_t P = row.size(0), C = partials.size(0);
  const Checks checks(row.device());
  const std::vector<Gradient> gradients = checks.gradients_of(grads, slots, segments, P, C);
  STD_TORCH_CHECK(chunks.dim() == 2 && chunks.size(0) == C && chunks.size(1) == 3 && chunks.is_contiguous(),
                  "chunks must be contiguous, of shape (", C, ", 3), got ", shape_of(chunks));
  const Chunks table{checks.data_of<int64_t>(chunks, "chunks"), slots.data(),
                     checks.scalar<int32_t>(arrivals, "arrivals")};

  with_state_type(row, "row", [&](auto element) {
    using State = decltype(element);
    using Real = RealOf<State>;
    EmaUpdate<State> args;
    args.row = checks.vector<State>(row, "row", P);
    args.gradients = gradients.data();
    args.num_gradients = static_cast<int64_t>(gradients.size());
    args.beta = checks.scalar<Real>(beta, "beta");
    args.inv_scale = checks.scalar<Real>(inv_scale, "inv_scale");
    args.seed = checks.seed_of(seed, row, "row");
    args.partials = checks.vector<Real>(partials, "partials", C);
    args.C = C;
    args.sq_norm = checks.scalar<Real>(sq_norm, "sq_norm");
    args.found_inf = checks.scalar<float>(found_inf, "found_inf");
    args.accumulate = accumulate;
    const DeviceOf device(row);
    check(launch_ema_update(args, table, device.stream()), "ema_update_");
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
  const Checks checks(ema.device());
  int32_t* const counter = checks.scalar<int32_t>(arrivals, "arrivals");

  with_state_type(ema, "ema", [&](auto element) {
    using State = decltype(element);
    using Real = RealOf<State>;
    Combine<State> args;
    args.ema = checks.data_of<State>(ema, "ema");
    args.ema_stride = ema.stride(0);
    args.T = T;
    args.P = P;
    args.sq_norms = checks.vector<Real>(sq_norms, "sq_norms", T);
    args.found_inf = checks.scalar<float>(found_inf, "found_inf");
    args.scale = checks.scalar<Real>(scale, "scale");
    args.weighting = checks.weighting_of<Real>(mode, alpha_constant, eps, preference, norms, weights, T);
    args.accumulate = accumulate;
    args.out_dtype = checks.dtype_of(out, "out");
    args.out = out.data_ptr();
    args.alpha_value = checks.scalar<Real>(alpha_value, "alpha_value");
    args.out_sq_norm = checks.scalar<Real>(out_sq_norm, "out_sq_norm");
    args.step = step ? checks.scalar<int64_t>(*step, "step") : nullptr;
    const DeviceOf device(ema);
    const CombinePlan plan = plan_combine(T, P, sizeof(State), properties_of(device));
    const Workspace workspace(weights, plan.workspace);
    check(launch_combine(args, plan, workspace.data<Real>(), counter, device.stream()), "combine");
  });
}

void gram(const Tensor& ema, const Tensor& out, const Tensor& arrivals) {
  check_matrix(ema, "ema");
  const int64_t T = ema.size(0), P = ema.size(1);
  const Checks checks(ema.device());
  int32_t* const counter = checks.scalar<int32_t>(arrivals, "arrivals");

  with_state_type(ema, "ema", [&](auto element) {
    using State = decltype(element);
    using Real = RealOf<State>;
    Gram<State> args;
    args.ema = checks.data_of<State>(ema, "ema");
    args.ema_stride = ema.stride(0);
    args.T = T;
    args.P = P;
    args.out = checks.square<Real>(out, "out", T);
    const DeviceOf device(ema);
    const GramPlan plan = plan_gram(T, P, sizeof(State), properties_of(device));
    const Workspace workspace(out, plan.workspace);
    check(launch_gram(args, plan, workspace.data<Real>(), counter, device.stream()), "gram");
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
  const Checks checks(ema.device());

  with_state_type(ema, "ema", [&](auto element) {
    using State = decltype(element);
    using Real = RealOf<State>;
    Balance<State> args;
    args.ema = checks.data_of<State>(ema, "ema");
    args.ema_stride = ema.stride(0);
    args.grads_dtype = checks.dtype_of(grads, "grads");
    args.grads = grads.data_ptr();
    args.grads_stride = grads.stride(0);
    args.T = T;
    args.P = P;
    args.beta = checks.scalar<Real>(beta, "beta");
    args.seed = checks.seed_of(seed, ema, "ema");
    args.weighting = checks.weighting_of<Real>(mode, alpha_constant, eps, std::nullopt, norms, weights, T);
    args.out_dtype = checks.dtype_of(out, "out");
    args.out = out.data_ptr();
    args.found_inf = checks.scalar<float>(found_inf, "found_inf");
    const DeviceOf device(ema);
    const BalancePlan plan = plan_balance(T, P, sizeof(State), properties_of(device));
    const Workspace workspace(weights, plan.workspace);
    check(launch_balance(args, plan, workspace.data<Real>(), device.stream()), "balance_");
  });
}

}  // namespace dbmtl_fused::cuda
