"""The benchmark job: fit all, score each test split through the same pipeline, evaluate, report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from stpm import demo, storage
from stpm.cluster import connected
from stpm.console import NOTHING_DONE, Say, exit_code
from stpm.errors import ConfigError, DataError
from stpm.evaluation.category import evaluate
from stpm.evaluation.gallery import gallery
from stpm.evaluation.report import Failure, Report, Result
from stpm.fitting.pool import PoolOptions
from stpm.fitting.run import fit_categories, read_categories, warn_of_few_normals
from stpm.models import ModelStore
from stpm.mvtec import Category
from stpm.options import Integers, Names, option
from stpm.recipe import Recipe
from stpm.record import ModelRecord
from stpm.scoring.ledger import Identity
from stpm.scoring.manifest import of_test_images
from stpm.scoring.passes import Pass, run_pass
from stpm.scoring.pipeline import ScoreOptions
from stpm.scoring.target import Target


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is benchmarked, and where the run folder is.

    Raises:
        ConfigError: if no seed is given, or one twice.
    """

    data: str = option(
        "",
        "data set in the MVTec AD layout: a folder or a URI; none: the demo set, made on the spot, with its own "
        "defaults for teacher, size, batch and epochs",
    )
    out: str = option("runs/benchmark", "run folder for models/, scores/, heatmaps/ and the report: a folder or a URI")
    categories: Names = option(Names(), "categories to take, separated by commas; none: all that the data set has")
    seeds: Integers = option(Integers((0,)), "seeds to fit and score each category with, separated by commas")

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds is {','.join(map(str, self.seeds))!r}; give each seed once, such as 0,1,2")
        if not self.out:
            raise ConfigError("out is empty; give a folder or a URI")


def demo_defaults(values: Any) -> dict[str, Any]:
    """The recipe's defaults that go with the demo set, where no other data is named."""
    return {} if values.data else demo.DEFAULTS


def run_benchmark(options: BenchmarkOptions, recipe: Recipe, pool: PoolOptions, scoring: ScoreOptions, say: Say) -> int:
    """The benchmark job. Returns its exit code: 0 all done, 2 something failed, 3 nothing could be done.

    Raises:
        StpmError: if it cannot be run at all.
    """
    out = storage.absolute(options.out)
    data = storage.absolute(options.data) if options.data else storage.join(out, "demo-data")
    if not options.data:
        demo.make(data)
    try:
        categories, unreadable = read_categories(data, options.categories, say)
    except DataError as error:
        say(f"error: {error}")
        return NOTHING_DONE
    failures = [Failure(name, reason) for name, reason in unreadable.items()]
    results: list[Result] = []
    if categories:
        with connected():
            stores = {seed: storage.join(out, "models", f"seed-{seed}") for seed in options.seeds}
            outcomes = fit_categories(categories, recipe, stores, pool, say)
            failures += [Failure(o.key, o.reason) for o in outcomes if o.status == "failed"]
            warn_of_few_normals(outcomes, scoring.false_alarm_rate, say)
            for seed, store in stores.items():
                records = [o.record for o in outcomes if o.seed == seed and o.record]
                if records:
                    say(f"seed {seed}: scoring the test images of {len(records)} categories")
                    results += _score_and_evaluate(data, categories, records, store, scoring, out, seed, say)
    failures += [Failure(r.model.category, problem) for r in results for problem in r.figures.problems]
    report = Report(data, recipe, results, failures)
    report.write(out)
    say(f"\n{report.as_text()}\n\nreport, models, scores and heatmaps are in {out}")
    return exit_code(len(results), len(failures))


def _score_and_evaluate(
    data: str,
    categories: Sequence[Category],
    records: Sequence[ModelRecord],
    store: str,
    scoring: ScoreOptions,
    out: str,
    seed: int,
    say: Say,
) -> list[Result]:
    fitted = {record.category for record in records}
    chosen = [category for category in categories if category.name in fitted]
    target = Target.among(out, f"seed-{seed}")
    digest = hashlib.sha256(repr([category.test for category in chosen]).encode()).hexdigest()
    identity = Identity((data,), scoring.false_alarm_rate, target.heatmaps, target.raw_maps, manifest=digest)
    of = Pass(lambda: of_test_images(chosen), identity, ModelStore(store), scoring, target)
    if any(category.test for category in chosen):
        run_pass(of, start_over=False, replace=True, say=say)
    else:
        target.clear()
    remote = ray.remote(_evaluate)
    figures = ray.get([remote.remote(target, record) for record in records])
    return [Result(record, found) for record, found in zip(records, figures, strict=True)]


def _evaluate(target: Target, record: ModelRecord) -> Any:
    """In a Ray task, next to the maps: one category's figures, and its gallery written."""
    figures = evaluate(target, record.category, record.recipe.view)
    picture = gallery(target, record.category, record.recipe.view)
    if picture:
        storage.publish(storage.join(target.out, "gallery", target.name, f"{record.category}.png"), picture)
    return figures
