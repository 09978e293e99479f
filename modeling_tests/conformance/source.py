"""The source distribution of the installed transformers, which holds the library's own tests; the wheel does not.

It knows how to get and unpack it, nothing of what the tests test. The folder appears whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


def fetch_tests(cache: Path) -> Path:
    """The folder `tests` of the installed version of transformers, fetched from the package index where `cache` lacks
    it.

    Raises:
        RuntimeError: if the package index cannot be reached, or has no source distribution of that version.
    """
    version = transformers.__version__
    unpacked = cache / f"transformers-{version}"
    if (unpacked / "tests" / "test_modeling_common.py").is_file():
        return unpacked / "tests"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as aside:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        command += ["--no-build-isolation", "--dest", aside, f"transformers=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(aside).glob("transformers-*.tar.gz"))
        if done.returncode or len(archives) != 1:
            raise RuntimeError(
                f"Could not fetch the source distribution of transformers {version} from the package index, which has "
                f"the tests to run. `{' '.join(command)}` said:\n{done.stderr.strip()[-2000:]}"
            )
        with tarfile.open(archives[0]) as archive:
            archive.extractall(aside, filter="data")
        shutil.rmtree(unpacked, ignore_errors=True)
        os.replace(Path(aside) / unpacked.name, unpacked)
    return unpacked / "tests"
