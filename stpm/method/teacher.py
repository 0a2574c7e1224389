"""The frozen teacher on a device: uint8 images in, features of each pyramid level out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d, interpolate, max_pool2d, one_hot
from torch.overrides import TorchFunctionMode

from stpm.errors import ModelError
from stpm.method.backbones import Backbone, cast_weights
from stpm.method.device import send
from stpm.method.openvino_backend import OpenVinoBackbone
from stpm.method.preprocessing import Content, Preprocessing, unpack
from stpm.method.recipe import Precision
from stpm.method.views import View
from stpm.options import Backend

# For each view, (B, 3, H, W) float32, channels last in memory.
Inputs = tuple[Tensor, ...]

log = logging.getLogger(__name__)

# Where `groups` stands among conv2d's arguments: input, weight, bias, stride, padding, dilation, groups.
_GROUPS = 6


class FeatureExtractor(Protocol):
    """A backbone in eval mode, of PyTorch or compiled: (B, 3, H, W) to one (B, Cₗ, Hₗ, Wₗ) tensor per level."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, images: Tensor) -> list[Tensor]: ...


class Teacher:
    """A frozen backbone in eval mode, with its preprocessing, on a device. Detectors of the same teacher share one.

    It sees an image in one view or two. Features are listed by view, and in each by level: lists "of all levels" are in
    this order. The student is in the last view. Convolutions have the precision, distances are always float32. The
    backend computes features where no gradient is needed.

    Args:
        backbone: has the levels of all views.
        views: the first has the preprocessing's input shape; None: that one alone, with all levels of the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        preprocessing: Preprocessing,
        device: torch.device,
        precision: Precision,
        backend: Backend = "pytorch",
        views: Sequence[View] | None = None,
    ) -> None:
        self.preprocessing = preprocessing
        self.views = tuple(views or [View(preprocessing.input_shape, backbone.levels)])
        self.device = device
        self.precision = precision
        self.backend: Backend = backend
        cut = (backbone if view.levels == backbone.levels else backbone.cut(view.levels) for view in self.views)
        frozen = [to_device(each, device).eval().requires_grad_(False) for each in cut]
        self.backbones = [*map(self._compile, frozen, self.views)]
        if backend == "openvino" and any(isinstance(each, Backbone) for each in self.backbones):
            # If OpenVINO cannot compile the teacher in a view, PyTorch computes all of it, and the student.
            self.backend = "pytorch"
            self.backbones = [*map(self._compile, frozen, self.views)]

    @property
    def nbytes(self) -> int:
        """Count the bytes of all weights."""
        # Views of the same levels share one.
        return sum(each.nbytes for each in {*self.backbones})

    def inputs(self, images: Tensor) -> Inputs:
        """Make the inputs of each view of images of model size: from (B, H, W, 3) uint8 RGB."""
        images = send(images, self.device)
        return tuple(self._input(images, view) for view in self.views)

    def student_inputs(self, images: Tensor) -> Tensor:
        """Make the inputs of the student's view alone."""
        return self._input(send(images, self.device), self.views[-1])

    def _input(self, images: Tensor, view: View) -> Tensor:
        return self.preprocessing.normalise(_shrink(images, *view.input_shape))

    def compile(self, backbone: Backbone) -> FeatureExtractor:
        """Prepare another backbone of the same architecture, a student in eval mode, to be computed as this one is."""
        return self._compile(to_device(backbone, self.device), self.views[-1])

    def _compile(self, backbone: Backbone, view: View) -> FeatureExtractor:
        if self.backend == "openvino":
            try:
                return OpenVinoBackbone(backbone, *view.input_shape, self.precision)
            except ModelError as error:
                log.warning("%s; PyTorch computes it instead", error)
        elif self.precision == "bfloat16":
            cast_weights(backbone)
        return backbone

    def compute(self, backbone: FeatureExtractor, inputs: Tensor) -> list[Tensor]:
        """Compute the features of a backbone, this one or a student, at the teacher's precision."""
        reduced = self.precision == "bfloat16"
        trains_on_cpu = self.device.type == "cpu" and torch.is_grad_enabled()
        depthwise = Float32Depthwise() if reduced and trains_on_cpu else nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=reduced), depthwise:
            return backbone(inputs)

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        """Compute the teacher's features of all levels, (B, Cₗ, Hₗ, Wₗ) each, without gradient."""
        with torch.no_grad():
            return [
                level
                for backbone, of_view in zip(self.backbones, inputs, strict=True)
                for level in self.compute(backbone, of_view)
            ]

    def student_targets(self, inputs: Tensor) -> list[Tensor]:
        """Compute the teacher's features of all levels of the student's view alone."""
        with torch.no_grad():
            return self.compute(self.backbones[-1], inputs)

    def student_indices(self, levels: Sequence[int]) -> list[int]:
        """Return the indices of a student's levels among all levels, counted from the end: negative."""
        own = self.views[-1].levels
        return [own.index(level) - len(own) for level in levels]

    def content_masks(self, content: Content, shapes: Sequence[tuple[int, int]]) -> list[Tensor | None]:
        """Mark the valid positions of each level of B images: inspected ones, and none on padding.

        Return one (B, Hₗ, Wₗ) bool mask per level, or one None per level if all positions of all images are valid.
        """
        height, width = self.preprocessing.input_shape
        if (content.boxes == (0, 0, width, height)).all() and not any(content.inspected):
            return [None] * len(shapes)
        boxes = send(torch.from_numpy(content.boxes), self.device)
        masks = [content_mask(boxes, (height, width), shape) for shape in shapes]
        for i, inspected in enumerate(content.inspected):
            for mask in masks if inspected else ():
                mask[i] = inspected_positions(inspected, (height, width), spatial_shape(mask), self.device)
        return list(masks)


def content_mask(content: Tensor, input_shape: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Mark the positions of a pyramid level whose centre lies on the image and not on the padding around it.

    Where an image is too narrow to hold any centre, the position that holds the image's middle is marked. From (B, 4)
    content boxes and the (height, width) of input and level to (B, H, W) bool.

    An image in the right half of an input of 8 x 8 pixels, at a level of 2 x 4 positions:

    >>> content_mask(torch.tensor([[4, 0, 8, 8]]), (8, 8), (2, 4)).int()
    tensor([[[0, 0, 1, 1],
             [0, 0, 1, 1]]], dtype=torch.int32)
    """
    left, top, right, bottom = content.long().unbind(dim=1)
    rows, columns = _inside(top, bottom, input_shape[0], shape[0]), _inside(left, right, input_shape[1], shape[1])
    return rows[:, :, None] & columns[:, None, :]


# The same few masks are asked for again and again: one for each level, of each image of a category.
@lru_cache(maxsize=64)
def inspected_positions(
    inspected: bytes, input_shape: tuple[int, int], shape: tuple[int, int], device: torch.device
) -> Tensor:
    """Mark the positions of a pyramid level at least half of whose pixels are inspected: (h, w) bool of this shape.

    Where none is near, those with any inspected pixel are marked: each such pixel has a marked position beside it.
    `inspected` is as in `Content`.

    >>> inspected_positions(bytes([0b11101100]), (2, 4), (1, 2), torch.device("cpu")).int()
    tensor([[1, 0]], dtype=torch.int32)
    """
    pixels = torch.from_numpy(unpack(inspected, input_shape))
    share = adaptive_avg_pool2d(pixels[None].float(), shape)
    is_thin = max_pool2d(share, 3, stride=1, padding=1) < 0.5
    return send(((share >= 0.5) | (is_thin & (share > 0)))[0], device)


def _inside(start: Tensor, stop: Tensor, length: int, positions: int) -> Tensor:
    """Mark the positions in each span [start, stop) of an axis of `length` pixels: (B, positions) bool."""
    centres = (torch.arange(positions, device=start.device) + 0.5) * length / positions
    inside = (start[:, None] <= centres) & (centres < stop[:, None])
    middle = (start + stop) * positions // (2 * length)
    return torch.where(inside.any(dim=1, keepdim=True), inside, one_hot(middle, positions).bool())


class Float32Depthwise(TorchFunctionMode):
    """A context in which depthwise convolutions under autocast compute in float32, and return bfloat16.

    Their gradients in bfloat16 on a CPU take PyTorch up to nine times as long as in float32 (5 × 5, or stride 2;
    PyTorch 2.13): two thirds of a training step of EfficientNet-Lite0.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # A convolution with one group is an ordinary one, even of a single channel.
        if func is not conv2d or len(args) <= _GROUPS or not 1 < args[_GROUPS] == args[0].shape[-3]:
            return func(*args, **(kwargs or {}))
        images, *rest = args
        with torch.autocast(images.device.type, enabled=False):
            return func(images.float(), *rest).bfloat16()


def _shrink(images: Tensor, height: int, width: int) -> Tensor:
    """Shrink images, (B, H, W, 3) uint8, with the filter of Pillow's `BILINEAR`."""
    if images.shape[1:3] == (height, width):
        return images
    # Torch shrinks bytes on a CPU alone, there 20 times as fast as floats.
    pixels = images.permute(0, 3, 1, 2)
    pixels = pixels if images.device.type == "cpu" else pixels.float()
    small = interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return (small if small.dtype == torch.uint8 else small.round().byte()).permute(0, 2, 3, 1)


def spatial_shape(level: Tensor) -> tuple[int, int]:
    """Return height and width of a level's features or distances."""
    return level.shape[-2], level.shape[-1]


def to_device(backbone: Backbone, device: torch.device) -> Backbone:
    """Move a backbone to a device, channels last in memory."""
    return backbone.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
