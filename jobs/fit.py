"""Fit one model per category of a data set in the MVTec AD layout, with Ray Train."""

from stpm.cli import Job, run_job
from stpm.fitting.pool import PoolOptions
from stpm.fitting.run import FitOptions, run_fit
from stpm.placement import ClusterOptions
from stpm.recipe import Recipe

JOB = Job("fit.py", __doc__, (FitOptions, Recipe, PoolOptions, ClusterOptions), run_fit)

if __name__ == "__main__":
    run_job(JOB)
