// Which instruction set runs: the best that the CPU and the operating system support, or the one of RNNKERN_CPU_ISA.
#pragma once

#include <string>
#include <vector>

#define RNNKERN_API __attribute__((visibility("default")))  // what the Python module uses

namespace rnnkern {

enum class Isa {
  portable,
  avx2,
  avx512,
  avx512bf16,  // avx512 with products of bfloat16 and of int16 pairs (VNNI) in forward; all else is avx512's
};

RNNKERN_API const char* isa_name(Isa isa);
RNNKERN_API std::vector<std::string> supported_isas();  // built and supported by this CPU, best last
RNNKERN_API Isa current_isa();  // throws std::runtime_error if RNNKERN_CPU_ISA names none of supported_isas()
RNNKERN_API void set_isa(const std::string& name);  // throws std::runtime_error likewise

}  // namespace rnnkern
