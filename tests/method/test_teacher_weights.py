from pathlib import Path
from typing import Any

import pytest
import requests
import timm
import torch
from huggingface_hub import constants as hub
from safetensors.torch import save_file

from stpm import storage
from stpm.errors import ConfigError, ModelError
from stpm.method.backbones import build_backbone, build_seeded_backbone, load_backbone, serialise
from stpm.method.recipe import Recipe
from stpm.method.teacher_weights import _RANDOM_TEACHER_SEED, RANDOM_WEIGHTS, load_teacher_weights

LEVELS = (1, 2, 3)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("architecture", ["resnet18", "test_convnext"])
def test_load_teacher_weights_drops_the_head_of_a_whole_network(tmp_path: Path, architecture: str, suffix: str) -> None:
    torch.manual_seed(1)
    whole = timm.create_model(architecture, num_classes=7).eval()
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


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("w.pth", b"not weights", "plain weights"),
        ("bomb.pth", None, "plain weights"),
        ("w.safetensors", b"not weights", "not a safetensors file"),
        ("w.txt", b"", "give a .safetensors or .pth file"),
    ],
)
def test_load_teacher_weights_refuses_other_files_and_pickles_with_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is None:
        torch.save({"conv1.weight": Bomb()}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ConfigError, ModelError), match=error):
        load_teacher_weights("resnet18", str(tmp_path / name), LEVELS)
    assert not (tmp_path / "bomb-went-off").exists()


def test_load_teacher_weights_names_missing_file_architecture_and_levels() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_teacher_weights("resnet18", "/nowhere/w.pth", LEVELS)
    with pytest.raises(ConfigError, match="'resnet81' is not an architecture of timm"):
        load_teacher_weights("resnet81", "random", LEVELS)
    with pytest.raises(ConfigError, match=r"cannot give pyramid levels \(1, 9\)"):
        load_teacher_weights("resnet18", "random", (1, 9))


def test_an_absent_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The hub's client would try for a minute, and print each try."""
    # Nobody listens there.
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9 cannot be reached; give --teacher demo, which needs no"):
        load_teacher_weights("resnet18.tv_in1k", "", LEVELS)
    with pytest.raises(ConfigError, match=r"Invalid pretrained tag.*or name a tag that timm lists"):
        load_teacher_weights("resnet18.no_such_tag", "", LEVELS)
    assert capfd.readouterr() == ("", "")
    assert not hub.HF_HUB_OFFLINE


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_no_student_starts_as_the_untrained_teacher(seed: int) -> None:
    with pytest.raises(ConfigError, match="seed"):
        Recipe(seed=_RANDOM_TEACHER_SEED)
    teacher = load_teacher_weights("test_resnet", RANDOM_WEIGHTS, LEVELS)
    student = build_seeded_backbone("test_resnet", LEVELS, Recipe(seed=seed).seed, zero_init_residual=False).net
    assert not torch.equal(teacher["conv1.0.weight"], student.state_dict()["conv1.0.weight"])


def test_demo_teacher_has_trained_weights() -> None:
    state = load_teacher_weights("demo", "", LEVELS)
    backbone = load_backbone("tf_efficientnet_lite0", LEVELS, state, "test")
    assert backbone.channels == [24, 40, 112]
    # Trained batch statistics: a random network has mean 0 and variance 1 everywhere.
    assert state["bn1.running_var"].std() > 0.1


@pytest.mark.parametrize("teacher", ["mobilenetv3_small_050.lamb_in1k", "resnet18.tv_in1k"])
def test_a_downloaded_teacher_fits_its_backbone(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create_model, offline = timm.create_model, []

    def create(name: str, **options: Any) -> Any:
        offline.append(hub.HF_HUB_OFFLINE)
        return create_model(name, **options | {"pretrained": False})

    def refuse(uri: str, **options: Any) -> None:
        # Where a company's proxy signs certificates, the hub's client may still trust them.
        raise requests.exceptions.SSLError(uri)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(requests, "head", refuse)
    weights = load_teacher_weights(teacher, "", (1, 2, 3))
    assert load_backbone(teacher, (1, 2, 3), weights, "the download").net.state_dict().keys() == weights.keys()
    assert not any(offline)
