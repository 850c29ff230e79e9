"""Drop-in RNN, LSTM and GRU: torch's constructor, parameters, checks and outputs over the fused layer."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Unpack

from rnnkern.cells.gru_reset_before import GRU_RESET_BEFORE
from rnnkern.nn._options import Keywords
from rnnkern.nn._public import public
from rnnkern.nn._recurrent import _Recurrent

_KEYWORDS = """
    Besides torch's arguments, `forward` takes these keywords:

    - `lengths`: integer tensor `[B]`, the steps of each row, in any order, zeros allowed. Past a row's end the output
      is zero and h_n is the state at its end; the reverse direction starts at each row's own last step. A row of length
      zero returns its initial state. Not together with a PackedSequence, which has its own. They belong on the CPU,
      where they decide what runs: those on a GPU are copied, which waits for it, and are refused while a CUDA graph is
      captured. A graph keeps the lengths that it was captured with.
    - `resets`: bool tensor of the layout of the input without features (`[T, B]`; `[B, T]` if batch_first; `[T]`
      unbatched). Where it is True an episode starts: the forward state is zero again before that step, the reverse
      state before the step ahead of it, and no gradient crosses. The result equals running the episodes one by one; hx
      enters the first that each direction meets, unless `resets` is True at t = 0, which replaces it in the forward
      direction. Not together with a PackedSequence.
    - `return_sequence_states`: if True, a last result holds the state of every layer after every step, in the form of
      hx behind a dimension of time: `[T, L*D, B, H]` each, `[T, L*D, H]` unbatched, whatever batch_first says, so that
      what belongs to t can be the hx of step t+1. Zero past a row's end; of a PackedSequence it is packed, too.

    The constructor takes these keywords besides torch's; they change nothing where they are not given:

    - `learn_initial_state=True`: parameters `h_0` [L*D, 1, H] (LSTM also `c_0`), zero at first, are the state of every
      row where hx is None, and where an episode starts at a reset. hx, if given, enters as it would otherwise.
    - `grad_clip=c`: in backward every element of the gradient of the gates before their activations is limited to
      [-c, c] at every step, before it goes on to x_t, h_t-1 and the weights:
      dL/dgx_t <- max(-c, min(c, dL/dgx_t)) for gx_t = W_ih x_t + b_ih, and so for gh_t = W_hh h_t-1 + b_hh. Past the
      gates, as from c_t to c_t-1, nothing is limited. The same goes for what passes there in a second backward.
      Source: Graves 2013, https://arxiv.org/abs/1308.0850, as `grad_clipping` of Lasagne has it.
    - `grad_clip_norm=c`: in backward the gradient of each layer's outputs is limited in norm for every sequence of the
      batch by itself: with g_b of all that arrives for sequence b, over all steps and the final state,
      g_b <- g_b min(1, c / |g_b|). What the sequence adds to any gradient of the layer shrinks by this factor.
      With a learned initial state every episode of `resets` counts as a sequence. Programs of torch.export and
      torch.jit.trace do not limit. Both limits see gradients as GradScaler has scaled them.
    - `checkpoint_every=k`: of every k-th step the state is kept for backward, which runs the k steps from there again,
      instead of the gates of every step. Outputs and, in float32 and float64, the gradients of x and hx are the same
      to the last bit; those of weights differ by the order of their sums. Everything is kept under `torch.compile`,
      tracers and torch.func, and for a backward that is differentiated again.

    There may be no steps, T = 0: the output is empty then, and the initial state is the final one. Gradients exist in
    eval mode too, twice, and of any order. Nothing depends on the number of threads, and nothing that belongs to a row
    on the rest of the batch, but for the last bit where the eager reference runs (`rnnkern.explain` tells): torch's
    products differ so. bfloat16 and float16 compute in float32 and round h after each step.

    Raises:
        ValueError: the rank or dtype of the input is wrong, as in torch; a limit is not greater than zero.
        RuntimeError: a size, device, length or reset does not fit, as in torch.
"""


def _refuse_projection(options: Keywords) -> None:
    if "proj_size" in options:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


class _OneState(_Recurrent):
    """A stack whose only state is h."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_sequence_states: bool = False,
    ) -> Any:
        """Runs the layers; see the class."""
        if lengths is None and resets is None and not return_sequence_states:
            result = self._short(input, hx)
            if result is not None:
                return result
        return self._call(input, hx, lengths, resets, return_sequence_states)


@public
class RNN(_OneState):  # noqa: D101, it has one
    __doc__ = f"""Elman network of one or more layers, in the place of torch.nn.RNN.

    h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu in the place of tanh (`nonlinearity="relu"`). The constructor,
    parameters, initial values, inputs and outputs are those of `torch.nn.RNN`. Returns the output and h_n.
{_KEYWORDS}
    Source: Elman 1990, https://doi.org/10.1207/s15516709cog1402_1.

    Example:
        >>> import torch, rnnkern
        >>> rnn = rnnkern.nn.RNN(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10), lengths=torch.tensor([5, 0, 2]))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[Keywords],
    ) -> None:
        _refuse_projection(options)
        self.nonlinearity = nonlinearity
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        mode, shape = f"RNN_{nonlinearity.upper()}", (input_size, hidden_size, num_layers)
        super().__init__(mode, *shape, bias, batch_first, dropout, bidirectional, 0, device, dtype, **options)


@public
class LSTM(_Recurrent):  # noqa: D101, it has one
    __doc__ = f"""Long short-term memory of one or more layers, in the place of torch.nn.LSTM.

    i, f, o = sigmoid(W x + b + U h + b'), g = tanh(W_g x + b_g + U_g h + b_g'), c' = f c + i g, h' = o tanh(c')
    (with `proj_size`: h' = W_hr o tanh(c')). The constructor, parameters, initial values, inputs and outputs are those
    of `torch.nn.LSTM`. Returns the output and (h_n, c_n).
{_KEYWORDS}
    Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; the projection is that of
    Sak et al. 2014, https://arxiv.org/abs/1402.1128.

    Example:
        >>> import torch, rnnkern
        >>> lstm = rnnkern.nn.LSTM(10, 20, bidirectional=True)
        >>> output, (h_n, c_n), (h, c) = lstm(torch.randn(5, 3, 10), return_sequence_states=True)
        >>> output.shape, c_n.shape, c.shape
        (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]), torch.Size([5, 2, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[Keywords],
    ) -> None:
        shape = input_size, hidden_size, num_layers
        super().__init__("LSTM", *shape, bias, batch_first, dropout, bidirectional, proj_size, device, dtype, **options)

    # The base class checks a single state; these are torch.nn.LSTM's own.
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_sequence_states: bool = False,
    ) -> Any:
        """Runs the layers; see the class."""
        if lengths is None and resets is None and not return_sequence_states:
            result = self._short(input, hx)
            if result is not None:
                return result
        return self._call(input, hx, lengths, resets, return_sequence_states)


@public
class GRU(_OneState):  # noqa: D101, it has one
    __doc__ = f"""Gated recurrent unit of one or more layers, in the place of torch.nn.GRU.

    r, z = sigmoid(W x + b + U h + b'), n = tanh(W_n x + b_n + r (U_n h + b_n')), h' = (1 - z) n + z h. The constructor,
    parameters, initial values, inputs and outputs are those of `torch.nn.GRU`. Returns the output and h_n.

    `reset_after=False`, by keyword alone, is the unit as first published, where r acts on h before the product:
    n = tanh(W_n x + b_n + U_n (r h) + b_n'); so are `reset_after=False` of Keras and `linear_before_reset=0` of ONNX.
    The parameters have the same names and shapes. It runs on the eager reference, since the kernels multiply before
    they know r; `rnnkern.explain` says so. There a step, or a segment of `checkpoint_every`, may differ from the same
    steps within a longer call by a unit in the last place.
{_KEYWORDS}
    Source: Cho et al. 2014, https://arxiv.org/abs/1406.1078, in cuDNN's form.

    Example:
        >>> import torch, rnnkern
        >>> gru = rnnkern.nn.GRU(10, 20, batch_first=True)
        >>> output, h_n = gru(torch.randn(3, 5, 10), resets=torch.rand(3, 5) < 0.1)
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 20]), torch.Size([1, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        reset_after: bool = True,
        **options: Unpack[Keywords],
    ) -> None:
        _refuse_projection(options)
        shape = input_size, hidden_size, num_layers
        super().__init__("GRU", *shape, bias, batch_first, dropout, bidirectional, 0, device, dtype, **options)
        if not reset_after:
            self.mode = GRU_RESET_BEFORE.name.upper()

    @property
    def reset_after(self) -> bool:
        """Whether the reset gate acts after the recurrent product, as in torch."""
        return self.mode == "GRU"

    def extra_repr(self) -> str:
        """Torch's, and what torch has not."""
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")
