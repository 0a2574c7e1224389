import os
from pathlib import Path

import pytest

from stpm import storage
from stpm.data import mvtec
from stpm.errors import DataError
from tests.datasets import make_category


def test_read_category_lists_images_masks_and_versions(root: str) -> None:
    make_category(root, "nut", train=3, good=2, defects=2)
    category = mvtec.read_category(root, "nut")
    assert [uri.rsplit("/", 1)[-1] for uri, _ in category.train] == ["000.png", "001.png", "002.png"]
    assert [*category.train] == storage.file_versions(f"{root}/nut/train")
    # An image or mask that was written anew has another version.
    for uri in (category.test[0].uri, category.test[-1].mask):
        storage.publish(uri, storage.read(uri))
        before, category = category, mvtec.read_category(root, "nut")
        assert before.test != category.test
    assert [(image.label, image.mask.rsplit("/", 1)[-1]) for image in category.test] == [
        ("good", ""),
        ("good", ""),
        ("square", "000_mask.png"),
        ("square", "001_mask.png"),
    ]
    assert all(storage.exists(image.uri) for image in category.test)
    assert storage.exists(category.test[2].mask)


def test_read_category_accepts_jpeg_without_masks_and_masks_without_suffix(root: str) -> None:
    make_category(root, "nut", masks=False, kind="JPEG", defects=1)
    category = mvtec.read_category(root, "nut")
    assert [image.mask for image in category.test] == [""] * 5
    mask = storage.join(root, "nut/ground_truth/square/000.png")
    storage.publish(mask, b"a mask")
    assert mvtec.read_category(root, "nut").test[-1].mask.endswith("ground_truth/square/000.png")


def test_read_category_ignores_other_files(root: str) -> None:
    make_category(root, "nut", train=2, good=0, defects=0)
    hidden = ("nut/train/good/._000.png", "nut/train/good/.ipynb_checkpoints/000-checkpoint.png")
    hidden += ("nut/train/good/@eaDir/000.png/SYNOPHOTO_THUMB_M.jpg", "nut/train/good/#recycle/001.png")
    for name in ("nut/train/good/Thumbs.db", "nut/readme.txt", "license.txt", *hidden):
        storage.publish(storage.join(root, name), b"x")
    assert len(mvtec.read_category(root, "nut").train) == 2
    assert mvtec.find_categories(root) == ["nut"]


def test_read_category_accepts_deeper_folders(root: str) -> None:
    make_category(root, "nut", train=2, good=0, defects=2)
    for before, after in (
        ("train/good/001.png", "train/good/lot 7/a/001.png"),
        ("test/square/001.png", "test/square/lot 7/001.png"),
        ("ground_truth/square/001_mask.png", "ground_truth/square/lot 7/001_mask.png"),
    ):
        storage.publish(storage.join(root, "nut", after), storage.read(storage.join(root, "nut", before)))
    category = mvtec.read_category(root, "nut")
    train = [uri.removeprefix(f"{root}/nut/train/good/") for uri, _ in category.train]
    assert train == ["000.png", "001.png", "lot 7/a/001.png"]
    expected = [image.uri.replace("/test/", "/ground_truth/").replace(".png", "_mask.png") for image in category.test]
    assert [image.mask for image in category.test] == expected


def test_a_link_to_a_category_is_one_and_a_link_inside_is_refused(tmp_path: Path) -> None:
    make_category(str(tmp_path / "nas"), "bolt", train=1, good=0, defects=0)
    data = tmp_path / "data"
    (data / "screw" / "train").mkdir(parents=True)
    (data / "bolt").symlink_to(tmp_path / "nas" / "bolt")
    (data / "screw" / "train" / "good").symlink_to(tmp_path / "nas" / "bolt" / "train" / "good")
    assert mvtec.find_categories(str(data)) == ["bolt", "screw"]
    assert len(mvtec.read_category(str(data), "bolt").train) == 1
    with pytest.raises(DataError, match=r"no images in train/good .*; links to folders are not followed inside"):
        mvtec.read_category(str(data), "screw")


def test_find_categories_lists_all_or_wanted(root: str) -> None:
    for name in ("b", "a", "c"):
        make_category(root, name, train=1, good=0, defects=0)
    assert mvtec.find_categories(root) == ["a", "b", "c"]
    assert mvtec.find_categories(root, ["c", "a", "c"]) == ["a", "c"]
    with pytest.raises(DataError, match="no category d; there are a, b, c"):
        mvtec.find_categories(root, ["a", "d"])


def test_missing_empty_and_unsafe_folders_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        mvtec.find_categories(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no category folders"):
        mvtec.find_categories(str(tmp_path))
    (tmp_path / "hollow" / "train" / "good").mkdir(parents=True)
    with pytest.raises(DataError, match=rf"this is one category; give .*: --data {tmp_path} --categories hollow$"):
        mvtec.find_categories(str(tmp_path / "hollow"), ["hollow"])
    with pytest.raises(DataError, match=r"hollow: no images in train/good"):
        mvtec.read_category(str(tmp_path), "hollow")
    with pytest.raises(DataError, match=r"category 'a:b' holds the character ':'"):
        mvtec.read_category(str(tmp_path), "a:b")
    name = os.fsencode(tmp_path / "hollow" / "train" / "good") + b"/\xff.png"
    Path(os.fsdecode(name)).touch()
    with pytest.raises(DataError, match=r"udcff.png': the name of this training image is not UTF-8; rename it"):
        mvtec.read_category(str(tmp_path), "hollow")


@pytest.mark.real_data
def test_read_category_reads_real_data(real_data: Path) -> None:
    bottle = mvtec.read_category(str(real_data), "bottle")
    assert (len(bottle.train), len(bottle.test)) == (209, 83)
    assert sum(bool(image.mask) for image in bottle.test) == 63
    commutator = mvtec.read_category(str(real_data), "commutator")
    assert (len(commutator.train), len(commutator.test)) == (278, 121)
    assert all(bool(image.mask) == (image.label != "good") for image in commutator.test)
