"""Read data sets in the MVTec AD layout from any filesystem.

<root>/<category>/train/good/*                            defect-free images, the only ones that fitting reads
<root>/<category>/test/<good or defect type>/*            test images; the folder's name is the label
<root>/<category>/ground_truth/<defect type>/<stem>_mask.png   optional masks
<root>/<category>/roi.png                             optional: white where all images are inspected, black elsewhere
<root>/<category>/roi/<train or test>/<label>/<stem>.png       optional: the same for one image

Images may also lie in deeper folders; then their masks do so too. Names that begin with a dot, and folders that begin
with @ or #, are ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from stpm import storage
from stpm.data.decoding import SUFFIXES
from stpm.data.rois import parse_roi
from stpm.errors import DataError, join_first
from stpm.method.roi import Roi
from stpm.names import is_utf8, other_form, safe_name

GOOD = "good"


@dataclass(frozen=True)
class TestImage:
    """A test image: its URI, label ("good" or a defect type), and the URIs of its mask and of its own region of
    interest, "" if there is none.

    `versions` are those of all files, from `storage.file_versions`.
    """

    __test__ = False

    uri: str
    label: str
    mask: str
    roi: str = ""
    versions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Category:
    """The images of one category, sorted by URI.

    Args:
        train: URI and version of each defect-free image.
        roi: the part of the images that is inspected; None: all of them.
        rois: of each training image with a region of interest of its own: the image's URI, the mask's, and its version.
    """

    name: str
    train: tuple[tuple[str, str], ...]
    test: tuple[TestImage, ...]
    roi: Roi | None = None
    rois: tuple[tuple[str, str, str], ...] = ()


def find_categories(root: str, wanted: Sequence[str] = ()) -> list[str]:
    """List a data set's categories, sorted; `wanted` selects some of them.

    Raises:
        DataError: if the data set is missing or empty, is one category, or does not have a wanted category.
    """
    names = storage.subfolders(root, links=True)
    if "train" in names and GOOD in storage.subfolders(storage.join(root, "train"), links=True):
        parent, name = storage.absolute(root).rstrip("/").rsplit("/", 1)
        raise DataError(f"{root}: this is one category; give its parent: --data {parent} --categories {name}")
    if not names:
        raise DataError(f"{root}: no category folders; expected <category>/train/good/ in the MVTec AD layout")
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        others = [form for name in unknown if (form := other_form(name, names))]
        near = [match for name in unknown for match in difflib.get_close_matches(name, names, n=1)]
        meant = f"did you mean {', '.join(near)}? " if near else ""
        known = "; ".join(others) or f"{meant}there are {', '.join(names)}"
        raise DataError(f"{root}: no category {', '.join(unknown)}; {known}")
    return sorted({*wanted}) if wanted else names


def read_category(root: str, name: str, roi: str = "") -> Category:
    """List the images of one category. A region of interest, see `parse_roi`, replaces that of the data set.

    Raises:
        DataError: if its name is not allowed in a path, there is no training image, or one whose name is not UTF-8, or
            the region cannot be read.
    """
    safe_name(name, "category")
    folder = storage.join(root, name)
    found, roi_file = _list_images(folder)
    if invalid := [uri for uri, _ in found.train if not is_utf8(uri)]:
        raise DataError(f"{invalid[0]!r}: the name of this training image is not UTF-8; rename it")
    if not found.train:
        raise DataError(
            f"{folder}: no images in train/good (with suffix {', '.join(SUFFIXES)}); links to folders are not followed "
            "inside a category"
        )
    region = parse_roi(roi or roi_file, found.train[0][0]) if roi or roi_file else None
    return dataclasses.replace(found, name=name, roi=region)


def exclude(categories: Sequence[Category], file: str) -> list[Category]:
    """Return the categories without the training images that a text file lists, one a line.

    A line is the URI of an image, or its end: a file name, or `bottle/train/good/007.png`.

    Raises:
        DataError: if there is no such file, or a line is the end of no image's URI, or of several.
    """
    try:
        lines = storage.read(storage.absolute(file)).decode("utf-8-sig").splitlines()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: no such text file in UTF-8; give one with the name of an image a line") from error
    uris = [uri for category in categories for uri, _ in category.train]
    excluded: set[str] = set()
    for name in filter(None, map(str.strip, lines)):
        found = [uri for uri in uris if f"/{uri}".endswith(f"/{name}")]
        if len(found) != 1:
            what = f"is {join_first(found)}" if found else "is no good image of the categories to fit"
            raise DataError(
                f"{file}: {name} {what}; give the URI of a good image, or as much of its end as only it has"
            )
        excluded.update(found)
    kept = [tuple(image for image in category.train if image[0] not in excluded) for category in categories]
    return [dataclasses.replace(category, train=train) for category, train in zip(categories, kept, strict=True)]


def read_tests(folder: str) -> tuple[TestImage, ...]:
    """List the images in a category's folder `test`, with the masks beside it. Raise DataError if there are none."""
    uri = storage.absolute(folder)
    category, _, name = uri.rpartition("/")
    tests = _list_images(category)[0].test if name == "test" else ()
    if not tests:
        raise DataError(f"{folder}: no test images; give the folder test of a category in the MVTec AD layout")
    return tests


def _list_images(folder: str) -> tuple[Category, str]:
    """List a category's images; return also the URI of its region of interest, "" for none."""
    train, tests, masks, rois, roi = [], [], {}, {}, ""
    depth = len(PurePosixPath(storage.filesystem(folder)[1]).parts)
    versions = dict(storage.file_versions(folder))
    for uri, version in versions.items():
        parts = PurePosixPath(storage.filesystem(uri)[1]).parts[depth:]
        if parts == ("roi.png",):
            roi = uri
        if len(parts) < 3 or not is_image(parts):
            continue
        stem = str(PurePosixPath(*parts[2:]).with_suffix(""))
        match parts:
            case ("train", "good", *_):
                train.append((uri, version, stem))
            case ("test", label, *_):
                tests.append((uri, label, stem))
            case ("ground_truth", label, *_):
                masks[label, stem.removesuffix("_mask")] = uri
            case ("roi", *path):
                rois[str(PurePosixPath(*path).with_suffix(""))] = uri
    test = []
    for uri, label, stem in tests:
        mask, own = masks.get((label, stem), ""), rois.get(f"test/{label}/{stem}", "")
        test.append(TestImage(uri, label, mask, own, tuple(versions[each] for each in (uri, mask, own) if each)))
    own_rois = ((uri, mask, versions[mask]) for uri, _, stem in train if (mask := rois.get(f"train/good/{stem}", "")))
    good = ((uri, version) for uri, version, _ in train)
    return Category("", tuple(good), tuple(test), rois=tuple(own_rois)), roi


def is_image(parts: Sequence[str]) -> bool:
    """Return whether a file under a folder, given by the parts of its path, is an image to read.

    Copies of editors, and thumbnails and removed files of storage systems are not.
    """
    hidden = parts[-1].startswith(".") or any(part.startswith((".", "@", "#")) for part in parts[:-1])
    return parts[-1].lower().endswith(SUFFIXES) and not hidden
