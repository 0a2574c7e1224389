"""The models job: list the models of a store, roll back and forward, and remove old models."""

from __future__ import annotations

import logging
from contextlib import nullcontext

from stpm import storage
from stpm.console import log_lines
from stpm.errors import DataError, ModelError
from stpm.exit_codes import exit_code
from stpm.lease import hold_lease
from stpm.models.options import ModelsOptions
from stpm.models.store import ModelStore
from stpm.models.table import models_table

log = logging.getLogger(__name__)


def run_models(options: ModelsOptions) -> int:
    """Run the models job; return its exit code: 0 all done, 2 some categories failed, 3 all of them.

    Raises:
        ConfigError: if another run holds the store.
        DataError: if there is no store.
    """
    store = ModelStore(options.models)
    changes = options.roll_back or options.roll_forward or options.keep > 0
    if not storage.exists(store.uri):
        raise DataError(f"{store.uri}: no such folder; give the --models of the fit job")
    categories = list(dict.fromkeys(options.categories)) if options.names_categories else store.categories()
    if not categories:
        raise DataError(f"{store.uri}: no category has a model there; fit one with stpm fit")
    failed = set()
    with hold_lease(storage.output_folder(options.models), options.wait) if changes else nullcontext():
        for category in categories:
            try:
                _change(store, category, options)
            except (DataError, ModelError) as error:
                failed.add(category)
                log.error(f"{category}: failed: {error}", extra={"category": category})
    done = [category for category in categories if category not in failed]
    if done:
        log_lines(models_table(store, done, options.false_alarm_rate))
    return exit_code(len(done), len(failed))


def _change(store: ModelStore, category: str, options: ModelsOptions) -> None:
    """Make the changes that the options ask for in one category. Raises ModelError if one is not possible."""
    before = versions = store.versions(category)
    if options.roll_back:
        versions = versions.roll_back()
    if options.roll_forward:
        versions = versions.roll_forward()
    if versions != before:
        store.verify(store.record(category, versions.current.model_id))
        store.set_versions(category, versions)
        log.info(
            f"{category}: the current model is {versions.current.model_id}, it was {before.current.model_id}",
            extra={"category": category},
        )
    if options.keep:
        versions = versions.forget(options.keep)
        store.set_versions(category, versions)
        for model_id in store.model_folders(category):
            if not versions.position(model_id):
                store.remove(category, model_id)
                log.info(f"{category}: removed {model_id}", extra={"category": category})
