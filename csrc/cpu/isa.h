// Instruction sets the vector loops are compiled for.
#pragma once

#include <cstdint>

namespace dbmtl_fused::cpu {

enum class Isa : uint8_t { kBaseline, kAvx2, kAvx512f };

// Those compiled in, in the order of Isa.
#if defined(__x86_64__)
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512f"};
#else
constexpr const char* kIsaNames[] = {"baseline"};
#endif

// The best one of this machine, capped by the environment variable DBMTL_FUSED_CPU_ISA (for tests: results may not
// depend on it). Throws std::invalid_argument if that is not one of kIsaNames; constant from the first call on.
Isa isa();

}  // namespace dbmtl_fused::cpu
