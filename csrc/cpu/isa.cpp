#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

namespace dbmtl_fused::cpu {
namespace {

Isa best_of_machine() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return Isa::kAvx512f;
  if (__builtin_cpu_supports("avx2")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa choose() {
  const char* const cap = std::getenv("DBMTL_FUSED_CPU_ISA");
  if (cap == nullptr || *cap == '\0') return best_of_machine();
  const auto name = std::find(std::begin(kIsaNames), std::end(kIsaNames), std::string(cap));
  if (name == std::end(kIsaNames)) {
    std::string message = "DBMTL_FUSED_CPU_ISA must be one of";
    for (const char* known : kIsaNames) message += std::string(" ") + known;
    throw std::invalid_argument(message + ", got " + cap);
  }
  return std::min(best_of_machine(), static_cast<Isa>(name - std::begin(kIsaNames)));
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace dbmtl_fused::cpu
