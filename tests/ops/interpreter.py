"""Triton's interpreter, which runs the kernels of the GPU on CPU tensors: `conftest.py` chooses it for all tests."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from conv2former.ops import backends

__all__ = ["INTERPRETS", "mend", "needs_interpreter", "needs_triton"]

needs_triton = pytest.mark.skipif(not backends._has_triton(), reason=f"needs Triton {backends.MIN_TRITON}, for Linux")
INTERPRETS = backends._has_triton() and os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not INTERPRETS, reason="needs Triton, and its interpreter chosen")


def mend() -> None:
    """Lets the interpreter compute in bfloat16 as a GPU does.

    That of Triton 3.9 cuts float32 off where it is to be rounded, and multiplies the bits of matrices as integers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "unmended_cast"):
        return
    builder.unmended_cast, builder.unmended_dot = builder.cast_impl, builder.create_dot

    def widen(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    def cast(self: Any, x: Any, dtype: Any) -> Any:
        types = (x.dtype.scalar, dtype.scalar)
        if types == (tl.bfloat16, tl.float32):
            return widen(x)
        if types == (tl.float32, tl.bfloat16):
            rounded = torch.tensor(x.data, dtype=torch.bfloat16).view(torch.uint16)
            return interpreter.TensorHandle(rounded.numpy(), tl.bfloat16)
        return builder.unmended_cast(self, x, dtype)

    def dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return builder.unmended_dot(self, widen(a), widen(b), *args)

    builder.cast_impl, builder.create_dot = cast, dot
