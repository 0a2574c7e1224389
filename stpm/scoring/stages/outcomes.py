"""The outcome of an image in a stage: its result, or the ImageError that it failed with."""

from __future__ import annotations

from collections.abc import Sequence

from stpm.errors import EXTERNAL_ERRORS, ImageError


def error_columns(outcomes: Sequence[object]) -> dict[str, list[str]]:
    """Return the columns `error_kind` and `error_message`, "" for images without an error."""
    errors = [outcome if isinstance(outcome, ImageError) else None for outcome in outcomes]
    return {
        "error_kind": [error.kind if error else "" for error in errors],
        "error_message": [str(error) if error else "" for error in errors],
    }


def timeout_error(step: str, seconds: float) -> ImageError:
    """Return the error of an image whose step, `fetch` or `decode`, took longer than its limit."""
    return ImageError(f"{step}_timeout", f"took more than {seconds:g} s; see --image-seconds")


def external_errors(outcomes: Sequence[object]) -> list[str]:
    """Describe the errors that may have a cause outside the image."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, ImageError) and outcome.kind in EXTERNAL_ERRORS]
    return [f"{error.kind}: {error}" for error in errors]
