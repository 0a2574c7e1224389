"""The versions of Python and of the libraries that affect models and scores, on the nodes of a run."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from stpm import __version__


@cache
def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that affect models and scores, by name."""
    versions = {"stpm": __version__, "python": platform.python_version()}
    for name in ("torch", "timm", "ray", "numpy", "pillow", "openvino"):
        # OpenVINO is an extra.
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


class NodeVersions(NamedTuple):
    """The address of a node, and the versions that one of its processes found there, by name."""

    node: str
    versions: Mapping[str, str]


class VersionCheck:
    """Find nodes with other versions than the run began with.

    Args:
        first: versions that the run began with, by name; None: those of the first node.
    """

    def __init__(self, first: Mapping[str, str] | None = None) -> None:
        self._known = [] if first is None else [first]

    def add(self, found: NodeVersions) -> str:
        """Describe how the versions on a node differ; "" if they do not, or if a node with the same was described."""
        if found.versions in self._known:
            return ""
        self._known.append(found.versions)
        first, other = self._known[0], found.versions
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if not names:
            return ""
        began, has = (", ".join(f"{name} {each.get(name, 'missing')}" for name in names) for each in (first, other))
        return (
            f"this run began with {began}, but node {found.node} has {has}: results may differ slightly. Install "
            "deploy/constraints.txt on all nodes"
        )
