from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from stpm import storage
from stpm.errors import ConfigError, ModelError
from stpm.method.backbones import (
    _RANDOM_TEACHER_SEED,
    RANDOM_WEIGHTS,
    build_backbone,
    build_student,
    deserialise,
    load_backbone,
    load_teacher_weights,
    resolve_data_config,
    serialise,
)
from stpm.method.recipe import Recipe

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
    assert [tuple(f.shape[1:]) for f in features] == [
        (channels, *shape) for channels, shape in zip(backbone.channels, shapes, strict=True)
    ]


def test_backbone_levels_of_paper_have_strides_4_8_16() -> None:
    shapes = [tuple(f.shape[1:]) for f in build_backbone("resnet18", LEVELS)(torch.zeros(1, 3, 256, 256))]
    assert shapes == [(64, 64, 64), (128, 32, 32), (256, 16, 16)]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("architecture", ["resnet18", "test_convnext"])
def test_load_teacher_weights_drops_the_head_of_a_whole_network(tmp_path: Path, architecture: str, suffix: str) -> None:
    torch.manual_seed(1)
    whole = timm.create_model(architecture).eval()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(whole.state_dict(), path)
    else:
        save_file(whole.state_dict(), path)
    backbone = load_backbone(architecture, LEVELS, load_teacher_weights(architecture, str(path), LEVELS), "test")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.forward_intermediates(images, intermediates_only=True)
        for ours in backbone(images):
            theirs = next(f for f in expected if f.shape == ours.shape)
            torch.testing.assert_close(ours, theirs)


def test_load_teacher_weights_reads_a_backbone_unchanged(root: str) -> None:
    state = build_backbone("test_resnet", LEVELS).net.state_dict()
    storage.publish(f"{root}/backbone.safetensors", serialise(state))
    loaded = load_teacher_weights("test_resnet", f"{root}/backbone.safetensors", LEVELS)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


def test_load_teacher_weights_ignores_classifier_size(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "w.pth")
    assert load_teacher_weights("test_resnet", str(tmp_path / "w.pth"), LEVELS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer9.weight", r'w.pth: .* Missing key.* "conv1.weight". Unexpected key.* "layer9.weight"'),
        ("conv1.weight", r"size mismatch for conv1.weight: .*\[64, 1, 7, 7\].*\[64, 3, 7, 7\]"),
    ],
)
def test_load_teacher_weights_names_what_does_not_match(tmp_path: Path, name: str, message: str) -> None:
    state = timm.create_model("resnet18").state_dict()
    del state["conv1.weight"]
    torch.save(state | {name: torch.zeros(64, 1, 7, 7)}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=message):
        load_teacher_weights("resnet18", str(tmp_path / "w.pth"), LEVELS)


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (Path("bomb-went-off"), "boom")


def test_load_teacher_weights_refuses_pickles_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Bomb()}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="plain weights"):
        load_teacher_weights("resnet18", str(tmp_path / "w.pth"), LEVELS)
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("w.pth", b"not weights", "plain weights"),
        ("w.safetensors", b"not weights", "not a safetensors file"),
        ("w.txt", b"", "give a .safetensors or .pth file"),
    ],
)
def test_load_teacher_weights_refuses_other_files(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ConfigError, ModelError), match=error):
        load_teacher_weights("resnet18", str(tmp_path / name), LEVELS)


def test_load_teacher_weights_names_missing_file_architecture_and_levels() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_teacher_weights("resnet18", "/nowhere/w.pth", LEVELS)
    with pytest.raises(ConfigError, match="'resnet81' is not an architecture of timm"):
        load_teacher_weights("resnet81", "random", LEVELS)
    with pytest.raises(ConfigError, match=r"cannot give pyramid levels \(1, 9\)"):
        load_teacher_weights("resnet18", "random", (1, 9))


def test_load_teacher_weights_names_a_remedy_when_download_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="give --teacher-weights FILE"):
        load_teacher_weights("resnet18.no_such_tag", "", LEVELS)


def test_build_student_depends_on_seed_and_keeps_global_generator() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build_student("test_resnet", LEVELS, seed, False).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_no_student_starts_as_the_untrained_teacher(seed: int) -> None:
    with pytest.raises(ConfigError, match="seed"):
        Recipe(seed=_RANDOM_TEACHER_SEED)
    teacher = load_teacher_weights("test_resnet", RANDOM_WEIGHTS, LEVELS)
    student = build_student("test_resnet", LEVELS, Recipe(seed=seed).seed, zero_init_residual=False).net.state_dict()
    assert not torch.equal(teacher["conv1.0.weight"], student["conv1.0.weight"])


def test_build_student_initialises_residual_branches() -> None:
    ours = build_student("resnet18", LEVELS, 0, zero_init_residual=False).net
    timms = build_student("resnet18", LEVELS, 0, zero_init_residual=True).net
    assert ours.layer1[0].bn2.weight.mean() == 1
    assert timms.layer1[0].bn2.weight.abs().sum() == 0


def test_demo_teacher_has_trained_weights() -> None:
    state = load_teacher_weights("demo", "", LEVELS)
    backbone = load_backbone("tf_efficientnet_lite0", LEVELS, state, "test")
    assert backbone.channels == [24, 40, 112]
    # Trained batch statistics: a random network has mean 0 and variance 1 everywhere.
    assert state["bn1.running_var"].std() > 0.1


def test_serialise_round_trips_and_deserialise_refuses_damage() -> None:
    state = build_backbone("test_resnet", LEVELS).net.state_dict()
    data = serialise(state)
    assert data == serialise(state)
    assert all(torch.equal(deserialise(data, "x")[k], v) for k, v in state.items())
    with pytest.raises(ModelError, match="damaged"):
        deserialise(data[: len(data) // 2], "x")


@pytest.mark.parametrize(
    "teacher",
    [
        "demo",
        "resnet18.tv_in1k",
        "resnet18",
        "wide_resnet50_2",
        "test_resnet.r160_in1k",
        "tf_efficientnet_b0.ns_jft_in1k",
    ],
)
def test_resolve_data_config_matches_timm(teacher: str) -> None:
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_lite0" if teacher == "demo" else teacher)
    expected = timm.data.resolve_data_config(model=model)
    found = resolve_data_config(teacher)
    assert (found.mean, found.std, found.interpolation) == tuple(expected[k] for k in ("mean", "std", "interpolation"))


def test_resolve_data_config_refuses_unknown_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"'resnet18\.gone': .*tag \(gone\).* Name a tag that timm lists, or set --norm"
    ):
        resolve_data_config("resnet18.gone")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
    with pytest.raises(ConfigError, match=r"teacher 'mine': timm has no configuration of it\. Name a tag"):
        resolve_data_config("mine")


@pytest.mark.parametrize(
    "architecture", ["tf_efficientnet_lite0", "mobilenetv3_small_050", "resnet18", "test_convnext"]
)
def test_every_weight_has_a_part_in_the_features(architecture: str) -> None:
    backbone = build_student(architecture, (1, 2, 3), 0, zero_init_residual=False)
    torch.stack([level.sum() for level in backbone(torch.randn(2, 3, 64, 64))]).sum().backward()
    assert [name for name, weight in backbone.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("teacher", ["mobilenetv3_small_050.lamb_in1k", "resnet18.tv_in1k"])
def test_a_downloaded_teacher_fits_its_backbone(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create_model = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **options: create_model(name, **options | {"pretrained": False})
    )
    weights = load_teacher_weights(teacher, "", (1, 2, 3))
    assert load_backbone(teacher, (1, 2, 3), weights, "the download").net.state_dict().keys() == weights.keys()
