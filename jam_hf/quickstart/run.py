"""`Run`: the folder of a quickstart, its settings and what lies where in it. It knows no stage."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from datasets import DatasetDict

from ..contents import load_saved_dataset
from ..files import read_json, write_whole
from ..model.configuration_jam import FUSION_MODES
from ..model.modeling_jam_vq import JamVQModel
from ..reading import read_whole
from .settings import QuickstartSettings


class Run:
    """A run folder and its settings, which the folder holds too: a folder with other settings is refused."""

    def __init__(self, folder: str | os.PathLike, settings: QuickstartSettings | None = None):
        self.folder = Path(folder)
        self.settings = settings or QuickstartSettings()
        described = json.loads(json.dumps(asdict(self.settings)))
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"'{self.folder}' is a file; expected the folder of a run, or a new one.")
        path = self.folder / "settings.json"
        if path.is_file():
            before = read_json(path)
            changed = sorted(k for k in described if before.get(k) != described[k] and k != "train_all")
            if changed:
                raise ValueError(
                    f"'{self.folder}' holds a run with other settings ({', '.join(changed)}). Choose another folder, "
                    "or delete it to begin again."
                )
        elif self.folder.is_dir() and any(found.name != f".{path.name}.partial" for found in self.folder.iterdir()):
            raise ValueError(
                f"'{self.folder}' is not empty and holds no run of the quickstart, which would put its toys there. "
                "Choose a new folder."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(described, indent=1) + "\n")

    def path(self, name: str) -> Path:
        return self.folder / name

    def need(self, name: str, stage: str) -> Path:
        path = self.path(name)
        if not path.exists():
            raise ValueError(
                f"'{path}' is missing; run the stage '{stage}' first (jam-hf quickstart {stage} --run {self.folder})."
            )
        return path

    def data(self, name: str) -> DatasetDict:
        return load_saved_dataset(self.need("data", "picture-world") / name)

    def vq(self) -> JamVQModel:
        return read_whole(JamVQModel, self.need("vq", "train-vq"), "VQ model")

    @property
    def modes(self) -> tuple[str, ...]:
        """The fusions that the pair of parents allows."""
        return ("cross",) if self.settings.family == "unlike" else FUSION_MODES

    @property
    def trained_modes(self) -> tuple[str, ...]:
        """The JAMs that are trained: jam-cross, or all."""
        return self.modes if self.settings.train_all else ("cross",)
