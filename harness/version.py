"""This harness's version: its release, and the git commit that last changed its code."""

import functools
import subprocess
from pathlib import Path

VERSION = "1.0.0"
ROOT = Path(__file__).resolve().parent.parent
# What a number may depend on: a commit that changes docs or results alone leaves rows comparable.
CODE = ("benchmark.py", "harness", ":!harness/reports", "tvm_items", "requirements.txt")
VERSION_FILE = ROOT / "harness" / "version.txt"  # git archive writes the commit into it: .gitattributes


@functools.cache
def harness_version():
    """Returns VERSION with the commit as its local version, "1.0.0+0123456789ab", as PEP 440 writes it.

    ".changes" follows where the code differs from the commit. Without git the version file, which git archive writes,
    says the commit; where nothing does, VERSION is all there is.
    """
    commit = git("log", "-1", "--format=%h", "--abbrev=12", "--", *CODE)
    if commit:
        return f"{VERSION}+{commit}" + (".changes" if git("status", "--porcelain", "--", *CODE) else "")
    archived = VERSION_FILE.read_text().strip() if VERSION_FILE.exists() else ""
    return f"{VERSION}+{archived}" if archived and "$" not in archived else VERSION


def git(*arguments):
    """Returns what git prints of this checkout, "" where it is none or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
