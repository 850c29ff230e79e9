"""What our modules are to torch's older makers of graphs: leaves of torch.fx, and nothing for torch.jit.script."""

import inspect
from typing import Any, NoReturn

import torch
from torch.fx import Proxy


class Leaf(torch.nn.Module):
    """A module that stays one node in a graph of `torch.fx.symbolic_trace`, as those of torch.nn do."""

    def _traced(self, input: Proxy, *args: Any, method: str | None = None, **kwargs: Any) -> Any:
        """The node of this call, or of this call of a method; its first argument comes from a symbolic trace."""
        tracer = input.tracer
        assert isinstance(tracer, torch.fx.Tracer)
        path = tracer.path_of_module(self)
        if not path:  # it is the module that is traced, of which torch.nn's are not leaves either
            raise torch.fx.proxy.TraceError(
                f"torch.fx cannot trace into {type(self).__name__}: trace a module that contains it, where it is a leaf"
            )
        if method is None:
            return tracer.create_proxy("call_module", path, (input, *args), kwargs)
        module = tracer.create_proxy("get_attr", path, (), {})
        return tracer.create_proxy("call_method", method, (module, input, *args), kwargs)

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The call while torch.jit.trace is at work, which torch.onnx's older exporter uses.

        It gives the module that it exports every argument by position, also those that have to be given by name.
        """
        if torch.onnx.is_in_onnx_export():
            kwargs |= zip(inspect.signature(self.forward).parameters, args)
            args = ()
        return super()._slow_forward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuses `torch.jit.script`, which asks here, and names what works instead."""
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}. Use torch.jit.trace(module, inputs), whose result "
            "torch.jit.script takes as part of a model, or torch.export.export, or torch.compile"
        )
