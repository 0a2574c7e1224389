"""The benchmark job: fit all, score each test split through the same pipeline, evaluate, report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

from stpm import demo, mvtec, storage
from stpm.benchmark_options import BenchmarkOptions
from stpm.cluster import connected
from stpm.console import ALL_DONE, NOTHING_DONE, Say
from stpm.errors import CutOffError, DataError
from stpm.evaluation.evaluate_job import evaluate_categories, publish_report
from stpm.evaluation.gate import Gate, read_gate
from stpm.evaluation.options import EvaluationOptions, GateOptions
from stpm.evaluation.report import CategoryResult, Failure, Report
from stpm.fitting.options import PoolOptions
from stpm.fitting.run import fit_categories, plan_of, read_categories, warn_of_few_normals
from stpm.lease import held
from stpm.models import ModelStore
from stpm.mvtec import Category
from stpm.options import ClusterOptions
from stpm.placement import on_cluster, say_plan
from stpm.recipe import Recipe
from stpm.scoring.ledger import Identity
from stpm.scoring.manifest import of_test_images
from stpm.scoring.options import ScoreOptions
from stpm.scoring.passes import Pass, run_pass
from stpm.scoring.pipeline import planned
from stpm.scoring.target import Target


def run_benchmark(
    options: BenchmarkOptions,
    recipe: Recipe,
    pool: PoolOptions,
    scoring: ScoreOptions,
    evaluation: EvaluationOptions,
    gate: GateOptions,
    cluster: ClusterOptions,
    say: Say,
) -> int:
    """The benchmark job. Returns its exit code: 0 all done, 2 something failed or fell short, 3 nothing could be done.

    Raises:
        StpmError: if it cannot be run at all.
    """
    requirements = read_gate(gate)
    out = storage.output_folder(options.out)
    data = storage.absolute(options.data) if options.data else storage.join(out, "demo-data")
    with on_cluster(cluster, [data, out], say):
        if cluster.plan:
            names = mvtec.find_categories(data, options.categories) if options.data else list(demo.TEXTURES)
            tasks = len(names) * len(options.seeds)
            say_plan({"fits": plan_of(pool, tasks), "then scores": partial(planned, scoring)}, say)
            return ALL_DONE
        with held(out, options.wait, say):
            if not options.data:
                demo.make(data)
            return _run(options, data, out, recipe, pool, scoring, evaluation, requirements, say)


def _run(
    options: BenchmarkOptions,
    data: str,
    out: str,
    recipe: Recipe,
    pool: PoolOptions,
    scoring: ScoreOptions,
    evaluation: EvaluationOptions,
    requirements: Gate,
    say: Say,
) -> int:
    try:
        categories, unreadable = read_categories(data, options.categories, say)
    except DataError as error:
        say(f"error: {error}")
        return NOTHING_DONE
    failures = [Failure(name, reason) for name, reason in unreadable.items()]
    results: list[CategoryResult] = []
    if categories:
        with connected():
            stores = {seed: storage.join(out, "models", f"seed-{seed}") for seed in options.seeds}
            warn_of_few_normals(categories, recipe, scoring.false_alarm_rate, say)
            outcomes = fit_categories(categories, recipe, stores, pool, options.wait, say)
            failures += [Failure(o.key, o.reason) for o in outcomes if o.status == "failed"]
            for seed, store in stores.items():
                records = [o.record for o in outcomes if o.seed == seed and o.record]
                if records:
                    say(f"seed {seed}: scoring the test images of {len(records)} categories")
                    fitted = [c for c in categories if c.name in {record.category for record in records}]
                    target = Target.among(out, f"seed-{seed}")
                    _score(data, fitted, ModelStore(store), scoring, target, say)
                    results += evaluate_categories(target, records, ModelStore(store), evaluation)
    code = publish_report(Report(data, results, failures, evaluation.masks_at), out, requirements, say)
    say(f"models, scores and heatmaps are in {out}")
    return code


def _score(
    data: str, categories: Sequence[Category], store: ModelStore, options: ScoreOptions, target: Target, say: Say
) -> None:
    """Score the test images, those of an earlier run left as they are where nothing differs.

    Raises:
        CutOffError: if some are left: figures of a part would not be those of the test split.
    """
    if not any(category.test for category in categories):
        target.clear()
        return
    digest = hashlib.sha256(repr([category.test for category in categories]).encode()).hexdigest()
    identity = Identity((data,), options.false_alarm_rate, target.heatmaps, target.raw_maps, manifest=digest)
    of = Pass(lambda: of_test_images(categories), identity, store, options, target)
    counts = run_pass(of, start_over=False, replace=True, say=say)
    if counts.left:
        raise CutOffError(f"{counts.left} test images are not scored; run the same command again to go on")
