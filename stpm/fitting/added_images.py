"""Images that a person marked as good, as training images."""

from __future__ import annotations

from collections.abc import Sequence

from stpm import storage
from stpm.data.mvtec import Category
from stpm.models.record import AddedImage
from stpm.models.store import ModelStore


def with_added_images(
    category: Category, store: ModelStore, added: Sequence[AddedImage]
) -> tuple[tuple[str, str], ...]:
    """Return URI and version of a category's training images, and of the added ones that are no copies of them.

    If an image were there twice, one copy could be trained on and the other held out.
    """
    uris = {store.added_uri(category.name, image.digest): image.digest for image in added}
    if not uris:
        return category.train
    sizes = {size for uri, size in storage.file_sizes(store.added_folder(category.name)) if uri in uris}
    present = set()
    for uri, version in category.train:
        # A version begins with the size.
        if int(version.split(" ", 1)[0]) in sizes:
            try:
                present.add(storage.digest(storage.read(uri)))
            except OSError:
                # The fit reports the images that cannot be read.
                continue
    return (*category.train, *((uri, digest) for uri, digest in uris.items() if digest not in present))
