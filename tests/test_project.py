"""The files around the code agree with each other: pinned versions, CI, the changelog."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import entropy_rl_ext
from documentation import PAGES

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()


def pinned(lines: list[str]) -> dict[str, str]:
    requirements = [Requirement(line) for line in lines if "==" in line]
    return {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in requirements}


def extra(name: str) -> list[str]:
    block = re.search(rf"^{name} = \[(.*?)\]$", PROJECT, flags=re.MULTILINE | re.DOTALL)
    assert block, name
    return re.findall(r'"([^"]+)"', block[1])


def test_linters_have_one_version_each() -> None:
    """`make lint`, the constraints and pre-commit: a formatter of another version formats otherwise."""
    lint = pinned(extra("lint"))
    constraints = pinned((ROOT / "constraints.txt").read_text().splitlines())
    assert lint.items() <= constraints.items()
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"].split("-check")[0]: repo["rev"] for repo in repositories for hook in repo["hooks"]}
    assert hooks["ruff"] == hooks["ruff-format"] == f"v{lint['ruff']}"
    assert hooks["clang-format"] == f"v{lint['clang-format']}"


def test_workflow_runs_what_ci_runs() -> None:
    run = re.findall(r"^make (\S+)$", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE)
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    targets = [*jobs["cpu"]["strategy"]["matrix"]["target"]]
    commands = [step.get("run", "") for step in jobs["cuda"]["steps"]]
    targets += [command.removeprefix("make ") for command in commands if command.startswith("make ")]
    assert sorted(targets) == sorted(run)


@pytest.mark.parametrize(("job", "target"), [("build", "release"), ("build-cuda", "release-cuda")])
def test_release_workflow_builds_what_make_release_builds(job: str, target: str) -> None:
    steps = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"][job]["steps"]
    made = re.findall(r"\bmake ([a-z-]+) PYTHON", "\n".join(step.get("run", "") for step in steps))
    assert made == [target]


@pytest.mark.parametrize(
    ("version", "title", "passes"),
    [
        ("1.2.0", "## [1.2.0] - 2026-05-01", True),
        ("1.3.0", "## [1.2.0] - 2026-05-01", False),
        ("1.2.0", "## [1.2.0] - Unreleased", False),
        ("1.2.0", "## [1.1.0] - 2026-05-01", False),
    ],
)
def test_release_workflow_checks_the_tag(version: str, title: str, passes: bool, tmp_path: Path) -> None:
    steps = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]["build"]["steps"]
    [script] = [step["run"] for step in steps if step.get("name", "").startswith("The tag is the version")]
    (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{title}\n")
    environment = os.environ | {"GITHUB_REF_NAME": "v1.2.0"}
    run = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True)
    assert (run.returncode == 0) == passes


def test_version_is_that_of_the_changelog() -> None:
    version = re.search(r'^version = "(.+)"$', PROJECT, flags=re.MULTILINE)
    newest = re.search(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert version and newest
    assert entropy_rl_ext.__version__ == version[1] == newest[1]


@pytest.mark.parametrize("package", ["verl", "trl"])
def test_versions_of_other_trainers_are_those_of_the_extras(package: str) -> None:
    """pyproject.toml has the range. What the tests install and what the pages name lies in it."""
    [requirement] = map(Requirement, extra(package))
    folders = (ROOT / "tests/integrations" / package, ROOT / "benchmarks")
    for path in (folder / "requirements.txt" for folder in folders):
        assert requirement.specifier.contains(pinned(path.read_text().splitlines())[package]), path
    for page in PAGES:
        for version in re.findall(
            rf"(?<!copy of )\b{package}(?: |==)(\d+\.\d+(?:\.\d+)?)", page.read_text(), flags=re.IGNORECASE
        ):
            assert requirement.specifier.contains(version), f"{page.name} names {package} {version}"


def test_every_target_of_make_is_described() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert phony
    header = makefile[: makefile.index("\nSHELL")]
    missing = [name for name in phony[1].split() if not re.search(rf"make {name}\b", header)]
    assert set(missing) <= {"help", "gtest", "pytest", "clean"}


@pytest.mark.parametrize(
    ("arguments", "needed"), [("", True), ("--op policy_loss", False), ("--op policy_loss llm_step", True)]
)
def test_bench_fetches_the_model_only_for_the_op_that_needs_it(arguments: str, needed: bool) -> None:
    """Under `make pytest` this make is a make's make, whose flags it would take over."""
    command = ["make", "-n", "bench", "SMOLLM2=build/no-such-model", f"ARGS={arguments}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert ("tools/smollm2.py" in run.stdout) == needed
