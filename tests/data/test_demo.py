from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stpm import storage
from stpm.data import demo, mvtec
from stpm.data.masks import decode_mask


def test_demo_set_is_complete_reproducible_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("TRAIN_IMAGES", 5), ("GOOD_IMAGES", 3), ("IMAGES_PER_DEFECT", 2)):
        monkeypatch.setattr(demo, name, count)
    for name in ("one", "two"):
        demo.make(str(tmp_path / name))
    assert mvtec.find_categories(str(tmp_path / "one")) == ["brick", "grass", "gravel"]
    for name in demo.TEXTURES:
        category = mvtec.read_category(str(tmp_path / "one"), name)
        assert len(category.train) == demo.TRAIN_IMAGES
        defects = [image for image in category.test if image.label != mvtec.GOOD]
        assert len(category.test) - len(defects) == demo.GOOD_IMAGES
        assert {image.label for image in defects} == {"foreign", "hole", "smear", "stain"}
        for image in defects:
            mask = decode_mask(storage.read(image.mask))
            assert mask.shape == (demo.CROP, demo.CROP)
            assert 0.005 < mask.mean() < 0.2
            assert storage.read(image.uri) == storage.read(image.uri.replace("/one/", "/two/"))
    changed = tmp_path / "one" / "brick" / "train" / "good" / "lot-0_000.png"
    Image.new("L", (1, 1)).save(changed)
    demo.make(str(tmp_path / "one"))
    assert Image.open(changed).size == (1, 1)


def test_demo_defects_change_images_inside_their_masks() -> None:
    texture = np.random.default_rng(0).integers(60, 200, (demo.CROP, demo.CROP), dtype=np.uint8)
    for draw in demo._DEFECTS.values():
        image, mask = draw(np.random.default_rng(1), texture, texture[::-1])
        change = np.abs(image.astype(int) - texture)
        assert change[mask > 0].mean() > 10 * change[mask == 0].mean()
