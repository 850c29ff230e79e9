#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "rnnkern_lists.h"

namespace rnnkern {
namespace {

bool cpu_supports(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512bf16:
      return cpu_supports(Isa::avx512) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return isa == Isa::portable;
}

std::vector<Isa> usable() {
  std::vector<Isa> isas;
#define RNNKERN_ADD(isa) \
  if (cpu_supports(Isa::isa)) isas.push_back(Isa::isa);
  RNNKERN_FOR_EACH_ISA(RNNKERN_ADD)
#undef RNNKERN_ADD
  return isas;
}

Isa find(const std::string& name) {
  std::string known;
  for (Isa isa : usable()) {
    if (name == isa_name(isa)) return isa;
    known += std::string(known.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::runtime_error("instruction set '" + name + "' is not available: expected one of " + known);
}

std::atomic<int> chosen{-1};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512bf16:
      return "avx512bf16";
  }
  return "unknown";
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : usable()) names.push_back(isa_name(isa));
  return names;
}

Isa current_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa < 0) {
    const char* forced = std::getenv("RNNKERN_CPU_ISA");
    isa = int(forced && *forced ? find(forced) : usable().back());
    chosen.store(isa, std::memory_order_relaxed);
  }
  return Isa(isa);
}

void set_isa(const std::string& name) { chosen.store(int(find(name)), std::memory_order_relaxed); }

}  // namespace rnnkern
