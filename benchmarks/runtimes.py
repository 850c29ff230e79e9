"""What runs beside torch itself: torch.compile; ONNX Runtime and OpenVINO, sessions on torch's threads and tensors."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class PeerUnavailable(RuntimeError):
    """A peer cannot run here; the message says why."""


def compiled_runner(
    runner: Callable[[Callable[..., Tensor]], Callable[[], object]],
    function: Callable[..., Tensor],
    dynamic: bool = False,
) -> Callable[[], object]:
    """What `runner` makes of the function by torch.compile, which compiles it here, at a first call.

    `dynamic`: for all sizes at once.

    Raises:
        PeerUnavailable: it cannot be compiled.
    """
    try:
        run = runner(torch.compile(function, dynamic=dynamic))
        run()
    except Exception as error:  # of many types: no compiler, no headers, a compiler that fails
        raise PeerUnavailable(str(error).strip().split("\n")[0]) from error
    return run


def onnxruntime_session(model: bytes) -> Any:
    """A session on torch's number of threads.

    Raises:
        PeerUnavailable: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise PeerUnavailable(str(error)) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class BoundSession:
    """A session's inputs and outputs, in its order, bound to the memory of tensors; a call runs it."""

    def __init__(self, session: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        binding = session.io_binding()
        for place, tensor in zip(session.get_inputs(), inputs, strict=True):
            _bind(binding.bind_input, place.name, tensor)
        for place, tensor in zip(session.get_outputs(), outputs, strict=True):
            _bind(binding.bind_output, place.name, tensor)
        self.outputs = outputs
        self._inputs = inputs  # the binding does not keep them alive
        self._binding, self._run = binding, session.run_with_iobinding

    def __call__(self) -> Tensor:
        """Runs the session; returns its first output."""
        self._run(self._binding)
        return self.outputs[0]


def _bind(method: Callable[..., None], name: str, tensor: Tensor) -> None:
    array = tensor.numpy()  # the same memory
    method(name, "cpu", 0, array.dtype, array.shape, tensor.data_ptr())


def onnxruntime_runner(model: bytes, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """A function that runs the model from x to y."""
    return BoundSession(onnxruntime_session(model), [x], [y])


def openvino_runner(model: bytes, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """A function that runs the model from x to y.

    Raises:
        PeerUnavailable: openvino is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import openvino
    except ImportError as error:
        raise PeerUnavailable(str(error)) from None
    core = openvino.Core()
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,  # nobody else's threads are pinned
    }
    request = core.compile_model(core.read_model(model), "CPU", config).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(y.numpy(), shared_memory=True))

    def forward(kept: tuple[Tensor, Tensor] = (x, y)) -> Tensor:  # the request does not keep them alive
        request.infer()
        return kept[1]

    return forward
