"""Every fenced block of the pages runs, as a reader would run it: page by page and from top to bottom, in a directory
that holds what the page asks for (path/to/model, train.parquet, ...), at a size that a test can afford.

Blocks that need verl or TRL run in tests/integrations/*/test_docs.py. A block that no test knows how to run fails.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import tiny_model
from documentation import PAGES, ROOT, Block, blocks, commands, environment
from entropy_rl import cli, config, countdown, demo, train
from entropy_rl.report.rollouts import Rollout, write_rollouts

PACKAGE = "entropy-rl-ext"
ACTOR = "actor_rollout_ref.actor"
# Appended to a training command, to make it short.
SMALL = [
    "data.train_batch_size=4",
    "data.max_response_length=8",
    "actor_rollout_ref.rollout.n=4",
    f"{ACTOR}.ppo_mini_batch_size=4",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=8",
    "trainer.total_training_steps=1",
    "trainer.logger=[file]",
    "trainer.default_local_dir=run",
    "trainer.resume_mode=disable",
]
# Prompts of reasoning-gym have hundreds of characters, and the test's tokenizer has a token for each.
SMALL_TASK = ["data.reasoning_gym.size=8", "data.reasoning_gym.val_size=0", "data.max_prompt_length=1024"]
SMALL_DEMO = ["data.train_batch_size=8", "actor_rollout_ref.rollout.n=2", f"{ACTOR}.ppo_mini_batch_size=8"]
SMALL_ABLATION = ["--seeds=1", "--steps=1", "--warmup-steps=1", "--arms=top_20"]
# These replace "...", which stands for the reader's own files.
OWN = ["data.train_files=train.parquet", "data.val_files=test.parquet", "actor_rollout_ref.model.path=path/to/model"]

# Who runs the targets of make that no test can run, because they run the tests or take many minutes.
MADE_BY = {
    "test": "CI",
    "gtest": "CI, for test",
    "gtest-aarch64": "a developer with a cross compiler",
    "develop": "CI, for test",
    "model": "a developer; it downloads 93 MB",
    "demo-llm": "a developer; tests/python/test_demo_llm.py runs it with a tiny model",
    "test-trl": "CI",
    "lint": "CI",
    "test-wheel": "CI",
    "release": "CI, for test-wheel",
    "release-cuda": "CI, for cuda-build",
    "compile-commands": "a developer",
    "cuda-build": "CI",
    "format": "a developer",
    "test-gpu": "a developer with a GPU",
    "bench": "a developer, for minutes; tests/test_benchmarks.py runs each benchmark at a small size",
    "performance": "a developer; tests/test_benchmarks.py compares the page",
    "emulator": "CI, for test-emulated",
    "test-emulated": "CI",
    "test-emulated-full": "a developer",
    "instruction-counts": "a developer; CI compares the page",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that pages ask a reader to have."""
    directory = tmp_path_factory.mktemp("files")
    for name in ("path/to/model", "path/to/a/hugging/face/model"):
        # The pages' tasks have system prompts of 500 characters, each a token of this model.
        tiny_model.save_tiny_model(directory / name, positions=1024)
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{a} + {a} ="}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * a)},
        }
        for a in range(8)
    ]
    for name in ("train.parquet", "test.parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / name)
    (directory / "completions.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "completion": " 2"}) + "\n")
    (directory / "rollouts").mkdir()
    write_rollouts(directory / "rollouts" / "1.jsonl", [Rollout("1 + 1 =", " 2", 1.0, 1, [" ", "2"])])
    return directory


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "TRAIN_PROBLEMS", 128)
    monkeypatch.setattr(demo, "VALIDATION_PROBLEMS", 8)
    overrides = demo.training_overrides
    monkeypatch.setattr(demo, "training_overrides", lambda *given: [*overrides(*given), *SMALL_DEMO])
    assert page.read_text().count("```") == 2 * len(blocks(page)), "a fence does not begin its line"
    for block in blocks(page):
        print(block.name())
        run(block, monkeypatch)


def run(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    match block.language:
        case "python":
            if environment(block.text) == "here":
                torch.manual_seed(0)
                exec(compile(block.text, block.name(), "exec"), {})
        case "bash":
            for command in commands(block):
                print(command.text)
                if environment(command.text) == "here":
                    run_command(command.words(), monkeypatch)
        case "c++":
            assert is_quoted(block.text), "this is not in csrc/"
        case "yaml":
            keys = [f"{ACTOR}.{line.replace(': ', '=')}" for line in block.text.splitlines()]
            config.load([*keys, *OWN])
        case "text" if "->" in block.text:
            prompt, answer = block.text.split(" : ")
            *_, target = prompt.split()
            truth = {"numbers": prompt.split()[:-2], "target": target}
            assert countdown.compute_score("countdown", answer.strip(), truth) == 1
        case "bibtex":
            pass  # for a reader's bibliography
        case _:
            pytest.fail(f"{block.name()}: no test runs a block of {block.language!r}")


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for part in words for word in (OWN if part == "..." else [part])]
    match words:
        case ["make", "demo"]:
            assert ".venv/bin/python -m entropy_rl.demo" in made("demo")
            monkeypatch.setattr("sys.argv", ["demo", "--warmup-steps=1", "--steps=1"])
            assert demo.main() == 0
            Path(f"demo/run/global_step_{demo.STEPS}").symlink_to("global_step_1")
        case ["make", target]:
            is_made(target)
        case ["pip", "install", *requirements]:
            check_requirements(requirements)
        case ["make", "gtest", test]:
            name = test.removeprefix("TEST=")
            assert (ROOT / f"tests/cpp/{name}.cpp").exists()
            assert made("gtest", test).endswith(f"\nbuild/gtest/{name}\n")
        case [program, *arguments] if program.startswith("build/gtest/"):
            source = (ROOT / f"tests/cpp/{Path(program).name}.cpp").read_text()
            for pattern in (word.removeprefix("--gtest_filter=").strip("*") for word in arguments):
                assert re.search(rf"TEST\w*\(.*{pattern}", source), pattern
        case [".venv/bin/pytest", *arguments]:
            collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
            subprocess.run(collect, cwd=ROOT, check=True)
        case ["python", "-m", "entropy_rl.train", *arguments]:
            task = SMALL_TASK if any(word.startswith("data.reasoning_gym.name=") for word in arguments) else []
            assert train.main([*arguments, *task, *SMALL]) == 0
        case ["torchrun", *arguments]:
            torchrun = Path(sys.executable).with_name("torchrun")
            subprocess.run([torchrun, *arguments, *SMALL], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        case ["tests/emulator/run.sh", *arguments]:
            arguments = [word for word in arguments if not word.startswith(".venv-cuda/bin/")]
            for path in (word for word in arguments if "/" in word):
                assert (ROOT / path).exists(), path
        case ["entropy-rl", "ablate", *arguments]:
            small = SMALL if any("model.path" in word for word in arguments) else []
            assert cli.main(["ablate", *SMALL_ABLATION, *arguments, *small]) == 0
        case ["entropy-rl", *arguments]:
            assert cli.main(arguments) == 0
        case [".venv/bin/entropy-rl", *arguments]:  # of a developer, with the model of `make model`
            parsed = cli._parser().parse_args(arguments)
            assert (ROOT / parsed.input).exists() and f"\nSMOLLM2 := {parsed.model}\n" in (
                ROOT / "Makefile"
            ).read_text()
        case ["chromium", *arguments]:
            (picture,) = [word.partition("=")[2] for word in arguments if word.startswith("--screenshot=")]
            assert (ROOT / picture).exists()
        case _:
            pytest.fail(f"no test runs {shlex.join(words)}")


def made(*arguments: str) -> str:
    """The commands that make would run.

    Under `make pytest` this make is a make's make, which prints the directories that it enters unless told not to.
    """
    command = ["make", "-n", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def is_made(target: str) -> None:
    assert made(target)
    assert target in MADE_BY, f"no test runs make {target}"
    in_ci = re.search(rf"^make {target}$", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE)
    assert bool(in_ci) == (MADE_BY[target] == "CI")


def check_requirements(requirements: list[str]) -> None:
    """Names, extras and versions are those that `make` installs. The command itself would change this environment.

    Until CHANGELOG.md dates a release, no index has this package: pages install it from a clone (".") or a wheel.
    """
    pinned = [*(ROOT / "tests/integrations").glob("*/requirements.txt"), ROOT / "constraints.txt"]
    lines = [line for path in pinned for line in path.read_text().splitlines() if line and not line.startswith("#")]
    tested = {requirement.name.lower(): requirement for requirement in map(Requirement, lines)}
    project = (ROOT / "pyproject.toml").read_text()
    for word in requirements:
        if word.startswith("-") or word.endswith(".whl"):
            continue
        requirement = Requirement(re.sub(r"^\.", PACKAGE, word))
        for extra in requirement.extras:
            assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), word
        if requirement.name == PACKAGE:
            assert word.startswith(".") or is_released(), f"no index has {word}"
            continue
        assert requirement.name.lower() in tested, f"no environment of the tests has {word}"
        version = next(iter(tested[requirement.name.lower()].specifier), None)
        assert version is None or version.operator != "==" or Version(version.version) in requirement.specifier, word


def is_released() -> bool:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    return re.search(r"^## \[\d\S*\] - \d{4}-", changelog, flags=re.MULTILINE) is not None


@pytest.mark.skipif(is_released(), reason="indexes have the package")
def test_messages_install_from_a_clone() -> None:
    """Neither doctor nor an error tells a user to install this package from an index, which has no release of it."""
    sources = [ROOT / "setup.py", *(ROOT / "entropy_rl_ext").rglob("*.py"), *(ROOT / "python").rglob("*.*")]
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources
        if path.suffix in (".py", ".yaml", ".html", ".js")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(rf"pip install[^`]*({PACKAGE}|\{{DISTRIBUTION\}})", line)
    ]
    assert not wrong


def is_quoted(text: str) -> bool:
    """Whether a source of csrc/ has this text, up to white space."""
    text = "".join(text.split())
    return any(text in "".join(path.read_text().split()) for path in (ROOT / "csrc").rglob("*.*"))


def inline(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_sentences_are_there(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs, targets of make and modules that a sentence mentions are there; a complete command runs."""
    monkeypatch.syspath_prepend(ROOT)
    for code in inline(page):
        match code.split():
            case ["make", target]:
                assert made(target)
            case ["python", "-m", module, *_]:
                assert find_spec(module), code
            case ["python", "-c", *_]:
                python = [sys.executable, *shlex.split(code)[1:]]
                assert subprocess.run(python, cwd=tmp_path, capture_output=True, check=True).stdout
            case [".venv/bin/python", "setup.py", *_]:
                assert (ROOT / "setup.py").exists()
            case ["entropy-rl", command]:
                assert command in cli.COMMANDS
            case ["pip", "install", *requirements]:
                check_requirements(requirements)
            case [path] if re.fullmatch(r"(csrc|tests|docs|recipe|benchmarks|python|entropy_rl_ext)/[\w./]*", path):
                assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target
