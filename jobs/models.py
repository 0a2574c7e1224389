"""List the models of a store with their versions, roll back to an earlier one, and remove old ones."""

from stpm.cli import Job, run_job
from stpm.models.options import ModelsOptions

JOB = Job(
    prog="models.py",
    description=__doc__,
    groups={"what and where": ModelsOptions},
    run="stpm.jobs.models:run_models",
    example="python jobs/models.py --models s3://plant/models --categories bottle --roll-back",
)

if __name__ == "__main__":
    run_job(JOB)
