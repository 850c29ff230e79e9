"""What Triton compiles a launch for: its kernel, constants, and what it tells apart of arguments."""

from typing import Any

from torch import Tensor

from rnnkern.triton.launch import Launch


def specialized(launch: Launch) -> tuple[Any, ...]:
    """The same for launches that run the same compiled kernel; of a kernel that is interpreted."""
    kernel = launch.kernel
    numbers = kernel.kwargs["do_not_specialize"] or ()
    pointers = kernel.kwargs["do_not_specialize_on_alignment"] or ()

    def described(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(described(name, part) for part in value)
        if isinstance(value, Tensor):
            return value.dtype, name in pointers or value.data_ptr() % 16 == 0
        if isinstance(value, int) and name not in numbers:
            return value == 1, value % 16 == 0
        return type(value)

    arguments = [described(*pair) for pair in zip(kernel.arg_names, launch.arguments)]
    return kernel.fn.__module__, kernel.fn.__name__, launch.constants, arguments
