"""Fit one model per category of a data set in the MVTec AD layout, with Ray Train."""

from stpm.cli import Job, run_job
from stpm.fitting.options import FitOptions, WorkerOptions
from stpm.method.recipe import Recipe
from stpm.options import ClusterOptions

JOB = Job(
    prog="fit.py",
    description=__doc__,
    groups={"what and where": FitOptions, "model": Recipe, "workers": WorkerOptions, "cluster": ClusterOptions},
    run="stpm.jobs.fit:run_fit",
    example="python jobs/fit.py --data s3://plant/reference --models s3://plant/models",
)

if __name__ == "__main__":
    run_job(JOB)
