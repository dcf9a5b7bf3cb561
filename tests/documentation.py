"""Finds the fenced blocks of the pages. tests/test_docs.py runs most of them; test_docs.py of verl and of TRL run those
that need verl or TRL, in the environments that have them."""

import re
import shlex
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipe").rglob("*.md")),
]


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """One command of a block. "..." stands for the reader's own arguments."""

    block: Block
    text: str

    def name(self) -> str:
        return f"{self.block.name()} {self.text[:40]}"

    def words(self) -> list[str]:
        return shlex.split(self.text)


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^```(.*)\n((?:.*\n)*?)^```$", text, flags=re.MULTILINE)
    return [Block(page, text[: block.start()].count("\n") + 1, block[1], block[2]) for block in found]


def commands(block: Block) -> list[Command]:
    """The commands of a block: one a line, without comments; a backslash joins a line with the next."""
    lines = block.text.replace("\\\n", " ").splitlines()
    texts = [" ".join(shlex.split(line, comments=True, posix=False)) for line in lines]
    return [Command(block, text) for text in texts if text]


def environment(text: str) -> Literal["here", "verl", "trl"]:
    """The environment that a command or a block of Python needs."""
    if "verl.trainer" in text or re.search(r"recipe/\S+\.sh", text):
        return "verl"
    if "EntropyGRPO" in text or re.search(r"recipe/\S*trl\S*\.py", text):
        return "trl"
    return "here"


def commands_of(name: Literal["verl", "trl"]) -> list[Command]:
    found = [
        command for page in PAGES for block in blocks(page) if block.language == "bash" for command in commands(block)
    ]
    return [command for command in found if environment(command.text) == name]
