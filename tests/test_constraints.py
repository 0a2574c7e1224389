"""What cluster.yaml and deploy/Dockerfile install: every version is pinned, and Ray can start nodes with it."""

import json
import os
import re
import shlex
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEPLOY = REPOSITORY / "deploy"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# The files that install, with the folder of the constraints there.
FILES = {"cluster.yaml": "/home/ubuntu/stpm/deploy/", "deploy/Dockerfile": "/home/ray/stpm/"}
# What Ray's autoscaler imports where it starts nodes: on the head, and in the container that KubeRay adds to its pod.
START_NODES = {
    "cluster.yaml": f"""
import pathlib, ray.autoscaler.v2.monitor, ray.autoscaler._private.aws.config, yaml
from ray.autoscaler._private import providers, util
config = util.prepare_config(yaml.safe_load(pathlib.Path({str(REPOSITORY / "cluster.yaml")!r}).read_text()))
util.validate_config(config)
print(providers._get_node_provider_cls(config["provider"]).__name__)
""",
    "deploy/Dockerfile": """
import ray.autoscaler.v2.monitor, ray.autoscaler._private.kuberay.run_autoscaler
from ray.autoscaler.v2.instance_manager.cloud_providers.kuberay.cloud_provider import KubeRayProvider
print(KubeRayProvider.__name__)
""",
}
PROVIDERS = {"cluster.yaml": "AWSNodeProvider\n", "deploy/Dockerfile": "KubeRayProvider\n"}


def arguments(file: str) -> list[str]:
    """Return the arguments of `pip install` in a file, with the paths of this checkout."""
    (line,) = re.findall(r"pip install (?:--no-cache-dir )?(.+)", (REPOSITORY / file).read_text())
    line = line.replace(f"{FILES[file]}constraints.txt", str(DEPLOY / "constraints.txt"))
    return shlex.split(re.sub(r"/home/\w+/stpm(?=\[)", str(REPOSITORY), line))


def requirements(file: str) -> list[Requirement]:
    """Return what the package and its extras require that a file installs."""
    (package,) = (word for word in arguments(file) if "[" in word)
    extras = package.partition("[")[2].rstrip("]").split(",")
    optional = (line for extra in extras for line in PROJECT["optional-dependencies"][extra])
    return [Requirement(line) for line in [*PROJECT["dependencies"], *optional]]


def pins(python: str = "") -> dict[str, Requirement]:
    """Read the constraints that hold for a version of Python on Linux, by name."""
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    where = {"python_version": python, "python_full_version": f"{python}.1"} if python else {}
    every = [Requirement(line) for line in lines if not line.startswith("#")]
    held = [each for each in every if not each.marker or each.marker.evaluate({"sys_platform": "linux", **where})]
    found = {canonicalize_name(each.name): each for each in held}
    assert len(found) == len(held)
    return found


def pinned(pin: Requirement) -> Version:
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    return Version(specifier.version)


def with_dependencies(roots: Iterable[Requirement]) -> Iterator[tuple[Requirement, Distribution, Distribution | None]]:
    """Yield requirements and those of what they bring here: each with its distribution, and that which requires it."""
    waiting: list[tuple[Requirement, Distribution | None]] = [(each, None) for each in roots]
    seen: set[str] = set()
    while waiting:
        requirement, parent = waiting.pop()
        if (line := f"{requirement} of {parent and parent.name}") in seen:
            continue
        seen.add(line)
        found = distribution(requirement.name)
        yield requirement, found, parent
        extras = {"", *requirement.extras}
        for each in map(Requirement, found.requires or ()):
            if not each.marker or any(each.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append((each, found))


@pytest.mark.parametrize("file", FILES)
def test_nodes_install_with_the_constraints(file: str) -> None:
    assert arguments(file)[1:] == ["-c", str(DEPLOY / "constraints.txt")]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_each_dependency_is_pinned_in_its_range(python: str) -> None:
    found = pins(python)
    for requirement in requirements("cluster.yaml") + requirements("deploy/Dockerfile"):
        assert pinned(found[canonicalize_name(requirement.name)]) in requirement.specifier, requirement


def test_the_dependencies_of_pinned_packages_are_pinned_in_their_ranges() -> None:
    """As far as they are installed here in the pinned version: PyPI may have newer ones, with other dependencies."""
    found = pins()
    for requirement, _, parent in with_dependencies(requirements("cluster.yaml")):
        if parent and parent.version in found[canonicalize_name(parent.name)].specifier:
            assert pinned(found[canonicalize_name(requirement.name)]) in requirement.specifier, parent.name


def test_the_wheels_for_cpus_have_the_versions_of_those_for_gpus() -> None:
    comment, include, *lines = (DEPLOY / "constraints-cpu.txt").read_text().splitlines()
    assert comment.startswith("#")
    assert include == "-c constraints.txt"
    assert lines == [f"{name}=={pinned(pins()[name])}+cpu" for name in ("torch", "torchvision")]


def test_every_node_has_one_version_of_ray() -> None:
    base = re.search(r"^FROM rayproject/ray:(\S+?)-", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    cluster = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    assert base
    assert base[1] == cluster["rayVersion"] == str(pinned(pins()["ray"]))


@pytest.mark.parametrize("file", FILES)
def test_ray_can_start_nodes_with_what_is_installed(file: str, tmp_path: Path) -> None:
    """Hide the other packages of this environment, of which the tests need more than a node."""
    for _, found, _ in with_dependencies(requirements(file)):
        for name in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
            if not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(found.locate_file(name))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ran = subprocess.run(
        [sys.executable, "-S", "-c", START_NODES[file]],
        env=environment | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout == PROVIDERS[file], ran.stderr


@pytest.mark.faults
@pytest.mark.parametrize("file", FILES)
def test_ray_can_start_nodes_in_a_clean_environment(file: str, tmp_path: Path) -> None:
    """Install what a node installs, from package indexes; PyTorch comes for CPUs where pip is set up so."""
    venv.create(tmp_path, with_pip=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    python = str(tmp_path / "bin" / "python")
    run(python, "-m", "pip", "install", *arguments(file))
    assert run(python, "-c", START_NODES[file]) == PROVIDERS[file]
    installed = map(Requirement, run(python, "-m", "pip", "freeze", "--exclude", "stpm").split())
    found = pins()
    assert all(pinned(each) in found[canonicalize_name(each.name)].specifier for each in installed)


@pytest.mark.faults
def test_pip_finds_the_wheels_for_gpus_and_installs_nothing_else(tmp_path: Path) -> None:
    """Without this machine's settings of pip, which may offer PyTorch for CPUs. Only metadata is downloaded."""
    report = tmp_path / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    subprocess.run(
        [*command, "--report", str(report), *arguments("cluster.yaml")],
        env=environment | {"PIP_CONFIG_FILE": os.devnull},
        check=True,
    )
    found = pins()
    chosen_metadata = [each["metadata"] for each in json.loads(report.read_text())["install"]]
    chosen = {canonicalize_name(each["name"]): each["version"] for each in chosen_metadata}
    assert "+" not in chosen["torch"]
    assert any(name.startswith("nvidia-") for name in chosen)
    assert chosen.pop("stpm")
    assert chosen == {name: str(pinned(found[name])) for name in chosen}
