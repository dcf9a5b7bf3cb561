"""Writes docs/configuration.md from train.yaml and the rules that check it.

python -m entropy_rl.config.reference > docs/configuration.md
"""

import re
from collections.abc import Iterator
from pathlib import Path

from entropy_rl.config import RULES

HEAD = """\
# Configuration

Which keys does `python -m entropy_rl.train` have, what may each hold, and what is its default?
Write `KEY=VALUE` on the command line, as in `actor_rollout_ref.actor.entropy_top_ratio=0.2`;
`--help` prints the same list.

Names and meanings are verl's wherever verl has the key. [training.md](training.md) explains how the
keys work together, and [distributed.md](distributed.md#what-competes) which tokens compete under
each scope. A wrong key or value stops the program with status 2 and one line that says what is
allowed.

`python -m entropy_rl.config.reference` writes this page from
[`train.yaml`](../python/entropy_rl/config/train.yaml) and the rules that check it.
"""


def entries(text: str) -> Iterator[tuple[str, str, str]]:
    """Yields (key, default, explanation) for each key of a YAML text that has a comment above every key."""
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        found = re.fullmatch(r"( *)(\w+):(?: (.*))?", line)
        if found:
            indent, name, value = found.groups()
            path = [*path[: len(indent) // 2], name]
            if value is not None:
                yield ".".join(path), value, " ".join(comment)
        comment = [*comment, line.strip().removeprefix("# ")] if line.strip().startswith("#") else []


def reference() -> str:
    sections: dict[str, list[str]] = {}
    for key, default, explanation in entries((Path(__file__).parent / "train.yaml").read_text()):
        section, name = key.rsplit(".", 1)
        cells = (f"`{name}`", f"`{default}`", RULES[key].allowed, explanation)
        row = "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
        sections.setdefault(section, []).append(row)
    title = "\n## {}\n\n| key | default | allowed | meaning |\n|---|---|---|---|\n"
    return HEAD + "".join(title.format(section) + "".join(rows) for section, rows in sections.items())


if __name__ == "__main__":
    print(reference(), end="")
