"""A fresh copy of the tracked files, and a shell that knows nothing of this one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
KEPT = ("HOME", "LANG", "TMPDIR", "PIP_INDEX_URL", "PIP_CONFIG_FILE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


@contextmanager
def fresh_clone() -> Iterator[Path]:
    """The tracked files as they are, in a folder of their own that is deleted afterwards."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "sdxl-ref"
        for name in filter(None, names):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
        yield clone


def paste(lines: list[str], folder: Path) -> None:
    """Run lines one after the other in one fresh shell; the first that fails ends this program with its line."""
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    script = "\n".join(["set -e", *(f"echo {quoted(f'$ {line}')}\n{line}" for line in lines)])
    result = subprocess.run(["bash", "--norc", "--noprofile"], input=script, cwd=folder, env=environment, text=True)
    if result.returncode:
        raise SystemExit(f"a line failed with status {result.returncode}: the last one above that begins with $")


def quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def blocks(language: str) -> list[str]:
    """The lines of README's code blocks in a language."""
    readme = (ROOT / "README.md").read_text()
    found = re.findall(rf"```{language}\n(.*?)```", readme, re.DOTALL)
    return [line for block in found for line in block.splitlines() if line and not line.startswith("#")]
