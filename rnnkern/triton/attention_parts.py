"""What the attention kernels share: which keys are valid, products of rows, the denominator of tanh.

Pointers to rows go in, [rows], since strides are the caller's affair; columns of a row are contiguous. What lies beyond
a tensor, or is padding, is never read.
"""

import triton
import triton.language as tl

from rnnkern.triton.arithmetic import multiply

# Begin anywhere where a call is cut into ranges of batch rows, and are not read 16 bytes at a time: Triton is not to
# compile once more for those that happen to be aligned.
UNALIGNED = ["lengths", "mask", "dweights"]
# Rows of what is kept of pairs are padded to this many elements, so that 16 bytes are read at a time.
PAIR_UNIT = tl.constexpr(16)
# tanh(q + k) = 1 - 2 r with r = 1 / d, d = 1 + e^2q e^2k. Two d share one reciprocal, so that the product of two must
# stay finite: elements beyond this are not factored.
FACTOR_LIMIT = tl.constexpr(10.0)


@triton.jit
def count_keys(lengths, b, Tk):
    """Keys of row b that may be valid: lengths [B] or None; beyond 0..Tk, the nearest of these."""
    count = Tk
    if lengths is not None:
        count = tl.minimum(tl.maximum(tl.load(lengths + b), 0), Tk).to(tl.int32)
    return count


@triton.jit
def are_valid(mask, b, keys, count, Tk):
    """Which keys of row b are; mask [B, Tk] or None, True is padding."""
    valid = keys < count
    if mask is not None:
        valid &= tl.load(mask + b * Tk + keys, mask=valid, other=1) == 0
    return valid


@triton.jit
def batch_pointer(tensor, b, batch_stride, UNIT: tl.constexpr):
    """Of tensor[b]; b is 64-bit and comes first: this stride times UNIT may be beyond 32 bits, a row's never is."""
    return tensor + b * batch_stride * UNIT


@triton.jit
def row_pointers(tensor, b, rows, batch_stride, row_stride, UNIT: tl.constexpr):
    """Of tensor[b, rows]; strides in units of UNIT elements, which tells the compiler how rows are aligned."""
    return batch_pointer(tensor, b, batch_stride, UNIT) + rows.to(tl.int64) * (row_stride * UNIT)


@triton.jit
def pair_row(Tk, UNIT: tl.constexpr):
    """Elements from one row of pairs to the next: Tk rounded up to UNIT, so that rows are aligned."""
    return tl.cdiv(Tk, UNIT) * UNIT


@triton.jit
def pair_pointers(pairs, b, Tq, first_query, first_key, row, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of a tile of pairs [B, Tq, row]: one 64-bit address and 32-bit distances, which take half the registers."""
    tile = pairs + (b * Tq + first_query) * row + first_key
    return tile + (tl.arange(0, BLOCK_Q)[:, None] * row + tl.arange(0, BLOCK_K)[None, :])


@triton.jit
def load_rows(pointers, there, columns, COLUMNS: tl.constexpr):
    """[rows, columns] of the rows that are `there`; zero elsewhere."""
    return tl.load(pointers[:, None] + columns[None, :], mask=there[:, None] & (columns < COLUMNS)[None, :], other=0.0)


@triton.jit
def multiply_rows(
    a,
    a_there,
    b,
    b_there,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum_c a[i, c] b[j, c] as float32 [i, j]."""
    total = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        left = load_rows(a, a_there, columns, COLUMNS)
        right = load_rows(b, b_there, columns, COLUMNS)
        total = multiply(left, tl.trans(right), total, PRECISION)
    return total


@triton.jit
def invert(x, APPROXIMATE: tl.constexpr):
    """1 / x for x >= 1: within an ulp by one operation of an NVIDIA GPU, which a division takes seven more to frame."""
    if APPROXIMATE:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1.0 / x
    return inverse


@triton.jit
def invert_both(x, y, APPROXIMATE: tl.constexpr):
    """1 / x and 1 / y by one reciprocal, for 1 <= x, y < 2^63."""
    inverse = invert(x * y, APPROXIMATE)
    return y * inverse, x * inverse


@triton.jit
def exp_twice(x):
    """e^2x. The rounding of the argument, up to 2^-20 of the result, is made good."""
    HIGH: tl.constexpr = 2.8853900432586670
    LOW: tl.constexpr = 3.8519e-8  # HIGH + LOW = 2 log2(e)
    LN2: tl.constexpr = 0.6931471805599453
    argument = HIGH * x
    rest = tl.fma(x, LOW, tl.fma(x, HIGH, -argument))
    power = tl.exp2(argument)
    return tl.fma(power * LN2, rest, power)


@triton.jit
def guarded_denominator(q, k):
    """1 + e^2(q + k) from the elements themselves; beyond 2 FACTOR_LIMIT tanh rounds to 1. NaN stays NaN."""
    MOST: tl.constexpr = 2.0 * FACTOR_LIMIT
    x = q + k
    x = tl.where(x > MOST, MOST, tl.where(x < -MOST, -MOST, x))
    return 1.0 + exp_twice(x)


@triton.jit
def finite_base(largest):
    """What to subtract from scores before their exponentials: zero where there is none, so that e^-inf is zero."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def some_are_valid(mask, b, count, Tk, BLOCK: tl.constexpr):
    """Whether row b has a valid key; after a loop over the keys, whose registers this must not take."""
    some = count > 0
    if mask is not None:
        found = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, count, BLOCK):
            found |= are_valid(mask, b, first + tl.arange(0, BLOCK), count, Tk).to(tl.int32)
        some = tl.max(found, 0) > 0
    return some


@triton.jit
def invert_sum(total, some):
    """1 / a sum of exponentials; if it is zero, zero where no key was valid, else NaN: all scores were -inf."""
    empty = total == 0.0
    return tl.where(empty, tl.where(some, float("nan"), 0.0), 1.0 / tl.where(empty, 1.0, total))
