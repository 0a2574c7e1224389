"""The outcome of an image in a stage: its result, or the ImageError that it failed with."""

from __future__ import annotations

from collections.abc import Sequence

from stpm.data.images import SUSPECT_ERRORS
from stpm.errors import ImageError
from stpm.scoring.progress import Tried


def error_columns(outcomes: Sequence[object]) -> dict[str, list[str]]:
    """Return the columns `error_kind` and `error_message`, "" for images without an error."""
    errors = [outcome if isinstance(outcome, ImageError) else None for outcome in outcomes]
    return {
        "error_kind": [error.kind if error else "" for error in errors],
        "error_message": [str(error) if error else "" for error in errors],
    }


def summarise(stage: str, outcomes: Sequence[object]) -> Tried:
    """Count the images that a stage tried, and those whose errors may have an external cause."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, ImageError) and outcome.kind in SUSPECT_ERRORS]
    return Tried(stage, len(outcomes), len(errors), f"{errors[-1].kind}: {errors[-1]}" if errors else "")
