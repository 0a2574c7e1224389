"""Add images that a person marked as good to models: calibrate the models again, or fit them again.

Each new model is staged first, and becomes current once its change is in the log.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from stpm.errors import DataError, ModelError, join_first
from stpm.feedback.alarms import Alarms, describe_change
from stpm.feedback.marks import Marks
from stpm.feedback.new_images import NewImages, score_and_store
from stpm.feedback.recalibrate import recalibrate
from stpm.feedback.refit import Refit
from stpm.fitting.options import FitOptions
from stpm.lease import hold_lease
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.models.versions import Version
from stpm.options import ClusterOptions

# Maximum number of added images that the log names.
_NAMED = 3

log = logging.getLogger(__name__)


def add_good(
    store: ModelStore, marks: Marks, options: FitOptions, cluster: ClusterOptions, refit: Refit | None = None
) -> tuple[int, int]:
    """Add marked images to the models of their categories.

    Args:
        store: the store of the models.
        marks: the images, and how a person marked them.
        options: the false-alarm rate of the alarms that are compared, whether to stage, and whether to wait.
        cluster: what computes, and how to use a cluster.
        refit: fits models on the images too; None: calibrate the current models on them.

    Returns:
        The number of images marked as good that the models now have, and the number of the others.

    Raises:
        ConfigError: if another run holds the store.
        DataError: if the data set to fit on is missing or empty.
    """
    found: dict[str, NewImages] = {}
    failures: dict[str, str] = {}
    with hold_lease(store.uri, options.wait):
        for category, uris in marks.good.items():
            try:
                found[category] = score_and_store(store, category, uris, cluster.backend)
                if refit is None:
                    _add_to_calibration(store, found[category], options)
            except (DataError, ModelError) as error:
                failures[category] = str(error)
    if refit is not None and found:
        failures |= _add_to_training(store, found, options, cluster, refit)
    refused = dict(marks.refused)
    for new in found.values():
        refused |= new.refused
    for category, reason in failures.items():
        # Images that were added before stay in the model.
        uris = found[category].uris if category in found else marks.good[category]
        refused |= dict.fromkeys(uris, reason)
    if marks.other:
        counts = ", ".join(f"{number} with label {label!r}" for label, number in sorted(marks.other.items()))
        log.info(f"left out, since only images with label 'good' are added: {counts}")
    if refused:
        reasons = join_first([f"{uri}: {reason}" for uri, reason in refused.items()])
        log.error(f"left out, since they cannot be used: {len(refused)}: {reasons}")
    done = sum(new.known + (0 if category in failures else len(new.uris)) for category, new in found.items())
    return done, len(refused)


def _add_to_calibration(store: ModelStore, new: NewImages, options: FitOptions) -> None:
    if not new.images:
        _log(new.record.category, "none of the images is new to its model")
        return
    record = recalibrate(store, new)
    _log_change(store, new, record, new.scores, options, "calibrated again")
    fingerprint = store.current(record.category).data_fingerprint
    _make_current(store, new, Version(record.model_id, fingerprint), options)


def _add_to_training(
    store: ModelStore, found: dict[str, NewImages], options: FitOptions, cluster: ClusterOptions, refit: Refit
) -> dict[str, str]:
    """Fit models on new images; return the reason of each category that could not be fitted."""
    results = refit.fit(store, {category: new.images for category, new in found.items()}, cluster, options.wait)
    failures = dict.fromkeys(found.keys() - results.keys(), "its category has no images in --data")
    with hold_lease(store.uri, options.wait):
        for category, result in results.items():
            if result.record is None:
                failures[category] = f"its category was not fitted: {result.reason}"
            elif result.record.model_id == store.current(category).model_id:
                _log(category, "none of the images is new to its model")
            else:
                new, record = found[category], result.record
                try:
                    scores = refit.scores(store, new, record.model_id, cluster.backend)
                    what = f"fitted again on {record.fit.train_count} images, others held out"
                    _log_change(store, new, record, scores, options, what)
                except (DataError, ModelError, OSError) as error:
                    failures[category] = f"{record.model_id} stays staged, since it cannot score: {error}"
                    continue
                _make_current(store, new, Version(record.model_id, result.task.data_fingerprint), options)
    return failures


def _log_change(
    store: ModelStore,
    new: NewImages,
    record: ModelRecord,
    scores: npt.NDArray[np.float32],
    options: FitOptions,
    what: str,
) -> None:
    """Compare the current model with a new one, which gives new images these scores."""
    before = Alarms.count(store.calibration_scores(new.record), new.scores, options.false_alarm_rate)
    after = Alarms.count(store.calibration_scores(record), scores, options.false_alarm_rate)
    _log(record.category, f"{what}: {describe_change(before, after, len(scores))}")
    # A defect that is marked as good by mistake hides all others like it.
    highest = sorted(zip(new.scores.tolist(), new.images, strict=True), key=lambda pair: -pair[0])[:_NAMED]
    if over := [f"{image.uri} ({score:.4g})" for score, image in highest if score > before.threshold]:
        _log(record.category, f"look again at the added images that scored highest: {join_first(over)}")


def _make_current(store: ModelStore, new: NewImages, version: Version, options: FitOptions) -> None:
    """Make a staged model current, unless the options say to stage it, or another model has become current."""
    category = new.record.category
    versions = store.versions(category)
    current = versions.current.model_id
    if options.stage or current != new.record.model_id:
        store.set_versions(category, versions.stage(version))
        command = store.roll_command(category, "--roll-forward")
        if current == new.record.model_id:
            _log(category, f"{version.model_id} is staged, and {current} stays current. To make it current: {command}")
        else:
            became = f"{current} became current during the fit"
            _log(category, f"{version.model_id} is staged: {became}. To make {version.model_id} current: {command}")
    else:
        if replaced := versions.describe_replaced(version.model_id):
            _log(category, replaced)
        store.set_versions(category, versions.publish(version))
        command = store.roll_command(category, "--roll-back")
        _log(category, f"{version.model_id} is now current instead of {current}. To undo this: {command}")


def _log(category: str, message: str) -> None:
    log.info(f"{category}: {message}", extra={"category": category})
