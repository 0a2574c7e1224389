"""The MVTec AD layout over any filesystem.

<root>/<category>/train/good/*                        defect-free images, the only ones that fitting sees
<root>/<category>/test/<good or defect>/*             test images; the folder's name is the label
<root>/<category>/ground_truth/<defect>/<stem>_mask.png   optional masks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from stpm import storage
from stpm.data.images import SUFFIXES
from stpm.errors import DataError

GOOD = "good"


@dataclass(frozen=True)
class TestImage:
    """One test image. `label` is "good" or a defect type; `mask` is a URI, or "" if there is none.

    `versions` are those of the image and its mask, as `stpm.storage.versions` gives them.
    """

    __test__ = False

    uri: str
    label: str
    mask: str
    versions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Category:
    """The images of one category, sorted by URI; `train` holds defect-free images with their versions."""

    name: str
    train: tuple[tuple[str, str], ...]
    test: tuple[TestImage, ...]


def find_categories(root: str, wanted: Sequence[str] = ()) -> list[str]:
    """Names of the categories under a data set, sorted; `wanted` chooses among them.

    Raises:
        DataError: if the data set is missing or empty, or a wanted category is not there.
    """
    names = storage.children(root)
    if not names:
        raise DataError(f"{root}: no category folders; expected <category>/train/good/ in the MVTec AD layout")
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise DataError(f"{root}: no category {', '.join(unknown)}; there are {', '.join(names)}")
    return sorted(wanted) if wanted else names


def read_category(root: str, name: str) -> Category:
    """List one category.

    Raises:
        DataError: if its name may not become a path, the name of a training image is not UTF-8,
            or there is none.
    """
    storage.safe_name(name, "category")
    folder = storage.join(root, name)
    versions = {uri: version for uri, version in storage.versions(folder) if uri.lower().endswith(SUFFIXES)}
    train, test, masks = [], [], {}
    depth = len(PurePosixPath(storage.filesystem(folder)[1]).parts)
    for uri, version in versions.items():
        match PurePosixPath(storage.filesystem(uri)[1]).parts[depth:]:
            case ("train", "good", _):
                train.append((uri, version))
            case ("test", label, _):
                test.append((uri, label))
            case ("ground_truth", label, file):
                masks[label, PurePosixPath(file).stem.removesuffix("_mask")] = uri
    if odd := [uri for uri, _ in train if not storage.is_utf8(uri)]:
        raise DataError(f"{odd[0]!r}: the name of this training image is not UTF-8; rename it")
    if not train:
        raise DataError(f"{folder}: no images in train/good (of {', '.join(SUFFIXES)})")

    def test_image(uri: str, label: str) -> TestImage:
        mask = masks.get((label, PurePosixPath(uri).stem), "")
        return TestImage(uri, label, mask, tuple(versions[each] for each in (uri, mask) if each))

    return Category(name, tuple(train), tuple(test_image(uri, label) for uri, label in test))
