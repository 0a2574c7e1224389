"""Score a collection of images with fitted models, with Ray Data."""

from stpm.cli import Job, run_job
from stpm.options import ClusterOptions
from stpm.scoring.options import CollectionOptions, OutputOptions, ScoreOptions

JOB = Job(
    prog="score.py",
    description=__doc__,
    groups={
        "what and where": CollectionOptions,
        "output": OutputOptions,
        "scoring": ScoreOptions,
        "cluster": ClusterOptions,
    },
    run="stpm.jobs.score:run_score",
    example="python jobs/score.py --models s3://plant/models --images s3://plant/today --category bottle --out scored",
)

if __name__ == "__main__":
    run_job(JOB)
