"""Names of files that stand in files: they lead to what lies in the same folder, or are refused.

Whoever made a folder wrote them; what is opened by them would be read, computed with and perhaps published. A link that
lies in
the folder is followed: the Hub's cache is made of links, and only who has the machine can put one there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from .files import read_json, write_whole


def beside(folder: str | os.PathLike, name: Any, where: str) -> Path:
    """The path of what `name` says, in `folder` or below it.

    Args:
        where: which file says so, for the message.
    Raises:
        ValueError: if it is no name, or leads out of the folder.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
        raise ValueError(f"{where} names {name!r:.120}, which is not the name of a file in the folder '{folder}'.")
    return Path(folder, *parts)


def may_be_hub_id(source: str | os.PathLike, with_owner: bool = False) -> bool:
    """Whether it can be the name of a repository on the Hub, `name` or `owner/name` (`with_owner`: of the second form
    alone).

    What lies on this machine, and what is written as a path, is none.
    """
    name = str(source)
    slashes = (1,) if with_owner else (0, 1)
    return not Path(source).exists() and not name.startswith((".", "/", "~")) and name.count("/") in slashes


def check_shards(source: str | os.PathLike, role: str) -> None:
    """Raise a `ValueError` if an index of weights in this folder names files outside of it; of a Hub id, nothing is
    looked at.

    transformers opens what such an index names.
    """
    for path in sorted(Path(source).glob("*.index.json")) if Path(source).is_dir() else ():
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{path} of the {role} is damaged: it has no weight_map. Fetch or save it again.")
        for name in weight_map.values():
            beside(path.parent, name, f"{path} of the {role}")


def load_saved_dataset(folder: str | os.PathLike) -> Any:
    """`datasets.load_from_disk` of a folder whose notes name nothing outside of it.

    Raises:
        ValueError: if they do, or are damaged. As `load_from_disk` otherwise.
    """
    from datasets import load_from_disk

    folder = Path(folder)
    parts = [folder]
    if (folder / "dataset_dict.json").is_file():
        named = read_json(folder / "dataset_dict.json").get("splits")
        splits = named if isinstance(named, list) else []
        parts = [beside(folder, name, str(folder / "dataset_dict.json")) for name in splits]
    for part in parts:
        if (part / "state.json").is_file():
            files = read_json(part / "state.json").get("_data_files")
            for entry in files if isinstance(files, list) else []:
                beside(part, entry.get("filename") if isinstance(entry, dict) else entry, str(part / "state.json"))
    return load_from_disk(str(folder))


def public_name(source: str | os.PathLike) -> str:
    """A Hub id as it is; of a path its last part, since where it lies is nobody else's business."""
    is_path = Path(source).exists() or str(source).startswith((".", "/", "~"))
    return Path(source).resolve().name if is_path else str(source)


def name_the_base(adapter_dir: str | os.PathLike) -> None:
    """In the folder of an adapter that peft wrote, the base model by its name instead of by its place on this
    machine.
    """
    for path in sorted(Path(adapter_dir).rglob("adapter_config.json")):
        config = read_json(path)
        base = config.get("base_model_name_or_path")
        if not base or public_name(base) == base:
            continue
        write_whole(
            path, json.dumps({**config, "base_model_name_or_path": public_name(base)}, indent=2, sort_keys=True) + "\n"
        )
        for card in (path.with_name("README.md"), Path(adapter_dir) / "README.md"):
            if card.is_file():
                write_whole(card, card.read_text(encoding="utf-8").replace(str(base), public_name(base)))
