"""Backbones compiled by OpenVINO: PyTorch's features on a CPU, faster than PyTorch there."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from stpm.errors import ModelError
from stpm.method.backbones import Backbone, build_seeded_backbone
from stpm.method.recipe import Precision

_FLOAT_BYTES = 4
_PRECISION_HINTS: Mapping[Precision, str] = {"float32": "f32", "bfloat16": "bf16"}
# Smallest cosine of a level's features and PyTorch's in float32. On images of six products the packaged teacher has
# 0.9956 or more in bfloat16, where PyTorch has 0.9974 or more, and 1.00000 in float32.
_MIN_COSINES: Mapping[Precision, float] = {"float32": 0.9999, "bfloat16": 0.99}


class OpenVinoBackbone:
    """A compiled backbone for images of one size.

    A call takes (B, 3, H, W) float32 on the CPU, fastest if channels last in memory, and returns one (B, Cₗ, Hₗ, Wₗ)
    float32 tensor per pyramid level, channels last in memory, finest first. It computes one image after the other: a
    batch is no faster on a CPU, and one shape is compiled once.

    The backbone to compile is in eval mode, on the CPU.

    Raises:
        ModelError: if OpenVINO cannot compile it, or computes other features than PyTorch.
    """

    def __init__(self, backbone: Backbone, height: int, width: int, precision: Precision) -> None:
        try:
            compiled = _compile(backbone, height, width, precision)
            self._request = compiled.create_infer_request()
            # Detectors of several threads may share it, whose next results take the place of those not copied yet.
            self._lock = Lock()
            shapes = [tuple(output.shape) for output in self._request.model_outputs]
            self._shapes = [(channels, rows, columns) for _, rows, columns, channels in shapes]
            cosines = self._cosines(backbone, height, width)
        except Exception as error:
            # OpenVINO raises no exception of its own for an unknown operation.
            raise ModelError(f"OpenVINO cannot compile {backbone.architecture}: {error}") from error
        # It keeps the weights twice, in the graph and packed; and the activations, which take about two of the largest.
        tensors = [port.get_shape() for op in compiled.get_runtime_model().get_ops() for port in op.outputs()]
        self.nbytes = 2 * (backbone.nbytes + _FLOAT_BYTES * max(map(math.prod, tensors)))
        # A NaN is not larger either.
        if not all(cosine > _MIN_COSINES[precision] for cosine in cosines):
            raise ModelError(
                f"OpenVINO's features of {backbone.architecture} are others than PyTorch's: their cosines are "
                f"{', '.join(f'{cosine:.5f}' for cosine in cosines)} by level; {precision} needs "
                f"{_MIN_COSINES[precision]:g}"
            )

    def __call__(self, images: Tensor) -> list[Tensor]:
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        levels = [torch.empty((len(images), *s), memory_format=torch.channels_last) for s in self._shapes]
        for index in range(len(images)):
            with self._lock:
                outputs = self._request.infer({0: pixels[index : index + 1]}, share_inputs=True, share_outputs=True)
                for level, output in zip(levels, outputs.values(), strict=True):
                    level[index] = torch.from_numpy(output)[0].permute(2, 0, 1)
        return levels

    def _cosines(self, backbone: Backbone, height: int, width: int) -> list[float]:
        """Return the cosine of each level's features and PyTorch's, of one image with detail at every scale."""
        with torch.no_grad():
            pairs = zip(self(image := _example(height, width)), backbone(image), strict=True)
            return [float(cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)) for ours, theirs in pairs]


def _example(height: int, width: int) -> Tensor:
    """Make a (1, 3, H, W) image with the spectrum of photographs: the coarser a detail, the stronger it is."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(1, 3, height, width)
    for side in (2**octave for octave in range(1, min(height, width).bit_length())):
        noise = torch.randn(1, 3, side, side, generator=generator) / side**0.5
        image += interpolate(noise, (height, width), mode="bilinear")
    return image / image.std()


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
