"""torch's global state, set for a while to what Cierzo computes with.

A caller may have changed the default dtype or device, or call from within inference_mode or autocast. None of that may
reach the function that is exported, nor the truth that an engine is held against.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """float32 and the CPU by default, no gradients, no inference tensors, no autocast; the caller's state afterwards.

    The default dtype, and what torch.export keeps while it traces, are the whole process's: one thread at a time gets
    in, and another that makes tensors meanwhile gets float32 as well.
    """
    with _ONE_AT_A_TIME:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            # inference_mode(False) turns gradients on, so no_grad comes after it.
            with (
                torch.device("cpu"),
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast("cpu", enabled=False),
            ):
                yield
        finally:
            torch.set_default_dtype(dtype)
