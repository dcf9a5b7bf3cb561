"""The oracle stands apart from what it checks."""

import ast
import subprocess
import sys
from pathlib import Path

from entropy_rl_ext import reference

ROOT = Path(__file__).parent.parent.parent


def imports(source: Path) -> list[str]:
    """The modules, and names in modules, that a Python file imports; relative ones as they are written."""
    names = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return names


def test_it_imports_nothing_of_the_library() -> None:
    assert {name.split(".")[0] for name in imports(Path(reference.__file__))} == {"dataclasses", "torch", "typing"}


def test_only_tests_and_doctor_import_it() -> None:
    sources = [path for folder in ("entropy_rl_ext", "python", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    users = [path.name for path in sources if any("entropy_rl_ext.reference" in name for name in imports(path))]
    inside = [path.name for path in (ROOT / "entropy_rl_ext").rglob("*.py") if "..reference" in " ".join(imports(path))]
    assert users == ["doctor.py"] and not inside


def test_the_library_does_not_load_it() -> None:
    code = "import sys, entropy_rl_ext; sys.exit('entropy_rl_ext.reference' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
