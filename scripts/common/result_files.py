"""What result files hold beside figures: the commit, and errors in a line."""

import subprocess
from pathlib import Path


def git_sha() -> str | None:
    """The commit of the checkout, with "+" where files differ from it; None outside one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def one_line(error: Exception) -> str:
    """Its type and the beginning of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
