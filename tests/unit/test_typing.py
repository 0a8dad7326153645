"""The public interface as a type checker shows it to users: `tests/typing` is their code, and is never run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
USERS = "tests/typing"


def check(*command: str) -> str:
    """Run a checker; return its complaints, empty if it has none."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_mypy() -> None:
    """mypy, strict by setup.cfg, infers what users expect, accepts what is right and finds each mistake."""
    complaints = check("mypy", USERS)
    assert not complaints, complaints


def test_pyright() -> None:
    """Pyright in strict mode infers what users expect, accepts what is right and finds each mistake."""
    # With JSON it doesn't ask the network for a newer version of itself.
    complaints = check("pyright", "--project", USERS, "--pythonpath", sys.executable, "--outputjson")
    assert not complaints, complaints


def test_checkers_find_an_unused_ignore(tmp_path: Path) -> None:
    """A mistake that a checker no longer finds makes it complain of the ignore comment."""
    code = tmp_path / "code.py"
    code.write_text("x: int = 1  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]\n")
    (tmp_path / "pyrightconfig.json").write_bytes((CHECKOUT / USERS / "pyrightconfig.json").read_bytes())
    assert "unused-ignore" in check("mypy", "--strict", str(code))
    assert "reportUnnecessaryTypeIgnoreComment" in check("pyright", "--project", str(tmp_path), "--outputjson")
