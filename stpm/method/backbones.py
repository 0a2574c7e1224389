"""Build teacher and student backbones: networks of timm that return features only."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from textwrap import shorten
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from timm.layers import Conv2dSame, Format
from timm.models._features import FeatureGetterNet, FeatureInfo
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from stpm.errors import ConfigError, ModelError
from stpm.method.preprocessing import SIDE_MULTIPLE, DataConfig

StateDict = Mapping[str, Tensor]

DEMO_TEACHER = "demo"
DEMO_ARCHITECTURE = "tf_efficientnet_lite0"
# Maximum characters of torch's list of mismatched weights in an error message.
_MAX_MISMATCH = 500


class Backbone(nn.Module):
    """A timm backbone cut after its last pyramid level.

    forward takes (B, 3, H, W) float and returns one (B, Cₗ, Hₗ, Wₗ) tensor per level, finest first.
    """

    def __init__(self, net: nn.Module, architecture: str, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.net = net
        self.architecture = architecture
        self.levels = levels
        info: FeatureInfo = net.feature_info
        self.channels: list[int] = list(info.channels())
        # Input pixels from one position to the next.
        self.strides: list[int] = list(info.reduction())
        # Swin and others keep channels last. A class of timm that names no format keeps them first.
        self._channels_last = getattr(net, "output_fmt", Format.NCHW) == Format.NHWC

    def forward(self, images: Tensor) -> list[Tensor]:
        features: list[Tensor] = self.net(images)
        return [level.permute(0, 3, 1, 2) for level in features] if self._channels_last else features

    def cut(self, levels: tuple[int, ...]) -> Backbone:
        """Return the same network with some of its levels, cut after the last of them. It has copies of the weights."""
        other = build_backbone(self.architecture, levels)
        weights = self.net.state_dict()
        other.net.load_state_dict({name: weights[name] for name in other.net.state_dict()})
        return other.train(self.training)

    @property
    def nbytes(self) -> int:
        """Count the bytes of all weights."""
        return sum(weight.nbytes for weight in self.state_dict().values())


def architecture_name(teacher: str) -> str:
    """Return a teacher's architecture: `resnet18` for `resnet18.tv_in1k`, EfficientNet-Lite0 for `demo`."""
    return DEMO_ARCHITECTURE if teacher == DEMO_TEACHER else teacher.split(".", 1)[0]


def resolve_data_config(teacher: str) -> DataConfig:
    """Look up in timm how a teacher's training images were prepared; raise ConfigError if timm does not know it."""
    remedy = "Name a tag that timm lists, or set --normalisation to imagenet or none"
    try:
        config = _pretrained_config(teacher)
    except RuntimeError as error:
        raise ConfigError(f"teacher {teacher!r}: {error} {remedy}") from error
    if config is None:
        raise ConfigError(f"teacher {teacher!r}: timm has no configuration of it. {remedy}")
    return DataConfig(tuple(config.mean), tuple(config.std), config.interpolation)


def teacher_licence(teacher: str) -> str:
    """Return the licence of a teacher's weights, as timm names it; "" if timm does not know it."""
    config = _pretrained_config(teacher)
    return (config and config.license) or ""


def _pretrained_config(teacher: str) -> Any:
    return timm.get_pretrained_cfg(DEMO_ARCHITECTURE if teacher == DEMO_TEACHER else teacher)


def build_backbone(teacher: str, levels: tuple[int, ...]) -> Backbone:
    """Build a teacher's architecture with timm's random initialisation, drawn from torch's global generator.

    `teacher` is a teacher's name or an architecture of timm here and below, `levels` are timm's `out_indices`.

    Raises:
        ConfigError: if timm does not have the architecture, or the architecture does not have the levels.
    """
    architecture = architecture_name(teacher)
    try:
        net = _create(architecture, levels)
    except (RuntimeError, AttributeError, IndexError, AssertionError, ValueError) as error:
        known = timm.is_model(architecture)
        problem = f"cannot give pyramid levels {levels}: {error}" if known else "is not an architecture of timm"
        raise ConfigError(f"teacher: {architecture!r} {problem}; try resnet18.tv_in1k with levels 1,2,3") from error
    if isinstance(net, EfficientNetFeatures | MobileNetV3Features):
        # timm keeps the stages after the last level, and computes them.
        net.blocks = net.blocks[: max(net._stage_out_idx)]
    return Backbone(net, architecture, levels)


class LevelInfo(NamedTuple):
    """What is known of an architecture's levels without its weights.

    Args:
        channels: of each level.
        is_transformer: all levels, which are blocks then, have one position for each patch of the image.
        side_multiple: an input's sides are multiples of it, pixels.
        has_next: whether the architecture has another level after the last.
    """

    channels: tuple[int, ...]
    is_transformer: bool
    side_multiple: int
    has_next: bool


def _create(architecture: str, levels: tuple[int, ...]) -> Any:
    config = timm.get_pretrained_cfg(architecture)
    if config and config.fixed_input_size:
        # Position embeddings that fit a single size are interpolated, where the architecture can.
        with suppress(TypeError):
            return timm.create_model(architecture, features_only=True, out_indices=levels, dynamic_img_size=True)
    return timm.create_model(architecture, features_only=True, out_indices=levels)


@lru_cache(maxsize=64)
def describe_levels(teacher: str, levels: tuple[int, ...]) -> LevelInfo:
    """Describe an architecture's levels; raise ConfigError as `build_backbone` does."""
    with torch.device("meta"):
        backbone = build_backbone(teacher, levels)
        try:
            has_next = bool(build_backbone(teacher, (levels[-1] + 1,)))
        except ConfigError:
            has_next = False
    is_transformer = isinstance(backbone.net, FeatureGetterNet)
    multiple = backbone.strides[-1] if is_transformer else SIDE_MULTIPLE
    return LevelInfo(tuple(backbone.channels), is_transformer, multiple, has_next)


def build_seeded_backbone(teacher: str, levels: tuple[int, ...], seed: int, zero_init_residual: bool) -> Backbone:
    """Build a teacher's architecture with weights that depend only on the seed. Leave torch's global generator alone.

    With `zero_init_residual` residual branches start at zero where timm starts them there, else at one, as the paper's
    authors do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = build_backbone(teacher, levels)
    if not zero_init_residual:
        for module in student.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 1 and not weight.any():
                nn.init.ones_(weight)
    return student


def load_backbone(teacher: str, levels: tuple[int, ...], state: StateDict, origin: str) -> Backbone:
    """Build a teacher's architecture in eval mode with the given weights.

    Raises:
        ModelError: if their keys or shapes do not match the architecture; it names their `origin`.
    """
    backbone = build_backbone(teacher, levels)
    load_weights(backbone.net, state, origin, architecture_name(teacher))
    return backbone.eval()


def cast_weights(backbone: Backbone) -> None:
    """Cast to bfloat16, once, the weights that autocast casts in each pass: of convolutions and linear layers."""
    for module in backbone.modules():
        # A subclass may compute with its weights first, as standardised convolutions do.
        if type(module) in (nn.Conv2d, Conv2dSame, nn.Linear):
            module.to(torch.bfloat16)


def serialise(state: StateDict) -> bytes:
    """Convert weights to safetensors; the same weights give the same bytes."""
    data: bytes = save_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    return data


def deserialise(data: bytes, origin: str) -> StateDict:
    """Convert safetensors to weights, or raise ModelError if the bytes are damaged."""
    try:
        state: StateDict = load_safetensors(data)
    except SafetensorError as error:
        raise ModelError(f"{origin}: not a safetensors file, or damaged: {error}") from error
    return state


def load_weights(net: nn.Module, state: StateDict, origin: str, architecture: str) -> None:
    """Load weights into a network of this architecture; raise ModelError if their keys or shapes do not match."""
    try:
        # A network on the meta device has no memory to copy to.
        net.load_state_dict(dict(state), assign=next(net.parameters()).is_meta)
    except RuntimeError as error:
        mismatch = shorten(str(error).partition(":")[2], _MAX_MISMATCH, placeholder=" …")
        raise ModelError(f"{origin}: weights do not match timm's {architecture}: {mismatch}") from error
