"""Attention under torch's machinery: derivatives of any order, opcheck, torch.compile; and the modules."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import rnnkern
from rnnkern.functional import Additive, General, attention
from rnnkern.nn import AdditiveAttention, DotAttention, GeneralAttention
from rnnkern.ops.attention import OPERATORS
from tests.attention_problem import BACKENDS, KERNELS, PADDINGS, SCORES, make_problem
from tests.helpers import error, needs_kernels


@needs_kernels
def test_backward_twice_and_in_eval_mode() -> None:
    module = AdditiveAttention(4, 5, 6).eval()
    query, key = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 5)
    loss = module(query, key)[0].square().sum()
    (first,) = torch.autograd.grad(loss, query, retain_graph=True)
    (second,) = torch.autograd.grad(loss, query)
    assert torch.equal(first, second)


@needs_kernels
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("score", SCORES)
def test_gradcheck(score: str, padding: str) -> None:
    problem = make_problem(score, 2, 1, 3, 2, 2, padding=padding, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in problem.tensors.values()]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        return problem.attend(dict(zip(problem.tensors, tensors)))

    with rnnkern.backend("cpu"):
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


@needs_kernels
def test_third_derivative() -> None:
    """The double backward keeps its graph."""
    x = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)

    def third(backend: str) -> Tensor:
        with rnnkern.backend(backend):
            y = attention(x, x * 2, score="dot")[0].pow(2).sum()
            for _ in range(3):
                (g,) = torch.autograd.grad(y, x, create_graph=True)
                y = g.pow(2).sum()
        return g.detach()

    assert error(third("cpu"), third("eager")) < 1e-9 * third("eager").abs().max().item()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("score", SCORES)
def test_torch_func(score: str, padding: str) -> None:
    """Gradients, per sample too, and forward-mode derivatives agree with autograd's."""
    problem = make_problem(score, 2, 3, 4, 3, 2, padding=padding, dtype=torch.float64)
    tensors = problem.tensors

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return problem.attend(tensors)[0].square().sum()

    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    expected = dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values()))))
    torch.testing.assert_close(grad(loss)(tensors), expected)
    directions = {name: torch.randn_like(t) for name, t in tensors.items()}
    slope = sum((expected[name] * d).sum() for name, d in directions.items())
    torch.testing.assert_close(jvp(loss, (tensors,), (directions,))[1], slope)
    samples = torch.stack([tensors["query"], -tensors["query"]])
    per_sample = vmap(grad(lambda query: loss(tensors | {"query": query})))(samples)
    torch.testing.assert_close(per_sample[0], expected["query"])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend: str, score: str, need_weights: bool) -> None:
    with rnnkern.backend(backend):  # loads it
        operators = OPERATORS[backend]
    tensors = [torch.randn(2, t, 4, requires_grad=True) for t in (3, 5, 5)]
    vector = torch.randn(4, requires_grad=True) if score == "additive" else None
    lengths = torch.tensor([5, 2])
    args = (*tensors, vector, lengths, None, score, 0.5, need_weights)
    torch.library.opcheck(operators.attention, args)
    detached = [None if t is None else t.detach() for t in (*tensors, vector)]
    torch.library.opcheck(operators.inference, (*detached, *args[4:]))
    dweights = torch.randn(2, 3, 5, requires_grad=True) if need_weights else None
    gradients = (torch.randn(2, 3, 4, requires_grad=True), dweights)
    torch.library.opcheck(operators.backward, (*gradients, *args[:-1]))


@pytest.mark.parametrize(
    "module",
    [DotAttention(), DotAttention(scaled=True), GeneralAttention(4, 4), AdditiveAttention(4, 4, 3)],
    ids=["dot", "scaled_dot", "general", "additive"],
)
def test_modules(module: torch.nn.Module) -> None:
    """The module is its function; keys projected once and a query without time give the same."""
    query, key, lengths = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.tensor([5, 2])
    if isinstance(module, AdditiveAttention):
        score = Additive(
            module.vector, module.query_projection.weight, module.key_projection.weight, module.key_projection.bias
        )
    else:
        score = General(module.weight) if isinstance(module, GeneralAttention) else "dot"
        score = "scaled_dot" if getattr(module, "scaled", False) else score
    expected, expected_weights = attention(query, key, score=score, lengths=lengths, need_weights=True)
    context, weights = module(query, key, lengths=lengths, need_weights=True)
    assert error(context, expected) < 1e-6
    assert error(weights, expected_weights) < 1e-6
    projected = module.project_keys(key)
    for i in range(3):
        step, step_weights = module(query[:, i], key, lengths=lengths, need_weights=True, projected_key=projected)
        assert error(step, expected[:, i]) < 1e-6
        assert error(step_weights, expected_weights[:, i]) < 1e-6
    assert module(query, key)[1] is None


def test_module_parameters() -> None:
    assert not list(DotAttention().parameters())
    general, additive = GeneralAttention(4, 5), AdditiveAttention(4, 5, 6)
    assert {name: tuple(p.shape) for name, p in general.named_parameters()} == {"weight": (4, 5)}
    assert {name: tuple(p.shape) for name, p in additive.named_parameters()} == {
        "vector": (6,),
        "query_projection.weight": (6, 4),
        "key_projection.weight": (6, 5),
        "key_projection.bias": (6,),
    }
    assert AdditiveAttention(4, 5, 6, bias=False).key_projection.bias is None
    assert GeneralAttention(4, 5, dtype=torch.float64).weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", SCORES)
def test_autocast(score: str, backend: str, dtype: torch.dtype) -> None:
    """Tensors of several dtypes are brought to autocast's; gradients come back in the dtype of their tensors."""
    problem = make_problem(score, 2, 3, 5, 4, 6, padding="lengths")
    expected = problem.run(backend)
    tensors = {name: t.clone().requires_grad_() for name, t in problem.tensors.items()}
    mixed = tensors | {"key": tensors["key"].to(dtype)}
    with rnnkern.backend(backend):
        with torch.autocast("cpu", dtype=dtype):
            context, weights = problem.attend(mixed)
        grads = torch.autograd.grad(
            (context, weights), list(tensors.values()), (problem.dcontext.to(dtype), problem.dweights.to(dtype))
        )
    assert context.dtype == weights.dtype == dtype
    actual = {"context": context, "weights": weights} | {f"d{name}": grad for name, grad in zip(tensors, grads)}
    for name, result in actual.items():
        assert name in ("context", "weights") or result.dtype == torch.float32, name
        assert error(result, expected[name]) < 0.05 * max(1, expected[name].abs().max().item()), name
    with rnnkern.backend(backend), pytest.raises(RuntimeError, match=r"^(key|key_weight|weight): expected dtype"):
        problem.attend(mixed)


@pytest.mark.parametrize("module", [DotAttention(), GeneralAttention(4, 4), AdditiveAttention(4, 4, 3)])
def test_modules_under_autocast(module: torch.nn.Module) -> None:
    """Keys may be projected outside autocast and attended to inside it; float64 stays what it is."""
    query, key = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    projected = module.project_keys(key)
    expected, _ = module(query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for context, _ in (module(query, key), module(query, key, projected_key=projected)):
            assert context.dtype == torch.bfloat16
            assert error(context, expected) < 0.05
        wide, _ = attention(query.double(), key.double(), score="dot")
    assert torch.equal(wide, attention(query.double(), key.double(), score="dot")[0])


@pytest.mark.parametrize("padding", ["lengths", "mask"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["function", "general", "additive"])
def test_nan_in_padded_keys(kind: str, backend: str, padding: str) -> None:
    """Padding reaches no result and no gradient, that of the key's weight included."""
    problem = make_problem("additive", 2, 3, 5, 4, 6, padding=padding)
    module = {"function": None, "general": GeneralAttention(4, 6), "additive": AdditiveAttention(4, 6, 3)}[kind]
    assert problem.is_padding().any()
    results = []
    for fill in (0.0, float("nan")):
        tensors = {name: t.clone() for name, t in problem.tensors.items()}
        tensors["key"][problem.is_padding()] = fill
        inputs = [t.requires_grad_() for t in tensors.values()]
        with rnnkern.backend(backend):
            if module is None:
                context, weights = problem.attend(tensors)
            else:
                inputs = [*inputs[:3], *module.parameters()]
                context, weights = module(*inputs[:3], **problem.padding, need_weights=True)
        results.append((context, weights, *torch.autograd.grad((context * problem.dcontext).sum(), inputs)))
    for zeros, nans in zip(*results):
        assert nans.isfinite().all()
        assert torch.equal(zeros, nans)


@needs_kernels
@pytest.mark.parametrize("score", SCORES)
def test_compile_fullgraph(score: str) -> None:
    problem = make_problem(score, 2, 3, 5, 4, 6, padding="lengths")
    torch._dynamo.reset()

    def run(tensors: dict[str, Tensor]) -> Tensor:
        return problem.attend(tensors)[0]

    tensors = {name: t.requires_grad_() for name, t in problem.tensors.items()}
    expected = run(tensors)
    actual = torch.compile(run, fullgraph=True, backend="aot_eager")(tensors)
    assert error(actual, expected) < 1e-6
    for a, b in zip(*(torch.autograd.grad(c, list(tensors.values()), problem.dcontext) for c in (actual, expected))):
        assert error(a, b) < 1e-5
