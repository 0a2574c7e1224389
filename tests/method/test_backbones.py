import pytest
import timm
import torch

from stpm.errors import ConfigError, ModelError
from stpm.method.backbones import build_backbone, build_seeded_backbone, deserialise, resolve_data_config, serialise

LEVELS = (1, 2, 3)


@pytest.mark.parametrize(
    ("architecture", "levels", "input_shape", "stride"),
    [
        ("resnet18", LEVELS, (224, 256), 4),
        ("tf_efficientnet_lite0", LEVELS, (224, 256), 4),
        ("test_convnext", LEVELS, (224, 256), 8),
        ("swin_tiny_patch4_window7_224", (0, 1), (224, 224), 4),
        # At these shapes the finest level is as high as it has channels.
        ("resnet18", LEVELS, (256, 288), 4),
        ("mambaout_femto", (0, 1), (192, 224), 4),
    ],
)
def test_backbone_returns_levels_channels_first(
    architecture: str, levels: tuple[int, ...], input_shape: tuple[int, int], stride: int
) -> None:
    backbone = build_backbone(architecture, levels)
    features = backbone(torch.zeros(1, 3, *input_shape))
    shapes = [(input_shape[0] // stride // 2**i, input_shape[1] // stride // 2**i) for i in range(len(levels))]
    assert [tuple(f.shape[2:]) for f in features] == shapes
    assert [f.shape[1] for f in features] == backbone.channels
    # As in the paper.
    assert architecture != "resnet18" or backbone.channels == [64, 128, 256]


def test_build_seeded_backbone_depends_on_seed_and_keeps_global_generator() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build_seeded_backbone("test_resnet", LEVELS, seed, False).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    ours, timms = (build_seeded_backbone("resnet18", LEVELS, 0, zero_init_residual=zero).net for zero in (False, True))
    assert ours.layer1[0].bn2.weight.mean() == 1
    assert timms.layer1[0].bn2.weight.abs().sum() == 0


def test_serialise_round_trips_and_deserialise_refuses_damage() -> None:
    state = build_backbone("test_resnet", LEVELS).net.state_dict()
    data = serialise(state)
    assert data == serialise(state)
    assert all(torch.equal(deserialise(data, "x")[k], v) for k, v in state.items())
    with pytest.raises(ModelError, match="damaged"):
        deserialise(data[: len(data) // 2], "x")


@pytest.mark.parametrize(
    "teacher",
    ["demo", "resnet18.tv_in1k", "test_resnet.r160_in1k", "wide_resnet50_2", "tf_efficientnet_b0.ns_jft_in1k"],
)
def test_resolve_data_config_matches_timm(teacher: str) -> None:
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_lite0" if teacher == "demo" else teacher)
    expected = timm.data.resolve_data_config(model=model)
    found = resolve_data_config(teacher)
    assert (found.mean, found.std, found.interpolation) == tuple(expected[k] for k in ("mean", "std", "interpolation"))


def test_resolve_data_config_refuses_unknown_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'resnet18\.gone': .*tag \(gone\).* Name a tag that timm lists, or set -"):
        resolve_data_config("resnet18.gone")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
    with pytest.raises(ConfigError, match=r"teacher 'mine': timm has no configuration of it\. Name a tag"):
        resolve_data_config("mine")


@pytest.mark.parametrize(
    "architecture", ["tf_efficientnet_lite0", "mobilenetv3_small_050", "resnet18", "test_convnext"]
)
def test_every_weight_has_a_part_in_the_features(architecture: str) -> None:
    backbone = build_seeded_backbone(architecture, (1, 2, 3), 0, zero_init_residual=False)
    torch.stack([level.sum() for level in backbone(torch.randn(2, 3, 64, 64))]).sum().backward()
    assert [name for name, weight in backbone.named_parameters() if weight.grad is None] == []
