"""Backbones compiled by OpenVINO: PyTorch's features on a CPU, faster than PyTorch there."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stpm.errors import ModelError
from stpm.method.backbones import Backbone, build_seeded_backbone
from stpm.method.recipe import Precision

_PRECISION_HINTS: Mapping[Precision, str] = {"float32": "f32", "bfloat16": "bf16"}
# Largest difference to PyTorch's features, relative to the largest of them: bfloat16 rounds in other places.
_TOLERANCES: Mapping[Precision, float] = {"float32": 1e-3, "bfloat16": 0.2}


class OpenVinoBackbone:
    """A compiled backbone for images of one size.

    A call takes (B, 3, H, W) float32 on the CPU, fastest if channels last in memory, and returns one (B, Cₗ, Hₗ, Wₗ)
    float32 tensor per pyramid level, channels last in memory, finest first. It computes one image after the other: a
    batch is no faster on a CPU, and one shape is compiled once.

    Args:
        backbone: the backbone to compile, in eval mode, on the CPU.
        height: height of the images, pixels.
        width: width of the images, pixels.
        precision: number format of convolutions.

    Raises:
        ModelError: if OpenVINO cannot compile it, or computes other features than PyTorch.
    """

    def __init__(self, backbone: Backbone, height: int, width: int, precision: Precision) -> None:
        try:
            self._request = _compile(backbone, height, width, precision).create_infer_request()
            shapes = [tuple(output.shape) for output in self._request.model_outputs]
            self._shapes = [(channels, rows, columns) for _, rows, columns, channels in shapes]
            difference = self._difference(backbone, height, width)
        except Exception as error:
            # OpenVINO raises no exception of its own for an unknown operation.
            raise ModelError(f"OpenVINO cannot compile {backbone.architecture}: {error}") from error
        self.nbytes = backbone.nbytes
        if not difference < _TOLERANCES[precision]:
            raise ModelError(
                f"OpenVINO's features of {backbone.architecture} differ by {difference:.2g} from PyTorch's, relative "
                f"to the largest; {_TOLERANCES[precision]:g} are allowed in {precision}"
            )

    def __call__(self, images: Tensor) -> list[Tensor]:
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        levels = [torch.empty((len(images), *s), memory_format=torch.channels_last) for s in self._shapes]
        for index in range(len(images)):
            outputs = self._request.infer({0: pixels[index : index + 1]}, share_inputs=True, share_outputs=True)
            for level, output in zip(levels, outputs.values(), strict=True):
                level[index] = torch.from_numpy(output)[0].permute(2, 0, 1)
        return levels

    def _difference(self, backbone: Backbone, height: int, width: int) -> float:
        """Compare the features of one random image, relative to the largest value of each level."""
        image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            pairs = zip(self(image), backbone(image), strict=True)
        ratios = [(ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6) for ours, theirs in pairs]
        # Python's `max` loses a NaN.
        return float(torch.stack(ratios).max())


def _compile(backbone: Backbone, height: int, width: int, precision: Precision) -> Any:
    openvino = _import_openvino()
    graph = _with_channels_last(_graph_with_weights(backbone, height, width))
    settings = {
        "INFERENCE_PRECISION_HINT": _PRECISION_HINTS[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        # With it, each process pins its threads to the same first cores.
        "ENABLE_CPU_PINNING": False,
    }
    return openvino.Core().compile_model(graph, "CPU", settings)


def _import_openvino() -> Any:
    # OpenVINO reports each import over the network, unless its telemetry cannot be imported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _graph_with_weights(backbone: Backbone, height: int, width: int) -> Any:
    """Make OpenVINO's graph of a backbone: that of its architecture, converted once, with its own weights.

    Conversion takes ten times as long as replacing the weights, and a scorer may serve hundreds of students.
    """
    graph = _convert_architecture(backbone.architecture, backbone.levels, height, width).clone()
    weights = {f"self.{name}": value for name, value in backbone.state_dict().items() if value.is_floating_point()}
    constants = {op.get_friendly_name(): op for op in graph.get_ops() if op.get_type_name() == "Constant"}
    if not weights.keys() <= constants.keys():
        # The conversion has merged some weights into others.
        return _convert(backbone, height, width)
    for name, value in weights.items():
        replacement = _import_openvino().opset13.constant(value.numpy())
        for user in constants[name].output(0).get_target_inputs():
            user.replace_source_output(replacement.output(0))
    return graph


@lru_cache(maxsize=8)
def _convert_architecture(architecture: str, levels: tuple[int, ...], height: int, width: int) -> Any:
    return _convert(build_seeded_backbone(architecture, levels, 0, zero_init_residual=True).eval(), height, width)


def _convert(backbone: Backbone, height: int, width: int) -> Any:
    """Convert a backbone as `openvino.convert_model` does, but keep each weight a constant that can be replaced."""
    openvino = _import_openvino()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings(), torch.no_grad():
        # The warnings say that a trace holds for one size, which is the only one here, and recommend `torch.export`,
        # which takes several times as long.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.simplefilter("ignore", DeprecationWarning)
        inputs = torch.zeros(1, 3, height, width)
        traced = torch.jit.trace(backbone, inputs, check_trace=False, strict=False)  # type: ignore[no-untyped-call]
    frontend = FrontEndManager().load_by_framework("pytorch")
    # The frontend keeps no reference to the decoder that it reads from.
    decoder = TorchScriptPythonDecoder(traced, shared_memory=False)
    graph = frontend.convert(frontend.load(decoder))
    graph.reshape(openvino.PartialShape([1, 3, height, width]))
    return graph


def _with_channels_last(graph: Any) -> Any:
    """Make the graph take and give tensors with channels last."""
    from openvino import Layout
    from openvino.preprocess import PrePostProcessor

    processor = PrePostProcessor(graph)
    for port in (processor.input(0), *(processor.output(i) for i in range(len(graph.outputs)))):
        port.tensor().set_layout(Layout("NHWC"))
        port.model().set_layout(Layout("NCHW"))
    return processor.build()
