"""What makes the network fast: it knows tensors, and no modules of ours.

`functional.py` is the definition, `autograd.py` runs residual branches by the backend that `backends.py` chooses, and
`operators.py` has the operators of `torch.ops.conv2former` for torch.compile. Each backend is a folder.
`depthwise_conv2d` and `modulate` are for other networks.
"""

from .standalone import depthwise_conv2d, modulate

__all__ = ["depthwise_conv2d", "modulate"]
