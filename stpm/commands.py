"""The commands of `stpm`: for each its option dataclasses, and the function that it runs.

The files in `jobs/` run the same commands, for `ray job submit`, which sends the package and does not install it.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

from stpm import __doc__ as description
from stpm import __version__
from stpm.cli import Job, run_job
from stpm.evaluation.options import BenchmarkOptions, CompareOptions, EvaluateOptions, ReportOptions
from stpm.exit_codes import ALL_DONE, COULD_NOT_RUN
from stpm.fitting.options import FitOptions, WorkerOptions
from stpm.line.options import MonitoringOptions, NightlyOptions
from stpm.method.recipe import Recipe
from stpm.models.options import ModelsOptions
from stpm.names import hide_urls
from stpm.options import ClusterOptions, Size
from stpm.scoring.options import CollectionOptions, OutputOptions, ScoreOptions

# What other options say is what a job works on, and where.
_HEADINGS: dict[type, str] = {
    Recipe: "model",
    WorkerOptions: "workers",
    ScoreOptions: "scoring",
    OutputOptions: "output",
    MonitoringOptions: "monitoring",
    ReportOptions: "report",
    ClusterOptions: "cluster",
}


def _groups(*kinds: type) -> dict[str, type]:
    return {_HEADINGS.get(kind, "what and where"): kind for kind in kinds}


_JOBS = (
    Job(
        name="fit",
        description="Fit one model per category of a data set in the MVTec AD layout, with Ray Train.",
        groups=_groups(FitOptions, Recipe, WorkerOptions, ClusterOptions),
        check=("data", "stpm.data.mvtec:find_categories"),
        run="stpm.jobs.fit:run_fit",
        example="stpm fit --data s3://plant/reference --models s3://plant/models",
    ),
    Job(
        name="score",
        description="Score a collection of images with fitted models, with Ray Data.",
        groups=_groups(CollectionOptions, OutputOptions, ScoreOptions, ClusterOptions),
        run="stpm.jobs.score:run_score",
        example="stpm score --models s3://plant/models --images s3://plant/today --category bottle --out scored",
    ),
    Job(
        name="evaluate",
        description="Report on a run that is scored already: a benchmark, or a score job with labelled images.",
        groups=_groups(EvaluateOptions, ReportOptions, ClusterOptions),
        hidden=("backend", "first_node", "plan"),
        check=("run", "stpm.scoring.output:RunOutput.find_all"),
        run="stpm.jobs.evaluate:run_evaluate",
        example="stpm evaluate --run runs/benchmark --out runs/at-full-size --masks-at original",
    ),
    Job(
        name="compare",
        description="Show what two models find, and where they differ, from two scored runs of the same images.",
        groups=_groups(CompareOptions),
        run="stpm.jobs.compare:run_compare",
        example="stpm compare --run scored/current --run scored/new --page compare.html",
    ),
    Job(
        name="benchmark",
        description="Fit one model per category, score every test image, and report metrics, on a demo without --data.",
        groups=_groups(BenchmarkOptions, Recipe, WorkerOptions, ScoreOptions, ReportOptions, ClusterOptions),
        hidden=("seed",),
        check=("data", "stpm.data.mvtec:find_categories"),
        # The demo set has crops of 128 x 128 pixels, whose names begin with their lot.
        without_data={"teacher": "demo", "size": Size("128"), "group_from": "{group}_{name}"},
        run="stpm.jobs.benchmark:run_benchmark",
        example="stpm benchmark --data /data/mvtec_ad --out runs/mvtec --preset paper --seeds 0,1,2",
    ),
    Job(
        name="nightly",
        description="Score a night's images and late files, judge each category, and write a page about the nights.",
        groups=_groups(NightlyOptions, MonitoringOptions, OutputOptions, ScoreOptions, ClusterOptions),
        hidden=("export",),
        run="stpm.jobs.nightly:run_nightly",
        example=(
            "stpm nightly --models s3://plant/models --images 's3://plant/dump/{date}' "
            "--category-from '{category}/{name}' --out s3://plant/nights"
        ),
    ),
    Job(
        name="models",
        description="List models, and what thresholds promise; decide a threshold, roll back, and remove old models.",
        groups=_groups(ModelsOptions),
        run="stpm.jobs.models:run_models",
        example="stpm models --models s3://plant/models --categories bottle --roll-back",
    ),
)
COMMANDS = {job.name: job for job in _JOBS}


def main(*command: str) -> int:
    """Run a command, whose words come before those of the process's command line, as this process.

    Return the exit code of a command line that names no command.
    """
    name, *argv = [*command, *sys.argv[1:]] or [""]
    if name in COMMANDS:
        try:
            run_job(COMMANDS[name], argv)
        except SystemExit as end:
            _end_process(int(end.code or 0))
    if name == "--complete" and "COMP_LINE" in os.environ:
        return _complete(*argv)
    if name == "--version":
        print(f"stpm {__version__}")
        return ALL_DONE
    if name in ("", "-h", "--help"):
        lines = "".join(f"  {job.name:11}{job.description}\n" for job in _JOBS)
        print(f"usage: stpm COMMAND [options]\n\n{description}\n\n{lines}\n`stpm COMMAND --help` explains its options.")
        return ALL_DONE if name else COULD_NOT_RUN
    print(f"error: there is no command {hide_urls(name)}; there are {', '.join(COMMANDS)}", file=sys.stderr)
    return COULD_NOT_RUN


def _end_process(code: int) -> NoReturn:
    """End the process, after what its libraries do then, and leave the interpreter as it is.

    To take it down takes a second once Ray and torch are imported, and aborts the process if a thread of pyarrow still
    holds bytes (apache/arrow#34314): a finished job would seem to have failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            # Whoever read it is gone, as `head` is after ten lines.
            continue
        except OSError as error:
            print(f"error: {stream.name}: {error.strerror}", file=sys.stderr)
            code = code or COULD_NOT_RUN
    os._exit(code)


def _complete(program: str, word: str, previous: str) -> int:
    """Print what a word may become, as bash asks a program of `complete -C`: a command, or an option of the command."""
    known = list(COMMANDS)
    if previous != program:
        name = os.environ["COMP_LINE"].split()[1]
        known = COMMANDS[name].flags() if name in COMMANDS else []
    sys.stdout.writelines(f"{each}\n" for each in known if each.startswith(word))
    return ALL_DONE
