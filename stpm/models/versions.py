"""The versions of a category: its current model, those before it, and those that may come after it."""

from __future__ import annotations

from dataclasses import dataclass

from stpm.errors import ModelError


@dataclass(frozen=True)
class Version:
    """A model's id, and the digest of the images that it was fitted on."""

    model_id: str
    data_fingerprint: str


@dataclass(frozen=True)
class Versions:
    """The contents of current.json. Rolling back and forward moves along `previous`, `current` and `next`.

    Args:
        previous: the models that were current before it, the latest last.
        next: the models that were rolled back and not made current since, the nearest first.
    """

    current: Version
    previous: tuple[Version, ...] = ()
    next: tuple[Version, ...] = ()

    @property
    def every(self) -> tuple[Version, ...]:
        """Return all of them, the oldest first."""
        return (*self.previous, self.current, *self.next)

    def publish(self, version: Version) -> Versions:
        """Make a model current. A new one takes the place of those in `next`; the current one again keeps them."""
        if version.model_id == self.current.model_id:
            return Versions(version, self.previous, self.next)
        return Versions(version, (*self.previous, self.current))

    def describe_replaced(self, model_id: str = "") -> str:
        """Describe the models that rolling forward no longer reaches after a new one; "" if none.

        Args:
            model_id: of the new model; "": it is not known yet.
        """
        reached = {model_id, self.current.model_id, *(version.model_id for version in self.previous)}
        lost = [version.model_id for version in self.next if version.model_id not in reached]
        if not lost:
            return ""
        return (
            f"a new model replaces those that were rolled back ({', '.join(lost)}): --roll-forward no longer reaches "
            "them, and stpm models --keep removes them"
        )

    def roll_back(self) -> Versions:
        """Make the previous model current.

        Raises:
            ModelError: if there is none.
        """
        if not self.previous:
            raise ModelError(f"no model was current before {self.current.model_id}: there is none to roll back to")
        return Versions(self.previous[-1], self.previous[:-1], (self.current, *self.next))

    def roll_forward(self) -> Versions:
        """Make the next model current.

        Raises:
            ModelError: if there is none.
        """
        if not self.next:
            raise ModelError(
                f"no model was rolled back since {self.current.model_id} became current: there is none to roll forward "
                "to"
            )
        return Versions(self.next[0], (*self.previous, self.current), self.next[1:])

    def forget(self, keep: int) -> Versions:
        """Drop all previous models but the last `keep`, at least 1."""
        return Versions(self.current, self.previous[-keep:], self.next)

    def position(self, model_id: str) -> str:
        """Describe where a model stands; "" if it is none of the versions."""
        if model_id == self.current.model_id:
            return "current"
        for word, versions in (("before", self.previous[::-1]), ("after", self.next)):
            ids = [version.model_id for version in versions]
            if model_id in ids:
                return f"{ids.index(model_id) + 1} {word}"
        return ""
