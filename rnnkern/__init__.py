"""Fused recurrent and attention kernels for PyTorch.

import rnnkern
lstm = rnnkern.nn.LSTM(256, 512)  # in the place of torch.nn.LSTM
"""

import os

from rnnkern import functional, importers, nn, seq2seq
from rnnkern._accelerate import accelerate, restore
from rnnkern._enable import disable, enable
from rnnkern._library import empty_cache
from rnnkern.nn.quantized import quantize_dynamic
from rnnkern.ops import flops as _flops
from rnnkern.ops._dispatch import BackendUnavailable, backend
from rnnkern.ops.explain import explain

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "__version__",
    "accelerate",
    "backend",
    "disable",
    "empty_cache",
    "enable",
    "explain",
    "functional",
    "importers",
    "nn",
    "quantize_dynamic",
    "restore",
    "seq2seq",
]

_flops.register()
if os.environ.get("RNNKERN_ENABLE") == "1":
    enable()
