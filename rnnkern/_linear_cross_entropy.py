"""A decoder's loss over its vocabulary: the public function of `rnnkern.functional`, and its checks."""

import torch
from torch import Tensor

from rnnkern._checks import autocasts, check_kind, check_tensor
from rnnkern.ops.linear_cross_entropy import linear_cross_entropy as cross_entropy_of_rows


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The cross entropy of a linear layer's outputs, which are never all in memory.

    .. math::
        z_n = W x_n + b, \qquad
        \ell_n = - (1 - \epsilon) \log \mathrm{softmax}(z_n)_{y_n}
                 - \frac{\epsilon}{V} \sum_v \log \mathrm{softmax}(z_n)_v

    It is ``torch.nn.functional.cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`` with its
    results, reductions and exceptions, and has the arguments of newer torch's ``linear_cross_entropy``, but class
    weights, class probabilities and ``options``. More than 4 million logits (1 million of 16 bits on a CPU), and more
    than 256 rows of them, are made chunk by chunk: beside the gradients memory is needed for one chunk, of 16 MiB on a
    CPU, 128 MiB on a GPU, or 256 rows. ``rnnkern.explain`` tells which it is. A summed loss makes its gradients in the
    forward pass, where gradients are enabled: evaluate under ``torch.no_grad()``. Ignored rows cost nothing on the CPU.

    Products have the dtype of the input; softmax, sums over rows and the sum that is the weight's gradient are float32
    (float64 for float64). Under ``torch.autocast`` input, weight and bias are brought to its dtype and the loss is
    float32, as torch has it. Results are deterministic; a row's loss may depend on the rest of its chunk by as much as
    torch's products do. Gradients exist of any order.

    Args:
        input: what the layer reads.  # [*, D]
        linear_weight: W.  # [V, D]
        target: the class of each row, or ``ignore_index``.  # int64 [*]
        linear_bias: b.  # [V]
        reduction: "mean" over the rows that are not ignored (NaN if there is none), "sum" or "none".
        ignore_index: the target of rows that count for nothing.
        label_smoothing: e, in [0, 1].

    Returns:
        The loss, of the input's dtype.  # [], or [*] with reduction "none"

    Raises:
        TypeError: an argument that should be a tensor is not.
        ValueError: an unknown reduction.
        RuntimeError: rank, size, dtype or device of a tensor does not fit; label_smoothing is not within [0, 1].
        IndexError: a target that is not ignored is no class. On a GPU its loss is NaN instead, or what torch does.

    Source: the idea of gradients in the forward pass, chunk by chunk: Liger kernels, Hsu et al. 2024,
    https://arxiv.org/abs/2410.10989; label smoothing: Szegedy et al. 2015, https://arxiv.org/abs/1512.00567.

    Example:
        >>> import torch
        >>> from rnnkern.functional import linear_cross_entropy
        >>> hidden, weight = torch.randn(5, 3, 8), torch.randn(100, 8, requires_grad=True)
        >>> loss = linear_cross_entropy(hidden, weight, torch.randint(100, (5, 3)), label_smoothing=0.1)
        >>> loss.backward()
        >>> loss.shape, weight.grad.shape
        (torch.Size([]), torch.Size([100, 8]))
    """
    check_loss(input, linear_weight, target, linear_bias, reduction, label_smoothing)
    dtype = input.dtype
    if autocasts(input):
        cast = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = input.to(cast), linear_weight.to(cast)
        linear_bias = None if linear_bias is None else linear_bias.to(cast)
        dtype = torch.float32
    shape = target.shape
    if len(shape) != 1:
        target = target.reshape(-1)  # [N]
        input = input.reshape(len(target), input.shape[-1])
    loss = cross_entropy_of_rows(input, linear_weight, linear_bias, target, ignore_index, label_smoothing, reduction)
    return (loss.view(shape) if reduction == "none" else loss).to(dtype)


def check_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    reduction: str,
    label_smoothing: float,
) -> None:
    """Raises unless the arguments of `linear_cross_entropy` fit each other."""
    for name, tensor in (("input", input), ("linear_weight", weight), ("target", target)):
        check_tensor(name, tensor)
    if input.dim() == 0 or not input.dtype.is_floating_point:
        raise RuntimeError(
            f"input: expected a floating-point tensor [*, D], got {input.dtype} of shape {list(input.shape)}"
        )
    D = input.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != D or weight.shape[0] == 0:
        raise RuntimeError(
            f"linear_weight: expected shape [V, {D}] with V > 0 to fit input {list(input.shape)}, "
            f"got {list(weight.shape)}"
        )
    check_kind("linear_weight", weight, input, "input")
    if bias is not None:
        check_tensor("linear_bias", bias)
        if bias.shape != weight.shape[:1]:
            raise RuntimeError(
                f"linear_bias: expected shape [{weight.shape[0]}] to fit linear_weight {list(weight.shape)}, "
                f"got {list(bias.shape)}"
            )
        check_kind("linear_bias", bias, input, "input")
    if target.dtype != torch.int64:
        raise RuntimeError(f"target: expected classes of dtype torch.int64, got {target.dtype}")
    if target.shape != input.shape[:-1]:
        raise RuntimeError(
            f"target: expected shape {list(input.shape[:-1])} to fit input {list(input.shape)}, "
            f"got {list(target.shape)}"
        )
    if target.device != input.device:
        raise RuntimeError(f"target: expected device {input.device} of input, got {target.device}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
