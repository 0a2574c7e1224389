"""Find defects in product images: in Python by `fit` and `load`, and at any scale by the jobs, on Ray.

>>> import dataclasses
>>> import numpy as np
>>> import stpm
>>> good = np.random.default_rng(0).integers(90, 130, (12, 64, 64, 3), dtype=np.uint8)
>>> recipe = dataclasses.replace(stpm.PRESETS["default"], teacher="demo", student="none", size=64, memory=100)
>>> detector = stpm.fit(good, recipe, progress=False)
>>> scratched = good[0].copy()
>>> scratched[30:33, 10:50] = 255
>>> found = detector.score(scratched)
>>> found.is_anomalous, found.anomaly_map.shape
(True, (64, 64))
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stpm.detector import Detector, load
    from stpm.errors import ImageError, StpmError
    from stpm.fitting.fit import fit
    from stpm.method.recipe import PRESETS, Recipe
    from stpm.result import Result

__all__ = ["PRESETS", "Detector", "ImageError", "Recipe", "Result", "StpmError", "fit", "load"]

# Where each name comes from. It is imported when it is first used: jobs import this package without torch.
_MODULES = {
    "Detector": "detector",
    "load": "detector",
    "ImageError": "errors",
    "StpmError": "errors",
    "fit": "fitting.fit",
    "PRESETS": "method.recipe",
    "Recipe": "method.recipe",
    "Result": "result",
}

try:
    __version__ = version("stpm")
except PackageNotFoundError:  # a working directory shipped to a cluster without being installed
    __version__ = "0+uninstalled"


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
