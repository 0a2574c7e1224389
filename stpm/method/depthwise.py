"""Depthwise convolutions in float32 while a student is fitted in bfloat16 on a CPU.

Their gradients in bfloat16 take PyTorch up to nine times as long as in float32 (5 × 5, or stride 2; PyTorch 2.13): two
thirds of a training step of EfficientNet-Lite0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import conv2d
from torch.overrides import TorchFunctionMode

# Where `groups` stands among conv2d's arguments: input, weight, bias, stride, padding, dilation, groups.
_GROUPS = 6


class Float32Depthwise(TorchFunctionMode):
    """A context in which depthwise convolutions under autocast compute in float32, and return bfloat16."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # A convolution with one group is an ordinary one, even of a single channel.
        if func is not conv2d or len(args) <= _GROUPS or not 1 < args[_GROUPS] == args[0].shape[-3]:
            return func(*args, **(kwargs or {}))
        images, *rest = args
        with torch.autocast(images.device.type, enabled=False):
            return func(images.float(), *rest).bfloat16()
