"""Fit one model per category, score every test image, and report metrics per category and on average."""

from stpm.cli import Job, run_job
from stpm.evaluation.options import ReportOptions
from stpm.fitting.options import WorkerOptions
from stpm.jobs.benchmark_options import BenchmarkOptions, demo_defaults
from stpm.method.recipe import Recipe
from stpm.options import ClusterOptions
from stpm.scoring.options import ScoreOptions

JOB = Job(
    prog="benchmark.py",
    description=__doc__,
    groups={
        "what and where": BenchmarkOptions,
        "model": Recipe,
        "workers": WorkerOptions,
        "scoring": ScoreOptions,
        "report": ReportOptions,
        "cluster": ClusterOptions,
    },
    run="stpm.jobs.benchmark:run_benchmark",
    example="python jobs/benchmark.py --data /data/mvtec_ad --out runs/mvtec --preset paper --seeds 0,1,2",
    hidden=("seed",),
    defaults=demo_defaults,
)

if __name__ == "__main__":
    run_job(JOB)
