"""What must hold of a case: torch.nn's results or exception, and nothing written that was not asked for."""

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path, tree_map_only

import rnnkern
from rnnkern.functional import Additive, General, attention
from tests.fuzz.cases import CELLS, AttentionCase, Call, Case, KeywordCase, ModuleCase, Spec
from tests.helpers import instruction_set, poisoned_memory, threads

# Of the largest value: two float paths of some hundred steps. Accuracy is tested elsewhere; this tells a wrong row.
OUTPUTS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
GRADIENTS = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def check(case: Case) -> None:
    """Raises AssertionError if the case shows a fault."""
    isa = instruction_set(case.isa) if case.isa else contextlib.nullcontext()
    with warnings.catch_warnings(), threads(case.threads), isa, poisoned_memory():
        warnings.simplefilter("ignore")
        CHECKS[type(case)](case)


def attempt(function: Callable[[], Any]) -> Any:
    """The result, or the exception."""
    try:
        return function()
    except Exception as error:
        return error


def same_outcome(ours: Any, theirs: Any, what: str) -> bool:
    """Whether both are results; raises unless they are, or exceptions of one type."""
    for outcome, other, name in ((ours, theirs, "ours"), (theirs, ours, "theirs")):
        if isinstance(outcome, Exception):
            assert type(outcome) is type(other), f"{what}: {name} {outcome!r}, the other {brief(other)}"
            return False
    return True


def brief(value: Any) -> str:
    if isinstance(value, Exception):
        return repr(value)
    return f"a result: {[tuple(leaf.shape) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]}"


def assert_same(ours: Tensor | None, theirs: Tensor | None, allowed: dict[torch.dtype, float], what: str) -> None:
    if ours is None or theirs is None:
        assert ours is theirs, f"{what}: ours {ours}, theirs {theirs}"
        return
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype} and {theirs.dtype}"
    if not ours.numel():
        return
    if not ours.dtype.is_floating_point:
        if not ours.dtype.is_complex:
            assert torch.equal(ours, theirs), f"{what}: {ours} and {theirs}"
        return
    a, b = ours.detach().double(), theirs.detach().double()
    assert torch.equal(a.isfinite(), b.isfinite()), f"{what}: not finite where the other is"
    a, b = a[a.isfinite()], b[b.isfinite()]
    if a.numel():
        error, size = (a - b).abs().max().item(), max(1.0, b.abs().max().item())
        assert error <= allowed[ours.dtype] * size, f"{what}: differs by {error:.3g} of {size:.3g}"


def construct(library: Any, kind: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    options = {key: getattr(torch, value) if key == "dtype" else value for key, value in options.items()}
    return getattr(library, kind)(*args, **options)


# Of modules, against torch.nn.


def check_module(case: ModuleCase) -> None:
    given = case.kind, case.args, case.options
    modules = [attempt(lambda library=library: construct(library, *given)) for library in (rnnkern.nn, torch.nn)]
    if not same_outcome(*modules, "the constructor"):
        return
    ours, theirs = modules
    assert repr(ours) == repr(theirs)
    for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    for number, call in enumerate(case.calls):
        for module in modules:
            change(module, call)
        compare(ours, theirs, call, case.kind, f"call {number}")


def change(module: torch.nn.Module, call: Call) -> None:
    """Something that programs do with parameters."""
    module.train(call.training)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, p in parameters.items():
            if call.change == "neg_":  # not what grows with every call: recurrences would diverge
                p.neg_()
            elif call.change == "data":
                p.data.mul_(0.5)
            elif call.change == "replace":
                setattr(module, name, torch.nn.Parameter(p * 0.5))
            elif call.change == "transpose" and p.dim() == 2:
                setattr(module, name, torch.nn.Parameter(p.t().contiguous().t()))
            elif call.change == "freeze" and "hh" in name:
                p.requires_grad_(False)
            elif call.change == "tie" and "bias_hh" in name:
                setattr(module, name, parameters[name.replace("hh", "ih")])
    if call.change == "load":
        module.load_state_dict({name: value * 0.5 for name, value in module.state_dict().items()})
    if call.change == "double":
        module.double()


def compare(ours: torch.nn.Module, theirs: torch.nn.Module, call: Call, kind: str, what: str) -> None:
    """The outcomes of a call, and of its backward if there is one."""
    arguments = [build(call, batch_first=getattr(theirs, "batch_first", False)) for _ in range(2)]
    results = []
    for module, given in zip((ours, theirs), arguments):
        torch.manual_seed(call.seed)  # of dropout
        module.zero_grad()
        with MODES[call.mode]():
            results.append(attempt(lambda module=module, given=given: module(*given)))
    if known(kind, theirs, call, *results) or not same_outcome(*results, what):
        return
    leaves = [[leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)] for result in results]
    assert type(results[0]) is type(results[1]), what
    for i, (a, b) in enumerate(zip(*leaves, strict=True)):
        assert_same(a, b, OUTPUTS, f"{what}, output {i}")
        assert a.requires_grad == b.requires_grad, f"{what}, output {i}: requires_grad {a.requires_grad}"
        assert a.is_inference() == b.is_inference(), f"{what}, output {i}: is_inference {a.is_inference()}"
        if kind not in CELLS and a.numel():  # a cell's are those of hx in torch, always contiguous here
            strides = [tuple(s for s, n in zip(t.stride(), t.shape) if n > 1) for t in (a, b)]
            assert strides[0] == strides[1], f"{what}, output {i}: strides {strides}"
    outcomes = [attempt(lambda l=l: backward(l)) for l in leaves]
    kink = "relu" in (getattr(theirs, "nonlinearity", ""),) and leaves[0][0].dtype in (torch.bfloat16, torch.float16)
    if not same_outcome(*outcomes, f"{what}, backward") or kink:
        return
    for i, (a, b) in enumerate(zip(*(tree_leaves(given) for given in arguments))):
        if isinstance(a, Tensor):
            assert_same(a.grad, b.grad, GRADIENTS, f"{what}, gradient of argument {i}")
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert_same(a.grad, b.grad, GRADIENTS, f"{what}, gradient of {name}")


def known(kind: str, theirs: torch.nn.Module, call: Call, ours: Any, other: Any) -> bool:
    """Whether the outcomes differ as docs/compatibility.md says: then there is nothing to compare."""
    if call.lengths is not None and kind == "LSTM" and isinstance(ours, Exception):
        return True  # torch checks nothing here: whatever its kernel makes of it
    mixed = len({spec.dtype for spec in tree_leaves(call.hx) if isinstance(spec, Spec)}) > 1
    if mixed and "LSTM" in kind and isinstance(ours, RuntimeError) and "must have the dtype of input" in str(ours):
        return True  # torch mixes dtypes of h and c where nothing multiplies c
    # Flags need not be bool: ours are tested for truth, and torch's constructor takes them, but not its call.
    if isinstance(other, TypeError) and "invalid combination of arguments" in str(other):
        return not isinstance(ours, Exception) or not all(
            isinstance(getattr(theirs, flag, True), bool) for flag in ("bias", "batch_first", "bidirectional")
        )
    if isinstance(ours, Exception):
        return False
    return isinstance(other, RuntimeError) and "Expected sequence length to be larger than 0" in str(other)


def build(call: Call, batch_first: bool) -> tuple[Any, Any]:
    """The arguments; those of equal calls are equal."""
    seeds = iter(range(call.seed, 1000))
    x = call.input.make(next(seeds))
    hx = tree_map_only(Spec, lambda spec: spec.make(next(seeds)), call.hx)
    if call.lengths is None:
        return x, hx
    packed = attempt(lambda: pack_padded_sequence(x, torch.tensor(call.lengths), bool(batch_first), False))
    return (x if isinstance(packed, Exception) else packed), hx


def backward(leaves: list[Tensor]) -> None:
    """From all outputs that have a gradient, of other weight each."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if wanted:
        torch.autograd.backward(wanted, slopes(wanted))


def backward_twice(leaves: list[Tensor], inputs: Any) -> None:
    """Leaves in `grad` of every input the derivatives of its own and the others' gradients."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    inputs = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if wanted:
        gradients = torch.autograd.grad(wanted, inputs, slopes(wanted), create_graph=True, allow_unused=True)
        backward([gradient for gradient in gradients if gradient is not None])


def slopes(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.linspace(-1, 1, t.numel()).view(t.shape).to(t.dtype) for t in tensors]


# Of what torch.nn does not have, against the eager reference.


def check_keywords(case: KeywordCase) -> None:
    outcomes = []
    for backend in ("", "eager"):
        options = dict(case.options)
        if backend == "eager":
            options.pop("checkpoint_every", None)  # nothing but the memory needed depends on it
        module = construct(rnnkern.nn, case.kind, case.args, options)
        if options.get("learn_initial_state"):
            for state in (module.h_0, getattr(module, "c_0", None)):  # which are zero
                if state is not None:
                    torch.nn.init.uniform_(state, -1, 1)
        if case.quantized:
            module = rnnkern.quantize_dynamic(module)
        module.train(case.seed % 2 == 0 and not case.quantized)
        call = module if case.step is None else module.step
        for _ in range(case.calls):  # without a backend forced: then calls of few steps go past the dispatcher
            module.zero_grad()
            x, hx, keywords = arguments = keyword_arguments(case)
            asked = [keywords.get("out"), *(tree_leaves(hx) if keywords.get("inplace") else ())]
            result = guarded(lambda c=call, a=(x, hx), k=keywords: c(*a, **k), arguments, asked, case, backend)
        outcomes.append((result, (arguments, dict(module.named_parameters()))))
    (ours, inputs), (theirs, others) = outcomes
    outputs, gradients = tolerances(case)
    if case.quantized:
        outputs = dict.fromkeys(OUTPUTS, 0.02)
    low = case.autocast or case.options.get("dtype") in ("bfloat16", "float16")
    kink = case.options.get("nonlinearity") == "relu" and low
    leaves = same_results(ours, theirs, outputs)
    if leaves and same_outcome(*(attempt(lambda l=l: backward(l)) for l in leaves), "backward") and not kink:
        same_gradients(inputs, others, gradients)


def tolerances(case: KeywordCase | AttentionCase) -> tuple[dict[torch.dtype, float], dict[torch.dtype, float]]:
    """Of outputs and of gradients: under autocast, of whatever dtype, they are as accurate as bfloat16."""
    if not case.autocast:
        return OUTPUTS, GRADIENTS
    return dict.fromkeys(OUTPUTS, OUTPUTS[torch.bfloat16]), dict.fromkeys(GRADIENTS, GRADIENTS[torch.bfloat16])


def check_attention(case: AttentionCase) -> None:
    outcomes = []
    for backend in ("", "eager"):
        for _ in range(case.calls):
            tensors, inputs, function = attention_call(case)
            result = guarded(function, tensors, [], case, backend)
        outcomes.append((result, inputs))
    (ours, inputs), (theirs, others) = outcomes
    outputs, gradients = tolerances(case)
    leaves = same_results(ours, theirs, outputs)
    if not leaves:
        return
    step = backward if not case.twice else backward_twice
    extra = [(), ()] if not case.twice else [(inputs,), (others,)]
    results = [attempt(lambda l=l, e=e: step(l, *e)) for l, e in zip(leaves, extra)]
    if same_outcome(*results, "backward") and case.nan in ("", "padding"):
        same_gradients(inputs, others, gradients)


def same_results(ours: Any, theirs: Any, tolerance: dict[torch.dtype, float]) -> list[list[Tensor]]:
    """The tensors of both, or nothing where they are exceptions of one type; raises unless they are alike."""
    if not same_outcome(ours, theirs, "the call"):
        return []
    leaves = [[leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)] for result in (ours, theirs)]
    for i, (a, b) in enumerate(zip(*leaves, strict=True)):
        assert_same(a, b, tolerance, f"output {i}")
        # The kernels' outputs come from one node: the others may require a gradient that is zero.
        assert i or a.requires_grad == b.requires_grad, f"output {i}: requires_grad {a.requires_grad}"
    return leaves


def same_gradients(ours: Any, theirs: Any, tolerance: dict[torch.dtype, float]) -> None:
    """Of every tensor among the arguments."""
    for (path, a), b in zip(tree_leaves_with_path(ours), tree_leaves(theirs), strict=True):
        if isinstance(a, Tensor):
            assert_same(a.grad, b.grad, tolerance, f"gradient of {keystr(path)}")


def guarded(
    function: Callable[[], Any], arguments: Any, asked: list[Any], case: KeywordCase | AttentionCase, backend: str
) -> Any:
    """The outcome; of the arguments' memory only that of the tensors that were asked for may have been written."""
    guards = [Guarded(tensor) for tensor in tree_leaves(arguments) if isinstance(tensor, Tensor)]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case.autocast)
    with rnnkern.backend(backend) if backend else contextlib.nullcontext(), MODES[case.mode](), autocast:
        result = attempt(function)
    for guard in guards:
        guard.check(not isinstance(result, Exception) and any(guard.tensor is tensor for tensor in asked))
    return result


class Guarded:
    """A tensor and a copy of all the memory that it is a part of."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.memory = copy.deepcopy(tensor.untyped_storage())

    def check(self, written: bool) -> None:
        """Nothing but the elements of a tensor that was to be written has changed."""
        now = torch.tensor(self.tensor.untyped_storage(), dtype=torch.uint8)
        before = torch.tensor(self.memory, dtype=torch.uint8)
        if written:
            with torch.no_grad():
                for storage in (now, before):
                    view = storage.view(self.tensor.dtype)
                    view.as_strided(self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()).zero_()
        assert torch.equal(now, before), f"wrote past what it was given: {tuple(self.tensor.shape)}"


def keyword_arguments(case: KeywordCase) -> tuple[Any, ...]:
    """Input, hx, and the keywords."""
    seeds = iter(range(case.seed, 1000))
    x: Any = case.input.make(next(seeds))
    hx = tree_map_only(Spec, lambda spec: spec.make(next(seeds)), case.hx)
    if case.batch_sizes is not None:
        x = PackedSequence(x, torch.tensor(case.batch_sizes, dtype=torch.int64))
    keywords: dict[str, Any] = {}
    if case.step is not None:
        if case.out is not None:
            keywords["out"] = case.out.make(next(seeds))
        if "inplace" in case.step:
            keywords["inplace"] = True
        return x, hx, keywords
    if case.lengths is not None:
        given = case.lengths
        made = given.make(next(seeds)) if isinstance(given, Spec) else torch.tensor(given, dtype=torch.int64)
        keywords["lengths"] = made
    if isinstance(case.resets, Spec):
        keywords["resets"] = case.resets.make(next(seeds))
    if case.every_state:
        keywords["return_sequence_states"] = True
    return x, hx, keywords


def attention_call(case: AttentionCase) -> tuple[dict[str, Tensor], dict[str, Tensor], Callable[[], Any]]:
    """The tensors given, these and the module's parameters, and the call."""
    tensors = {name: spec.make(case.seed + i) for i, (name, spec) in enumerate(case.tensors.items())}
    if case.lengths is not None:
        given = case.lengths
        tensors["lengths"] = (
            given.make(case.seed) if isinstance(given, Spec) else torch.tensor(given, dtype=torch.int64)
        )
    with torch.no_grad():
        spoil(case, tensors)
    qkv = [tensors.get(name) for name in ("query", "key", "value")]
    keywords = {name: tensors[name] for name in ("lengths", "key_padding_mask") if name in tensors}
    parameters = {name: t for name, t in tensors.items() if name not in (*keywords, "query", "key", "value")}
    module: Any = None
    if case.module is not None:
        kind = {"general": "GeneralAttention", "additive": "AdditiveAttention"}.get(case.score, "DotAttention")
        options = case.options | ({"scaled": case.score == "scaled_dot"} if kind == "DotAttention" else {})
        module = construct(rnnkern.nn, kind, case.module, options)

    def call() -> Any:
        if module is not None:
            projected = {"projected_key": module.project_keys(qkv[1])} if case.projected else {}
            return module(*qkv, **keywords, **projected, need_weights=case.need_weights)
        score = {"general": General, "additive": Additive}.get(case.score, lambda: case.score)(**parameters)
        return attention(*qkv, score=score, **keywords, need_weights=case.need_weights)

    return tensors, tensors | (dict(module.named_parameters()) if module is not None else {}), call


def spoil(case: AttentionCase, tensors: dict[str, Tensor]) -> None:
    """Sets one element, or all padding, to NaN."""
    single = {
        name: tensors[name]
        for name, spec in case.tensors.items()
        if spec.layout not in ("expanded", "overlapping") and tensors[name].dtype.is_floating_point
    }
    if case.nan in single and single[case.nan].numel():
        single[case.nan][(0,) * single[case.nan].dim()] = float("nan")
    key, mask, lengths = (tensors.get(name) for name in ("key", "key_padding_mask", "lengths"))
    if case.nan != "padding" or key is None or key.dim() != 3:
        return
    if lengths is not None and lengths.shape == key.shape[:1]:
        mask = torch.arange(key.shape[1]) >= lengths[:, None]
    for name in ("key", "value"):
        if name in single and mask is not None and mask.dtype == torch.bool and single[name].shape[:2] == mask.shape:
            single[name].masked_fill_(mask[..., None], float("nan"))


CHECKS: dict[type, Callable[[Any], None]] = {
    ModuleCase: check_module,
    KeywordCase: check_keywords,
    AttentionCase: check_attention,
}
