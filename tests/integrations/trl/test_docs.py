"""The blocks of the documentation that need TRL, run with small settings."""

from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

from documentation import PAGES, ROOT, Block, Command, blocks, commands_of, environment
from entropy_rl.integrations import trl as integration
from grpo import launch

BLOCKS = [
    block for page in PAGES for block in blocks(page) if block.language == "python" and environment(block.text) == "trl"
]
SMALL = {
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "max_completion_length": 4,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
}
SMALL_RECIPE = [
    *("--task_size", "8", "--max_steps", "1", "--max_completion_length", "4", "--per_device_train_batch_size", "8"),
    *("--bf16", "false", "--use_cpu", "true", "--report_to", "none"),
]


@pytest.mark.parametrize("block", BLOCKS, ids=Block.name)
def test_python(block: Block, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/model").symlink_to(model_path)
    monkeypatch.chdir(tmp_path)
    made = []

    class SmallConfig(integration.EntropyGRPOConfig):
        def __init__(self, **given: Any) -> None:
            super().__init__(**{"output_dir": "run", "report_to": "none"} | given | SMALL)
            made.append(self)

    monkeypatch.setattr(integration, "EntropyGRPOConfig", SmallConfig)
    # A block without imports uses those of the block above it.
    names: dict[str, Any] = {} if "import" in block.text else {"EntropyGRPOConfig": SmallConfig}
    exec(compile(block.text, block.name(), "exec"), names)
    assert made[0].entropy_top_ratio == 0.2
    if "trainer.train()" in block.text:
        assert names["trainer"].state.global_step == 1


@pytest.mark.parametrize("command", commands_of("trl"), ids=Command.name)
def test_shell(command: Command, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    match command.words():
        case ["python", recipe, *arguments]:
            (tmp_path / "path/to").mkdir(parents=True)
            (tmp_path / "path/to/model").symlink_to(model_path)
            monkeypatch.chdir(tmp_path)
            launch(ROOT / recipe, *arguments, *SMALL_RECIPE, processes=1)
            assert (tmp_path / "run").is_dir()
        case ["accelerate", "launch", *arguments]:
            # Not started: it needs too many processes for a test. test_recipe.py starts two.
            parsed = launch_command_parser().parse_args(arguments)
            assert (ROOT / parsed.training_script).exists() and parsed.training_script_args == ["..."]
        case words:
            pytest.fail(f"nobody runs {words}")
