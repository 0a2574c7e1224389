"""Fit one student per category, score every test image, report AUROC per category and in the mean."""

from stpm.benchmark import BenchmarkOptions, demo_defaults, run_benchmark
from stpm.cli import Job, run_job
from stpm.evaluation.options import EvaluationOptions, GateOptions
from stpm.fitting.pool import PoolOptions
from stpm.placement import ClusterOptions
from stpm.recipe import Recipe
from stpm.scoring.pipeline import ScoreOptions

JOB = Job(
    prog="benchmark.py",
    description=__doc__,
    kinds=(BenchmarkOptions, Recipe, PoolOptions, ScoreOptions, EvaluationOptions, GateOptions, ClusterOptions),
    run=run_benchmark,
    hidden=("seed",),
    defaults=demo_defaults,
)

if __name__ == "__main__":
    run_job(JOB)
