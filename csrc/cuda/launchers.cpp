#include "cuda/launchers.h"

#include "rnnkern_lists.h"

namespace rnnkern::cuda {

#define RNNKERN_DECLARE(cell, Struct) const CellLaunchers& launchers_##cell(Dtype dtype);
RNNKERN_FOR_EACH_CELL(RNNKERN_DECLARE)
#undef RNNKERN_DECLARE

const CellLaunchers& cell_launchers(int cell, Dtype dtype) {
  using Find = const CellLaunchers& (*)(Dtype);
#define RNNKERN_NAME(cell, Struct) launchers_##cell,
  static const Find find[] = {RNNKERN_FOR_EACH_CELL(RNNKERN_NAME)};
#undef RNNKERN_NAME
  return find[cell](dtype);
}

}  // namespace rnnkern::cuda
