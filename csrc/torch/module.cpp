// rnnkern._C: build info, instruction set, cell traits, and short calls past the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/layer.h"
#include "cpu/workspace.h"
#include "rnnkern_lists.h"
#include "torch/short_call.h"
#include "torch/train_step.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "rnnkern's native side: build info, instruction set, cell traits, short calls";
  if (!rnnkern::add_short_call(m.ptr()) || !rnnkern::add_train_step(m.ptr())) throw py::error_already_set();
  m.def("supported_isas", &rnnkern::supported_isas,
        "Instruction sets that were built and that this CPU has, best last");
  m.def("get_isa", [] { return std::string(rnnkern::isa_name(rnnkern::current_isa())); }, "The instruction set in use");
  m.def("set_isa", &rnnkern::set_isa, py::arg("name"), "Use this instruction set from now on");
  m.def("set_poison", &rnnkern::set_poison, py::arg("on"),
        "For tests: fill outputs and workspaces with NaN before they are written");
  m.def("release_pool", &rnnkern::release_pool, "Free the pool's memory that no tensor uses");
  m.def("unused_pool_bytes", &rnnkern::unused_pool_bytes, "Bytes of the pool that no tensor uses");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = RNNKERN_VERSION;
        info["compiler"] = std::string("g++ ") + __VERSION__;
#ifdef __OPTIMIZE__
        info["optimized"] = true;
#else
        info["optimized"] = false;
#endif
        info["cuda"] = RNNKERN_CUDA_CODE;
        return info;
      },
      "Version and compiler of the build, and what its CUDA kernels were compiled for: \"sm_80 compute_80\", or \"\"");
  m.def(
      "cell_traits",
      [] {
        py::dict traits;
        for (const rnnkern::CellTraits& cell : rnnkern::cell_traits()) {
          py::dict entry;
          entry["gates"] = cell.gates;
          entry["states"] = cell.states;
          entry["saved"] = cell.saved;
          entry["split_gates"] = cell.split_gates;
          traits[py::str(cell.name)] = entry;
        }
        return traits;
      },
      "What each built cell declares in csrc/cells");
}
