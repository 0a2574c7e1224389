"""Make the report of a run that is scored already: labelled images of the score job, or a benchmark's."""

from stpm.cli import Job, run_job
from stpm.evaluation.evaluate_job import run_evaluate
from stpm.evaluation.options import EvaluateOptions, EvaluationOptions, GateOptions

JOB = Job("evaluate.py", __doc__, (EvaluateOptions, EvaluationOptions, GateOptions), run_evaluate)

if __name__ == "__main__":
    run_job(JOB)
