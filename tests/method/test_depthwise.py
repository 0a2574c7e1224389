"""Depthwise convolutions in float32 under autocast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stpm.method.teacher import Float32Depthwise


def test_gradients_of_a_depthwise_convolution_are_those_of_float32() -> None:
    images = torch.randn(2, 8, 9, 9).bfloat16()
    convolution = nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8, bias=False)
    convolution(images.float()).square().sum().backward()
    assert convolution.weight.grad is not None
    expected = convolution.weight.grad.clone()
    convolution.weight.grad = None
    with Float32Depthwise(), torch.autocast("cpu", torch.bfloat16):
        output = convolution(images)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    # Only the output is rounded.
    torch.testing.assert_close(convolution.weight.grad, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("groups", [1, 4])
def test_other_convolutions_are_left_to_autocast(groups: int) -> None:
    images = torch.randn(2, 8, 9, 9)
    convolution = nn.Conv2d(8, 8, 3, groups=groups)
    with torch.autocast("cpu", torch.bfloat16):
        expected = convolution(images)
        with Float32Depthwise():
            assert torch.equal(convolution(images), expected)
