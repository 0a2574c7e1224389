"""What fails on clusters, and what comes of it: each line a test, run now; they make the table of docs/faults.md.

    python bench/faults.py

Processes and nodes are killed for real, storage is a real server that fails. Needs the extra `test`, and twenty minutes
on two cores; `--report` takes what other runs reported instead (`pytest -o junit_family=xunit1 --junitxml=FILE`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from tabulate import tabulate

_ROOT = Path(__file__).resolve().parents[1]
_TABLE = _ROOT / "docs" / "faults.md"
_HEAD = """# Faults, and what comes of them

Each line is a test that makes the fault happen and compares the results with those of an undisturbed run. This table
was made by

```sh
python bench/faults.py
```

"""


class Fault(NamedTuple):
    """What happens, what comes of it, and the test that shows it."""

    what: str
    outcome: str
    test: str


FAULTS = (
    Fault(
        "Scoring: a scorer's process is killed",
        "The run ends well. Ray starts another, and its rows are scored again: each is there once, the score the same.",
        "tests/cluster/test_score_faults.py::test_a_killed_scorer_or_decoder_costs_time_alone[MapWorker",
    ),
    Fault(
        "Scoring: a decoding task's process is killed",
        "The run ends well, with the same rows.",
        "tests/cluster/test_score_faults.py::test_a_killed_scorer_or_decoder_costs_time_alone[MapBatches",
    ),
    Fault(
        "Scoring: driver and all its processes are killed, output on a local disk",
        "The next run scores what is left, and ends with the same rows.",
        "tests/cluster/test_score_faults.py::test_a_killed_driver_is_taken_up_by_the_next_run[local",
    ),
    Fault(
        "Scoring: driver and all its processes are killed, output in S3",
        "The same.",
        "tests/cluster/test_score_faults.py::test_a_killed_driver_is_taken_up_by_the_next_run[s3",
    ),
    Fault(
        "Fitting: a worker's process is killed",
        "The run ends well. The group starts again from its checkpoints; every student is the same, bit by bit.",
        "tests/cluster/test_faults.py::test_a_killed_worker_costs_time_and_not_one_bit",
    ),
    Fault(
        "Fitting: driver and all its processes are killed",
        "The next run goes on from the checkpoints; every student is the same, bit by bit.",
        "tests/cluster/test_faults.py::test_a_killed_driver_is_taken_up_by_the_next_run",
    ),
    Fault(
        "Fitting: a category kills its worker, again and again",
        "It is set aside after its second death alone, and named; the others are fitted. Exit code 2.",
        "tests/cluster/test_faults.py::test_a_category_that_kills_its_worker_twice_is_set_aside",
    ),
    Fault(
        "Fitting: spot nodes are taken away and others come in their place, again and again",
        "No category is set aside for it: a death counts only where the group's nodes live on.",
        "tests/cluster/test_nodes.py::test_nodes_that_are_replaced_as_they_are_lost_cost_no_category",
    ),
    Fault(
        "Fitting: a file of a model in the store is damaged or gone",
        "The next fit says so and fits that category again; a damaged teacher is written again.",
        "tests/fitting/test_run.py::test_a_damaged_model_is_said_and_fitted_again",
    ),
    Fault(
        "Fitting: a category has too few good images for the recipe",
        "It fails before anything is fitted, and says how many it takes; the others are fitted.",
        "tests/fitting/test_run.py::test_a_category_of_too_few_images_fails_before_anything_is_fitted",
    ),
    Fault(
        "Fitting: a GPU runs out of memory (simulated)",
        "That category fails with what to lower, and no batch is halved; its worker goes on with the others.",
        "tests/fitting/test_worker.py::test_a_gpu_that_is_too_small_is_said_and_no_batch_is_halved",
    ),
    Fault(
        "Fitting: a node comes, and then one with a running worker is gone without a word",
        "The run ends well. The new node gets work, the lost one's goes on elsewhere; students the same, bit by bit.",
        "tests/cluster/test_nodes.py::test_a_fit_takes_in_a_node_that_comes_and_loses_one_and_not_one_bit",
    ),
    Fault(
        "Scoring: a node comes, and then one with a running scorer is gone without a word",
        "The run ends well. The new node gets work, and the scorer of the lost one; the same rows, each once.",
        "tests/cluster/test_nodes.py::test_a_pass_takes_in_a_node_that_comes_and_loses_one_and_not_one_row",
    ),
    Fault(
        "A cluster with no node that can work, whose autoscaler starts them on demand",
        "The job asks for one, says so, and starts when it is there.",
        "tests/cluster/test_autoscaling.py::test_from_nothing_a_node_is_asked_for_and_works",
    ),
    Fault(
        "`ray job stop` in the middle of a pass",
        "The log says that it was stopped and what was done is kept; the next submission scores the rest.",
        "tests/cluster/test_submit.py",
    ),
    Fault(
        "Storage answers 500, 503, slowly, with a reset or half an answer to 5 % of all requests",
        "The run ends well, with every row and no error.",
        "tests/cluster/test_rough_storage.py::test_every_image_has_its_row",
    ),
    Fault(
        "Storage refuses every write for 30 s",
        "The run waits and ends well; or, where a client's patience ends first, says so in one line, and the next run "
        "does the rest.",
        "tests/cluster/test_rough_storage.py::test_storage_that_refuses_writes_for_half_a_minute_costs_time_alone",
    ),
    Fault(
        "The credentials for the images expire in the middle of a pass, or those for a few images were never good",
        "The pass stops and says why; or the few are left. No error is written as a row, exit code 2, and the next run "
        "scores what is left.",
        "tests/cluster/test_rough_storage.py::test_credentials_that_expire_stop_a_pass_and_spoil_no_row",
    ),
    Fault(
        "A model cannot be read for a while",
        "Its images are left to the next run, and scored by this one once it can be read again.",
        "tests/scoring/test_stages.py::test_a_model_that_storage_did_not_give_is_tried_again",
    ),
    Fault(
        "Names that no file can have, pipes, links in a circle, 100 GB named .png, PostScript named .png",
        "Each is a row with an error that says what; none is opened or read, and all others are scored.",
        "tests/scoring/test_stages.py::test_no_row_ends_a_pass_or_keeps_others_from_being_scored",
    ),
    Fault(
        "A Parquet file that holds images hangs",
        "Its images are left to the next run; those of all other files are scored.",
        "tests/scoring/test_stages.py::test_a_parquet_file_that_hangs_holds_up_no_other",
    ),
    Fault(
        "The object store is full",
        "Ray spills to disk; the same rows and the same anomaly maps.",
        "tests/cluster/test_object_store.py::test_a_full_object_store_costs_time_and_not_one_row",
    ),
    Fault(
        "A node's disk has no room for the decoded training images",
        "That category fails with what to do about it; its worker goes on with the others.",
        "tests/fitting/test_worker.py::test_a_disk_without_room_for_them_is_said",
    ),
    Fault(
        "Scoring: a GPU runs out of memory (simulated)",
        "The batch is halved until it fits; an image that is too much alone is left to the next run.",
        "tests/scoring/test_stages.py::test_a_batch_that_does_not_fit_is_halved_until_it_does",
    ),
    Fault(
        "A local path on a cluster of several machines",
        "Refused in one line before anything is written, unless --mounted names the folder.",
        "tests/cluster/test_nodes.py::test_a_path_of_one_machine_is_refused_and_nothing_is_written",
    ),
    Fault(
        "An image that cannot be fetched or decoded in time",
        "It is left to the next run, or a row with the error too_slow; all others are scored.",
        "tests/scoring/test_time_limit.py::test_what_hangs_is_late_and_all_others_are_done",
    ),
    Fault(
        "Scoring: the same line is started twice, a second apart; then the one that runs is killed and started again",
        "The second says who holds the run folder and ends with 1. After the kill the next takes over at once; the "
        "same rows, each once.",
        "tests/cluster/test_score_faults.py::test_one_run_at_a_time_writes_and_a_dead_ones_place_is_taken_at_once",
    ),
    Fault(
        "A run was cut off from storage, or stood still, for so long that another took its folder over",
        "It has stopped before, by itself, and writes nothing more. Exit code 2.",
        "tests/test_lease.py::test_a_process_that_lost_its_lease_writes_nothing_more",
    ),
    Fault(
        "Scoring: a category is fitted anew meanwhile",
        "The pass ends with the model that it began with.",
        "tests/scoring/test_stages.py::test_the_bound_model_scores_and_no_other",
    ),
    Fault(
        "Scoring: `--fresh` is killed while it removes what was there",
        "The next run takes up nothing of it: not its list of images, not its rows.",
        "tests/scoring/test_passes.py::test_clearing_that_is_cut_off_leaves_no_pass_to_go_on_with",
    ),
    Fault(
        "Fitting: an image was shot again, under the same name and of the same size",
        "Its category is fitted again.",
        "tests/fitting/test_worker.py::test_an_image_that_was_shot_again_is_another_though_its_name_and_size_are_the_same",
    ),
    Fault(
        "A power cut leaves an empty or half a list of images",
        "What is published is on the disk before its name is. A damaged list is said, and what to do.",
        "tests/scoring/test_manifest.py::test_a_damaged_manifest_is_said",
    ),
    Fault(
        "Kubernetes: the pod that creates a night's job is tried again",
        "The night has one job: its name is the date.",
        "tests/test_deploy.py::test_a_night_that_is_tried_again_has_one_job",
    ),
    Fault(
        "A file, or a member of a tar, whose name is not UTF-8",
        "The file is a row with the error bad_name, and the member is scored; both names are written with %XX.",
        "tests/scoring/test_sources.py::test_a_name_that_is_not_utf8_is_a_row_that_says_so",
    ),
    Fault(
        "Results that are to go under a file",
        "Refused in one line before anything is written.",
        "tests/test_storage.py::test_where_results_cannot_go_is_said_before_the_work",
    ),
    Fault(
        "A bucket that is not there",
        "The job says so in one line, and ends with 1.",
        "tests/cluster/test_clouds.py::test_a_collection_is_scored_from_a_cloud_to_the_same",
    ),
)


def run(tests: list[str], report: Path) -> None:
    """Run these tests, and write a report of JUnit's kind."""
    files = sorted({test.split("::")[0] for test in tests})
    command = [sys.executable, "-m", "pytest", "-q", "-m", "faults or not faults", *files, f"--junitxml={report}"]
    subprocess.run([*command, "-o", "junit_family=xunit1"], cwd=_ROOT, check=False)


def outcomes(report: Path) -> dict[str, bool]:
    """Whether each test passed, by its id."""
    cases = ElementTree.parse(report).iter("testcase")  # noqa: S314  we made it
    return {f"{case.get('file')}::{case.get('name')}": len(case) == 0 for case in cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, nargs="+", default=[], help="reports of other runs of all these tests")
    reports = parser.parse_args().report
    with tempfile.TemporaryDirectory() as folder:
        if not reports:
            reports = [Path(folder) / "report.xml"]
            run([fault.test for fault in FAULTS], reports[0])
        ran = {test: passed for report in reports for test, passed in outcomes(report).items()}
    rows = []
    for fault in FAULTS:
        found = [outcome for test, outcome in ran.items() if test.startswith(fault.test)]
        outcome = "not run" if not found else "passed" if all(found) else "**failed**"
        name = fault.test.split("[")[0].rsplit("::", 1)
        rows.append([fault.what, fault.outcome, f"`{name[0]}`", outcome])
    text = tabulate(rows, ["fault", "what comes of it", "shown by", "last run"], tablefmt="github")
    # Cells are not padded: a change in one would be a change in all.
    _TABLE.write_text(_HEAD + "\n".join(" ".join(line.split()) for line in text.splitlines()) + "\n")
    print(_TABLE.read_text())
    sys.exit(any(row[-1] != "passed" for row in rows))


if __name__ == "__main__":
    main()
