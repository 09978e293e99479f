"""Hugging Face's linter of model code (transformers-mlinter) on the model files of JAM: `make lint`.

The linter chooses files by their names. Its command line can switch rules on, not off, so it is called from here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlinter


MODEL = Path(__file__).parents[1] / "jam_hf" / "model"

# Rules that cannot hold outside of transformers, and why.
SWITCHED_OFF = {
    "TRF028": "the licence paragraph in each of nine files would stand nine times in every checkpoint; there one line "
    "names the licence",
    "TRF057": "auto_docstring reads a model's name off transformers' folders: for others it writes 'the None model' "
    "and a link to huggingface.co/None, and prints [ERROR] at import for each argument that is described in a group",
}


def main() -> int:
    needless, found = set(SWITCHED_OFF), []
    for path in mlinter.iter_modeling_files(search_paths=[MODEL]):
        for finding in mlinter.analyze_file(path, path.read_text(encoding="utf-8")):
            needless.discard(finding.rule_id)
            if finding.rule_id not in SWITCHED_OFF:
                found.append(f"{path}:{finding.line_number}: {finding.message}")
    found += [
        f"{rule} is switched off and finds nothing any more: remove it from SWITCHED_OFF" for rule in sorted(needless)
    ]
    print("\n".join(found) or f"transformers-mlinter {mlinter.__version__}: nothing to say")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
