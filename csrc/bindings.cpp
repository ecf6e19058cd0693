// The module dbmtl_fused._C: registers the operators' implementations on import and says how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <iterator>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "host.h"

namespace dbmtl_fused {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

std::string target_version() {  // 0xMMmmpp..., see torch/headeronly/version.h
  constexpr uint64_t kVersion = TORCH_TARGET_VERSION;
  return std::to_string(kVersion >> 56) + "." + std::to_string(kVersion >> 48 & 0xff);
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = kCompiler;
  info["cxx_standard"] = static_cast<int64_t>(__cplusplus);
  info["torch_target"] = target_version();
  info["cpu_isa_levels"] = std::vector<std::string>(std::begin(cpu::kIsaNames), std::end(cpu::kIsaNames));
  info["cpu_isa"] = cpu::kIsaNames[static_cast<int>(cpu::isa())];
  return info;
}

}  // namespace
}  // namespace dbmtl_fused

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native operators of dbmtl_fused.";
  module.def("build_info", &dbmtl_fused::build_info, "What this module was compiled with, and what it runs on.");
}

STABLE_TORCH_LIBRARY_IMPL(dbmtl_fused, CPU, library) {
  library.impl("begin_step.cpu", TORCH_BOX(&dbmtl_fused::cpu::begin_step));
  library.impl("ema_update_.cpu", TORCH_BOX(&dbmtl_fused::cpu::ema_update_));
  library.impl("combine.cpu", TORCH_BOX(&dbmtl_fused::cpu::combine));
  library.impl("gram.cpu", TORCH_BOX(&dbmtl_fused::cpu::gram));
  library.impl("balance_.cpu", TORCH_BOX(&dbmtl_fused::cpu::balance_));
}
