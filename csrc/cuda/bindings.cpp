// The module dbmtl_fused._C_cuda: registers the operators' implementations on import, shows launch plans, and says how
// it was built. A module of its own, so that the CPU's also loads under a torch without CUDA.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <vector>

#include "host.h"
#include "plan.h"

#ifndef DBMTL_DISPATCH_KEY
#define DBMTL_DISPATCH_KEY CUDA
#endif
#ifndef DBMTL_CUDA_ARCHITECTURES
#define DBMTL_CUDA_ARCHITECTURES ""
#endif
// The library's macro pastes its arguments.
#define DBMTL_LIBRARY_IMPL(key, library) STABLE_TORCH_LIBRARY_IMPL(dbmtl_fused, key, library)

namespace dbmtl_fused::cuda {
namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["cuda_runtime"] = CUDART_VERSION;
  info["cuda_architectures"] = DBMTL_CUDA_ARCHITECTURES;
  return info;
}

pybind11::dict balance_plan(int64_t T, int64_t P, int64_t state_bytes, int64_t sms, int64_t shared_bytes,
                            bool cooperative) {
  const BalancePlan plan = plan_balance(T, P, state_bytes, {sms, shared_bytes, cooperative});
  pybind11::dict shown;
  shown["slots"] = plan.slots;
  shown["unit_columns"] = unit_columns(state_bytes, balance_groups(plan.slots, state_bytes));
  shown["units"] = plan.units;
  shown["grid"] = plan.grid;
  shown["threads"] = plan.threads;
  shown["kept"] = plan.kept;
  shown["shared_bytes"] = plan.shared_bytes;
  shown["cooperative"] = plan.cooperative;
  shown["workspace"] = plan.workspace;
  return shown;
}

pybind11::dict combine_plan(int64_t T, int64_t P, int64_t state_bytes, int64_t sms) {
  const CombinePlan plan = plan_combine(T, P, state_bytes, {sms, 0, true});
  pybind11::dict shown;
  shown["rows"] = plan.rows;
  shown["unit_columns"] = unit_columns(state_bytes, combine_groups(plan.rows));
  shown["units"] = plan.units;
  shown["grid"] = plan.grid;
  shown["threads"] = plan.threads;
  shown["workspace"] = plan.workspace;
  return shown;
}

pybind11::dict gram_plan(int64_t T, int64_t P, int64_t state_bytes, int64_t sms) {
  const GramPlan plan = plan_gram(T, P, state_bytes, {sms, 0, true});
  pybind11::dict shown;
  shown["rows"] = plan.rows;
  shown["tiles"] = plan.tiles;
  shown["tiles_at_once"] = plan.tiles_at_once;
  shown["unit_columns"] = unit_columns(state_bytes, gram_groups(plan.rows, state_bytes));
  shown["units"] = plan.units;
  shown["grid"] = plan.grid;
  shown["threads"] = plan.threads;
  shown["workspace"] = plan.workspace;
  return shown;
}

// `segments`: (start, numel, first_chunk) of every slot; returns (first_slot, num_slots, first_chunk, num_chunks) of
// every launch.
std::vector<std::vector<int64_t>> ema_update_plan(const std::vector<std::vector<int64_t>>& segments,
                                                  const std::vector<int64_t>& slots) {
  std::vector<Gradient> gradients;
  for (int64_t slot : slots) {
    const auto& segment = segments.at(slot);
    gradients.push_back({nullptr, DType::kFloat32, segment.at(0), segment.at(1), segment.at(2)});
  }
  std::vector<std::vector<int64_t>> shown;
  for (const EmaUpdateLaunch& launch :
       plan_ema_update(gradients.data(), slots.data(), static_cast<int64_t>(slots.size())))
    shown.push_back({launch.first_slot, launch.num_slots, launch.first_chunk, launch.num_chunks});
  return shown;
}

}  // namespace
}  // namespace dbmtl_fused::cuda

PYBIND11_MODULE(_C_cuda, module) {
  namespace py = pybind11;
  namespace cuda = dbmtl_fused::cuda;
  module.doc() = "CUDA operators of dbmtl_fused.";
  module.def("build_info", &cuda::build_info, "What this module was compiled with.");
  module.def("balance_plan", &cuda::balance_plan, "How balance_ would be launched.", py::arg("T"), py::arg("P"),
             py::kw_only(), py::arg("state_bytes") = 4, py::arg("sms"), py::arg("shared_bytes"),
             py::arg("cooperative") = true);
  module.def("combine_plan", &cuda::combine_plan, "How combine would be launched.", py::arg("T"), py::arg("P"),
             py::kw_only(), py::arg("state_bytes") = 4, py::arg("sms"));
  module.def("gram_plan", &cuda::gram_plan, "How gram would be launched.", py::arg("T"), py::arg("P"), py::kw_only(),
             py::arg("state_bytes") = 4, py::arg("sms"));
  module.def("ema_update_plan", &cuda::ema_update_plan, "How ema_update_ would be launched.", py::arg("segments"),
             py::arg("slots"));
}

DBMTL_LIBRARY_IMPL(DBMTL_DISPATCH_KEY, library) {
  library.impl("begin_step.cuda", TORCH_BOX(&dbmtl_fused::cuda::begin_step));
  library.impl("ema_update_.cuda", TORCH_BOX(&dbmtl_fused::cuda::ema_update_));
  library.impl("combine.cuda", TORCH_BOX(&dbmtl_fused::cuda::combine));
  library.impl("gram.cuda", TORCH_BOX(&dbmtl_fused::cuda::gram));
  library.impl("balance_.cuda", TORCH_BOX(&dbmtl_fused::cuda::balance_));
}
