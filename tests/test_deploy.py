"""The files for Kubernetes, checked without a cluster."""

import datetime
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from stpm.cluster.placement import first_bundle
from stpm.commands import COMMANDS
from tests.conftest import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
RAYJOB = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
CLUSTER = RAYJOB["spec"]["rayClusterSpec"]


GROUPS = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
CRON, *ACCESS = yaml.safe_load_all((DEPLOY / "nightly.yaml").read_text())
NIGHTLY_POD = CRON["spec"]["jobTemplate"]["spec"]["template"]["spec"]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (found,) = group["template"]["spec"]["containers"]
    return found  # type: ignore[no-any-return]


def test_the_rayjob_has_the_fields_of_kuberay() -> None:
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    assert RAYJOB["metadata"] == {"name": "stpm-nightly-YYYY-MM-DD"}, "of two jobs of one night, one would wait"
    assert set(RAYJOB["spec"]) <= {
        *("entrypoint", "backoffLimit", "activeDeadlineSeconds", "shutdownAfterJobFinishes"),
        *("ttlSecondsAfterFinished", "rayClusterSpec"),
    }
    assert RAYJOB["spec"]["shutdownAfterJobFinishes"], "GPUs of a job that ended cost money"
    assert CLUSTER["enableInTreeAutoscaling"]
    assert CLUSTER["authOptions"] == {"mode": "token"}
    for group in CLUSTER["workerGroupSpecs"]:
        assert 0 == group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_rayjobs_entrypoint_parses() -> None:
    *shell, python, script = shlex.split(RAYJOB["spec"]["entrypoint"])[:6]
    options = shlex.split(RAYJOB["spec"]["entrypoint"])[6:]
    assert (shell[0], python, script) == ("sh", "python", "/home/ray/stpm/jobs/nightly.py")
    parsed = COMMANDS["nightly"].parse([word.replace("YYYY-MM-DD", "2026-11-24") for word in options])[0]
    assert parsed.category_from == "{category}/{name}"
    date = parsed.night(datetime.datetime.now(datetime.timezone.utc))
    assert parsed.sources(date) == ("s3://plant/dump/2026-11-24",)


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 1), (2, 0), (3, 0), (143, 143)])
def test_a_night_that_is_partly_done_is_not_repeated(code: int, expected: int) -> None:
    """The entrypoint passes two shells, as KubeRay and Ray use it, with a job that ends with a code."""
    wrapper = RAYJOB["spec"]["entrypoint"].partition(" python ")[0]
    inner = f"{wrapper} sh -c 'test \"$1\" = \"a b\" && exit {code}' job 'a b'"
    words = subprocess.run(
        ["/bin/bash", "-ec", f"printf '%s\\0' {inner} ;"], capture_output=True, text=True, check=True
    ).stdout
    ran = subprocess.run(["/bin/bash", "-c", shlex.join(words.split("\0")[:-1])], check=False)
    assert ran.returncode == expected


def test_the_head_runs_no_tasks_and_the_groups_fit_the_first_node() -> None:
    assert CLUSTER["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for group, kind in zip(CLUSTER["workerGroupSpecs"], ("gpu", "cpu"), strict=True):
        assert group["groupName"] == kind
        requests, limits = container(group)["resources"]["requests"], container(group)["resources"]["limits"]
        assert requests == limits, "Ray uses all CPUs that it sees, and must not be throttled"
        amounts = {"CPU": float(requests["cpu"]), "GPU": float(requests.get("nvidia.com/gpu", 0))}
        assert all(amounts[name] >= amount for name, amount in first_bundle(kind).items())  # type: ignore[arg-type]


def test_every_pod_has_the_same_image_none_may_become_root_and_only_the_drivers_has_the_webhook() -> None:
    head, *workers = map(container, GROUPS)
    assert [variable["name"] for variable in head["env"]] == ["STPM_WEBHOOK", "STPM_WEBHOOK_SECRET"]
    assert all(variable["valueFrom"]["secretKeyRef"]["optional"] for variable in head["env"])
    assert not any("env" in worker for worker in workers)
    assert len({container(group)["image"] for group in GROUPS}) == 1
    assert len({group["template"]["spec"]["serviceAccountName"] for group in GROUPS}) == 1
    pods = [NIGHTLY_POD, *(group["template"]["spec"] for group in GROUPS)]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    containers = [container for pod in pods for container in pod["containers"]]
    for each in (CLUSTER["autoscalerOptions"], *containers):
        assert not each["securityContext"]["allowPrivilegeEscalation"]
        assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_image_holds_the_package_alone() -> None:
    copies = re.findall(r"^COPY (?:--\S+ )*(.+) /home/ray/stpm\S*$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    sources = [source for line in copies for source in line.split()]
    assert sorted(sources) == ["LICENSE", "README.md", "deploy/constraints.txt", "jobs", "pyproject.toml", "stpm"]
    assert all((REPOSITORY / source).exists() for source in sources)
    project = (REPOSITORY / "pyproject.toml").read_text()
    assert 'readme = "README.md"' in project
    assert 'license-files = ["LICENSE"]' in project


def test_the_nightly_cron_job_may_create_one_rayjob_and_nothing_else() -> None:
    account, role, binding = ACCESS
    assert (CRON["apiVersion"], CRON["kind"]) == ("batch/v1", "CronJob")
    assert CRON["spec"]["schedule"] == "10 2 * * *"
    assert CRON["spec"]["concurrencyPolicy"] == "Forbid"
    assert NIGHTLY_POD["restartPolicy"] == "Never"
    assert NIGHTLY_POD["serviceAccountName"] == account["metadata"]["name"] == binding["subjects"][0]["name"]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert "YYYY-MM-DD" in NIGHTLY_POD["containers"][0]["command"][-1]
    assert RAYJOB["spec"]["entrypoint"].count("YYYY-MM-DD") == 1
    assert CRON["spec"]["jobTemplate"]["spec"]["backoffLimit"] == RAYJOB["spec"]["backoffLimit"] == 3
    (made,) = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())["configMapGenerator"]
    assert (made["name"], made["files"]) == (NIGHTLY_POD["volumes"][0]["configMap"]["name"], ["rayjob.yaml"])


KUBECTL = """#!/bin/sh
cat >"$FOLDER/given"
name=$(sed -n 's/^  name: //p' "$FOLDER/given")
case $ANSWERS in
  refusing) echo 'Error from server (Forbidden): rayjobs.ray.io is forbidden' >&2; exit 1;;
  dying) touch "$FOLDER/$name"; exit 137;;
esac
if [ -e "$FOLDER/$name" ]; then
  echo "Error from server (AlreadyExists): rayjobs.ray.io \\"$name\\" already exists" >&2; exit 1
fi
touch "$FOLDER/$name"
"""


def test_a_retried_night_creates_one_job(tmp_path: Path) -> None:
    """The command runs with a fake kubectl that remembers what it created."""
    command = [word.replace("/etc/stpm", str(DEPLOY)) for word in NIGHTLY_POD["containers"][0]["command"]]
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    answers = ["refusing", "dying", "well", "well"]
    variables = [{"PATH": f"{tmp_path}:{os.environ['PATH']}", "FOLDER": str(tmp_path), "ANSWERS": a} for a in answers]
    ran = [subprocess.run(command, env=each, capture_output=True, text=True, check=False) for each in variables]
    assert [each.returncode for each in ran] == [1, 137, 0, 0]
    assert "is forbidden" in ran[0].stdout
    (created,) = [path.name for path in tmp_path.iterdir() if path.name not in ("kubectl", "given")]
    assert re.fullmatch(r"stpm-nightly-\d{4}-\d\d-\d\d", created)
    given = yaml.safe_load((tmp_path / "given").read_text())
    assert f"--date {created.removeprefix('stpm-nightly-')} " in given["spec"]["entrypoint"]
