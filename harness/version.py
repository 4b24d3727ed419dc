"""This harness's version: the git commit that last changed its code, or the version file where there is no git."""

import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What a number may depend on: a commit that changes docs or results alone leaves rows comparable.
CODE = ("benchmark.py", "harness", ":!harness/reports", "tvm_items", "requirements.txt")
VERSION_FILE = ROOT / "harness" / "version.txt"  # git archive writes the commit into it: .gitattributes


@functools.cache
def harness_version():
    """Returns a short commit hash, with "+changes" where the code differs from it, or "unknown"."""
    commit = git("log", "-1", "--format=%h", "--abbrev=12", "--", *CODE)
    if commit:
        return commit + ("+changes" if git("status", "--porcelain", "--", *CODE) else "")
    archived = VERSION_FILE.read_text().strip() if VERSION_FILE.exists() else ""
    return archived if archived and "$" not in archived else "unknown"


def git(*arguments):
    """Returns what git prints of this checkout, "" where it is none or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
