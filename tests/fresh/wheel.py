"""sdist and wheel, built and installed into an empty environment, where the small pair works (make test-wheel)."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from clone import fresh_clone, paste

NEEDED = (
    "sdxl_ref/py.typed",
    "sdxl_ref/data/photo.jpg",
    "sdxl_ref/pocket/README.md",
    "sdxl_ref/pocket/evaluation.json",
    "sdxl_ref/pocket/pocket_base.safetensors",
    "sdxl_ref/pocket/pocket_refiner.safetensors",
    "sdxl_ref/diffusion/solvers/heun.py",
    "sdxl_ref/adapters/forms/kohya.py",
    "weights_convert/py.typed",
)
LINES = [
    "sdxl-ref demo --out demo.png",
    "PHOTO=\"$(python -c \"from importlib.resources import files; print(files('sdxl_ref') / 'data' / 'photo.jpg')\")\"",
    'sdxl-ref refine "$PHOTO" --prompt "a green cross" --checkpoint pocket --steps 10 --out refined.png',
    "sdxl-ref info pocket-base",
    'python -c "import sdxl_ref; [getattr(sdxl_ref, name) for name in dir(sdxl_ref)]"',
    "weights-convert --help",
    "test -s demo.png -a -s refined.png",
]


def main() -> None:
    with fresh_clone() as clone, tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        subprocess.run([sys.executable, "-m", "venv", place / "builder"], check=True)
        subprocess.run([place / "builder/bin/pip", "install", "--quiet", "build"], check=True)
        subprocess.run([place / "builder/bin/python", "-m", "build", "--outdir", place / "dist", clone], check=True)
        [wheel] = (place / "dist").glob("*.whl")
        [sdist] = (place / "dist").glob("*.tar.gz")
        with zipfile.ZipFile(wheel) as archive:
            in_wheel = archive.namelist()
        with tarfile.open(sdist) as archive:
            in_sdist = [name.partition("/")[2] for name in archive.getnames()]
        for name in NEEDED:
            assert name in in_wheel, f"{name} is not in the wheel"
            assert name in in_sdist, f"{name} is not in the sdist"
        subprocess.run([sys.executable, "-m", "venv", place / "empty"], check=True)
        paste([f". {place}/empty/bin/activate", f"pip install --quiet {wheel}", *LINES], place)
    print(f"{wheel.name} and {sdist.name} are whole; the wheel works in an empty environment")


if __name__ == "__main__":
    main()
