"""Report on a run that is scored already: a benchmark, or a score job with labelled images."""

from stpm.cli import Job, run_job
from stpm.evaluation.options import EvaluateOptions, ReportOptions
from stpm.options import ClusterOptions

JOB = Job(
    prog="evaluate.py",
    description=__doc__,
    groups={"what and where": EvaluateOptions, "report": ReportOptions, "cluster": ClusterOptions},
    hidden=("backend", "first_node", "plan"),
    run="stpm.jobs.evaluate:run_evaluate",
    example="python jobs/evaluate.py --run runs/benchmark --out runs/at-full-size --masks-at original",
)

if __name__ == "__main__":
    run_job(JOB)
