"""Writes build/compile_commands.json: how each C++ file is compiled, for clangd and other editors.

    python tools/compile_commands.py

It joins the commands of the in-place build (setup.py) with those of the gtests (CMake). Editors look for the file in
build/ by themselves.
"""

import json
import subprocess
import sys
from pathlib import Path

BUILD = Path(__file__).parent.parent / "build"


def main() -> None:
    folders = [path.parent for path in sorted(BUILD.glob("**/build.ninja"))]
    if not folders:
        sys.exit("nothing is built yet: run make gtest first")
    commands = []
    for folder in folders:
        listed = subprocess.run(["ninja", "-C", folder, "-t", "compdb"], capture_output=True, text=True, check=True)
        found = json.loads(listed.stdout[listed.stdout.index("[\n") :])
        commands += [entry for entry in found if entry["file"].endswith((".cpp", ".cu"))]
    path = BUILD / "compile_commands.json"
    path.write_text(json.dumps(commands, indent=1) + "\n")
    print(f"{path}: {len(commands)} files")


if __name__ == "__main__":
    main()
