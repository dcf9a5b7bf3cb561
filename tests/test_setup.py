"""A build that cannot succeed ends with one line that names what is missing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
WITHOUT_TORCH = """
import importlib.metadata, runpy, sys
version = importlib.metadata.version
def fake(name):
    if name in ("torch", "pybind11"):
        raise importlib.metadata.PackageNotFoundError(name)
    return "65.5.0" if name == "setuptools" else version(name)
importlib.metadata.version = fake
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py")
"""
WITHOUT_TOOLKIT = """
import os, runpy, sys
import torch
torch.version.cuda = "13.0"
isfile = os.path.isfile
os.path.isfile = lambda path: not str(path).endswith("/bin/nvcc") and isfile(path)
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py")
"""


def last_line(command: list[str], **environment: str) -> str:
    result = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def test_missing_requirements() -> None:
    line = last_line([sys.executable, "-c", WITHOUT_TORCH])
    wanted = "pip install 'setuptools>=77' 'torch>=2.11' 'pybind11>=2.13'"
    assert line == f"entropy_rl_ext: {sys.prefix} lacks what the build needs; run {wanted}"


def test_stable_abi_build_needs_no_pybind11() -> None:
    line = last_line([sys.executable, "-c", WITHOUT_TORCH], ENTROPY_RL_ABI3="1")
    assert line.endswith("run pip install 'setuptools>=77' 'torch>=2.11'")


def test_missing_ninja(tmp_path: Path) -> None:
    """Debian's ninja-build would do, too: it is no Python package, but it is on the PATH."""
    program = WITHOUT_TORCH.replace('("torch", "pybind11")', '("ninja",)').replace('"65.5.0"', '"80"')
    line = last_line([sys.executable, "-c", program], PATH=str(tmp_path))
    assert line == f"entropy_rl_ext: {sys.prefix} lacks what the build needs; run pip install ninja"
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    environment = os.environ | {"PATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, check=True)


def test_missing_toolkit() -> None:
    """torch's CUDA build without nvcc: the build goes on for the CPU and says why."""
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TOOLKIT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    expected = "building CPU only: no CUDA toolkit (nvcc and cuda_runtime.h) was found; set CUDA_HOME to one"
    assert result.stderr.splitlines()[-1] == f"entropy_rl_ext: {expected}"


def test_missing_compiler() -> None:
    assert "no C++ compiler: 'no-such-compiler' does not run; install g++" in last_line(BUILD, CXX="no-such-compiler")


def test_old_compiler(tmp_path: Path) -> None:
    compiler = tmp_path / "g++-4"
    compiler.write_text("#!/bin/sh\necho 'unrecognized option -std=c++17' >&2\nexit 1\n")
    compiler.chmod(0o755)
    line = last_line(BUILD, CXX=str(compiler))
    assert f"'{compiler}' does not compile C++17 (unrecognized option -std=c++17); install a newer g++" in line


def test_the_page_quotes_the_messages() -> None:
    """The left column of the table in docs/install.md; an ellipsis stands for what differs."""
    table = (ROOT / "docs/install.md").read_text().partition("| the build says |")[2].partition("\n\n")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)
    source = (ROOT / "setup.py").read_text()
    reasons = re.findall(r'return (?:False|True), None, f?"(.+)"', source)
    messages = [*re.findall(r'f"entropy_rl_ext: (.+)"\)', source), *(f"building CPU only: {why}" for why in reasons)]
    assert len(quoted) == 5
    for line in quoted:
        pattern = ".+".join(re.escape(part) for part in line.split("…"))
        assert any(re.search(pattern, message) for message in messages), line


DESCRIPTIONS = """
import json, os, runpy, sys
import setuptools
setuptools.setup = lambda **given: None
environments = json.loads(sys.argv.pop())
sys.argv = ["setup.py", "--version"]
description = runpy.run_path("setup.py")["description"]
found = []
for environment in environments:
    for name in [name for name in os.environ if name.startswith(("GITHUB_", "ENTROPY_RL_"))]:
        del os.environ[name]
    os.environ.update(environment)
    found.append(description())
print(json.dumps(found))
"""


def test_links_of_an_index_page_lead_to_the_repository() -> None:
    """In a workflow of GitHub's, and with an address of one's own; without one the README stays as it is."""
    text = (ROOT / "README.md").read_text()
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    in_workflow = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "me/it"}
    environments = [{}, in_workflow, {"ENTROPY_RL_REPOSITORY": "https://example.org/it"}]
    command = [sys.executable, "-c", DESCRIPTIONS, json.dumps(environments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    unchanged, *others = json.loads(result.stdout.splitlines()[-1])
    assert unchanged == [text, {}]
    for (readme, urls), address in zip(others, ("https://github.com/me/it", "https://example.org/it"), strict=True):
        assert urls["Homepage"] == address and urls["Changelog"] == f"{address}/blob/v{version}/CHANGELOG.md"
        links = re.findall(r"\]\(([^)]+)\)", readme)
        assert links and all(link.startswith(("https://", "#")) for link in links)
        assert f"]({address}/blob/v{version}/docs/install.md)" in readme
        assert f"]({address}/raw/v{version}/docs/images/inspect.png)" in readme
