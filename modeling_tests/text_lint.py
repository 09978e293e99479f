"""Files as text: lines of at most 120 columns, one line feed at the end, none larger than half a MiB: `make lint`.

Python's columns are ruff's. A row of a Markdown table cannot be broken, nor can a word without blanks (a link); pages
that are generated are as they are generated.
"""

import subprocess
import sys
from pathlib import Path


COLUMNS = 120
LARGEST = 2**19  # bytes
TEXTS = (".py", ".md", ".sh", ".cfg", ".toml", ".yaml", ".yml", ".cff", ".txt", ".json", "Makefile", "LICENSE")
FREE = ("docs/compatibility.md", "LICENSE")  # generated, or not ours to wrap


def findings(name: str, data: bytes) -> list[str]:
    """What is wrong with a file, one line each."""
    found = [f"{name}: {len(data):,} bytes, at most {LARGEST:,}"] * (len(data) > LARGEST)
    if not name.endswith(TEXTS):
        return found
    text = data.decode("utf-8")
    if text and not text.endswith("\n") or text.endswith("\n\n"):
        found.append(f"{name}: one line feed is expected at its end")
    if name.endswith((".py", ".json")) or name in FREE:
        return found
    for number, line in enumerate(text.splitlines(), 1):
        table = name.endswith(".md") and line.lstrip().startswith("|")
        if len(line) > COLUMNS and not table and " " in line.strip()[:COLUMNS].lstrip("-*>#0123456789. "):
            found.append(f"{name}:{number}: {len(line)} columns, at most {COLUMNS}")
    return found


def main() -> int:
    root = Path(__file__).resolve().parents[1]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    paths = [name for name in listed.split("\0") if name and (root / name).is_file()]
    found = [line for name in paths for line in findings(name, (root / name).read_bytes())]
    print(*found, sep="\n", end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
