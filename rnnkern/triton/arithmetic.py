"""Products, as all engines and attention compute them.

Triton's interpreter keeps bfloat16 as integers of 16 bits, and `tl.dot` multiplies these. So operands are float32 there
where a product of two numbers of 16 bits is exact. What is stored in bfloat16 it rounds towards zero, where a GPU
rounds to the nearest; that is left as it is.
"""

import triton
import triton.language as tl

from rnnkern.triton import interprets

INTERPRETED = tl.constexpr(interprets())


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """total + a b in float32; a b where total is None."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)
