"""Score a night's images and the files that came late, judge each category, and write a page about the last nights."""

from stpm.cli import Job, run_job
from stpm.monitoring.options import MonitoringOptions, NightlyOptions
from stpm.options import ClusterOptions
from stpm.scoring.options import OutputOptions, ScoreOptions

JOB = Job(
    prog="nightly.py",
    description=__doc__,
    groups={
        "what and where": NightlyOptions,
        "monitoring": MonitoringOptions,
        "output": OutputOptions,
        "scoring": ScoreOptions,
        "cluster": ClusterOptions,
    },
    run="stpm.jobs.nightly:run_nightly",
    example=(
        "python jobs/nightly.py --models s3://plant/models --images 's3://plant/dump/{date}' "
        "--category-from '{category}/{name}' --out s3://plant/nights"
    ),
)

if __name__ == "__main__":
    run_job(JOB)
