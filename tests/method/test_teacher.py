from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stpm.detector import Detector
from stpm.errors import ModelError
from stpm.method.backbones import Backbone, build_seeded_backbone
from stpm.method.openvino_backend import OpenVinoBackbone
from stpm.method.teacher import Float32Depthwise, Teacher, to_device
from stpm.options import Backend
from tests.conftest import TINY, make_preprocessing

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def make_teacher(backend: Backend) -> Teacher:
    """Make an untrained teacher."""
    backbone = build_seeded_backbone("test_resnet", (1, 2, 3), 1, zero_init_residual=False)
    return Teacher(backbone, make_preprocessing(64), torch.device("cpu"), "float32", backend)


def test_backends_agree_on_anomaly_maps() -> None:
    pytest.importorskip("openvino", reason="openvino is not installed: its backend was not tried")
    student = build_seeded_backbone("test_resnet", (1, 2, 3), 0, zero_init_residual=False).net.state_dict()
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    content = make_preprocessing(64).content([(64, 64)] * 3)
    maps = []
    for teacher in (make_teacher("pytorch"), make_teacher("openvino")):
        detector = Detector.assemble(teacher, TINY, student, ())
        maps.append(detector.anomaly_maps(detector.distances(teacher.inputs(pixels), content), content))
    assert isinstance(detector.student, OpenVinoBackbone)
    for ours, theirs in zip(*maps, strict=True):
        np.testing.assert_allclose(ours.total, theirs.total, rtol=1e-3, atol=1e-5)


def test_pytorch_computes_what_it_cannot(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> None:
        raise ModelError("OpenVINO cannot compile test_resnet: unknown operation")

    monkeypatch.setattr("stpm.method.teacher.OpenVinoBackbone", refuse)
    fallback = make_teacher("openvino")
    assert all(isinstance(each, Backbone) for each in fallback.backbones)
    # What the record of a fit and the fingerprint of its checkpoints say.
    assert fallback.backend == "pytorch"
    assert "unknown operation; PyTorch computes it instead" in caplog.text


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_gradients_of_a_depthwise_convolution_are_those_of_float32_and_others_are_left_to_autocast(groups: int) -> None:
    images = torch.randn(2, 8, 9, 9).bfloat16()
    convolution = nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=groups, bias=False)
    convolution(images.float()).square().sum().backward()
    assert convolution.weight.grad is not None
    expected = convolution.weight.grad.clone()
    convolution.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        plain = convolution(images)
        with Float32Depthwise():
            output = convolution(images)
    assert output.dtype == torch.bfloat16
    assert groups == 8 or torch.equal(output, plain)
    if groups == 8:
        # Only the output is rounded.
        output.float().square().sum().backward()
        tolerance = 0.02 * float(expected.abs().max())
        torch.testing.assert_close(convolution.weight.grad, expected, rtol=0.02, atol=tolerance)


class Call(NamedTuple):
    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def device_types(self) -> set[str]:
        """Return the devices of the tensors that it takes, but numbers, and the one that its result is wanted on."""
        tensors = [each for each in tree_leaves((self.arguments, self.options)) if isinstance(each, Tensor)]
        wanted = self.options.get("device")
        return {each.device.type for each in tensors if each.ndim} | ({torch.device(wanted).type} if wanted else set())


class Operators(TorchDispatchMode):
    """Collects the calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.calls.append(Call(func.overloadpacket.__name__, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("architecture", "casts"),
    [
        ("resnet18", 0),
        ("tf_efficientnet_lite0", 0),
        ("convnext_atto", 0),
        ("vit_tiny_patch16_dinov3_qkvb", 0),
        ("xcit_nano_12_p16_224", 0),
        # It standardises the weights of its convolutions in float32; the biases are what autocast casts.
        ("nf_regnet_b0", 15),
    ],
)
def test_weights_are_cast_once_to_what_autocast_casts_them_to_in_each_pass(
    architecture: str, casts: int, device: str
) -> None:
    teacher, student = (build_seeded_backbone(architecture, (1, 2), 0, zero_init_residual=False) for _ in range(2))
    images = torch.rand(2, 3, 224, 224).to(device, memory_format=torch.channels_last)
    to_device(teacher, torch.device(device)).eval()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        expected = teacher(images)
    frozen = Teacher(teacher, make_preprocessing(224), torch.device(device), "bfloat16")
    for backbone in (*frozen.backbones, frozen.compile(student.eval())):
        assert isinstance(backbone, Backbone)
        weights = {each.data_ptr() for each in backbone.parameters() if each.dtype == torch.float32}
        with torch.no_grad(), Operators() as operators:
            found = frozen.compute(backbone, images)
        assert all(map(torch.equal, found, expected))
        calls = [call.arguments[0].data_ptr() for call in operators.calls if call.name == "_to_copy"]
        assert sum(pointer in weights for pointer in calls) == casts
