"""Score a collection of images with fitted models, with Ray Data."""

from stpm.cli import Job, run_job
from stpm.placement import ClusterOptions
from stpm.scoring.pipeline import ScoreOptions
from stpm.scoring.run import CollectionOptions, run_score

JOB = Job("score.py", __doc__, (CollectionOptions, ScoreOptions, ClusterOptions), run_score)

if __name__ == "__main__":
    run_job(JOB)
