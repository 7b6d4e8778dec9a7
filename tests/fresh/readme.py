"""README's commands as they stand, pasted one after the other into a fresh shell on a fresh clone (make test-readme).

Blocks marked `sh` run as they are. Those marked `shell` need the official files: small models of seeded weights stand
in for these under their names, and the training takes two steps; the download itself is left out.
"""

from __future__ import annotations

from clone import blocks, fresh_clone, paste

STAND_INS = """
import sys
from pathlib import Path
sys.path.insert(0, 'tests')
import stand_ins
stand_ins.write(Path('.'))
"""
FEW = " --steps 2"  # of training; else minutes


def main() -> None:
    lines = blocks("sh")
    assert lines[0].startswith("make demo"), "README begins with make demo"
    lines += [f"python - <<'END'{STAND_INS}END"]
    for line in blocks("shell"):
        if not line.startswith("sdxl-ref fetch"):
            command = line.partition(" #")[0]
            lines.append(command.rstrip() + FEW * line.startswith("sdxl-ref train"))
    with fresh_clone() as clone:
        paste(lines, clone)
    print(f"{len(lines)} lines of README.md ran")


if __name__ == "__main__":
    main()
