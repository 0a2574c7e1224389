"""The nightly job: score a night and late files of the nights before it, judge them, and write one page."""

from __future__ import annotations

import datetime
import json
import logging
import os
from dataclasses import replace
from functools import partial

from stpm import storage
from stpm.cluster.placement import log_plan, on_cluster
from stpm.errors import WebhookError
from stpm.exit_codes import ALL_DONE, NOTHING_DONE, SOME_FAILED
from stpm.lease import hold_lease
from stpm.line.night_folder import NightFolder
from stpm.line.night_record import update_records
from stpm.line.options import MonitoringOptions, NightlyOptions
from stpm.line.page import PAGE_FILE, page, top_images
from stpm.line.score_nights import NightlyJob, score_nights
from stpm.line.webhook import message, post
from stpm.options import ClusterOptions
from stpm.scoring.options import OutputOptions, ScoreOptions
from stpm.scoring.run_statistics import too_many_errors
from stpm.scoring.scorer_pool import describe_plan
from stpm.times import timestamp

# nightly.json has the JSON schema stpm/line/nightly.schema.json.
_JSON, _FORMAT = "nightly.json", 2
_SECRET = "STPM_WEBHOOK_SECRET"  # noqa: S105  the name of the variable that holds it

log = logging.getLogger(__name__)


def run_nightly(
    options: NightlyOptions,
    monitoring: MonitoringOptions,
    output: OutputOptions,
    scoring: ScoreOptions,
    cluster: ClusterOptions,
) -> int:
    """Run the nightly job.

    Returns:
        The exit code: 0 all done, 2 something failed and the rest is done, 3 no image of the night has a score, or its
        record or files cannot be read. Verdicts do not change it.

    Raises:
        ConfigError: if the options are invalid, or the folder is in use.
    """
    date = options.night(datetime.datetime.now(datetime.timezone.utc))
    job = NightlyJob(replace(options, date=str(date)), monitoring, output, scoring, cluster)
    with on_cluster(cluster, [options.models, job.out, *options.allow, *job.sources(date)]):
        if cluster.plan:
            log_plan({"scores": partial(describe_plan, scoring)})
            return ALL_DONE
        with hold_lease(job.out, options.wait) as fence:
            return _run(replace(job, fence=fence), date)


def _run(job: NightlyJob, date: datetime.date) -> int:
    # The night itself first: late files of earlier nights can wait.
    dates = [date - datetime.timedelta(days=days) for days in range(job.options.look_back + 1)]
    problems = score_nights(job, dates)
    nights = update_records(job, sorted(dates), problems)
    night = nights[date]
    log.info(night.headline())
    failed = any(nights[day].problem or nights[day].unfinished for day in dates if day in nights)
    if reason := too_many_errors(night.total.error_count, night.total.images, job.options.max_error_rate):
        log.error(reason)
        failed = True
    for day in sorted(nights):
        if day < min(dates) and nights[day].unfinished:
            log.warning(
                f"{nights[day].unfinished} images of {day} have no row, and --look-back does not reach it; "
                f"run the same command with --date {day}"
            )
    created, shown = timestamp(), [nights[day] for day in sorted(nights)][-job.monitoring.nights :]
    values = {"format": _FORMAT, "created": created, "out": job.out, "nights": [each.values(job.out) for each in shown]}
    storage.publish(storage.join(job.out, _JSON), json.dumps(values, indent=1, ensure_ascii=False).encode())
    top = top_images(NightFolder.of(job.out, shown[-1].day), job.store, job.options.top)
    uri = storage.join(job.out, PAGE_FILE)
    storage.publish(uri, page(shown, job.out, created, top).encode())
    log.info(f"the page is {uri}, and {_JSON} beside it has the same for machines")
    if job.monitoring.webhook:
        key = os.environ.get(_SECRET, "")
        if not key:
            log.warning(f"the webhook's message is not signed: {_SECRET} is not set")
        try:
            post(job.monitoring.webhook, message(night, job.out, created), key)
        except WebhookError as error:
            log.error(f"{error}; start the job again to post it again")
            failed = True
    if not night.total.scored:
        return NOTHING_DONE
    return SOME_FAILED if failed else ALL_DONE
