"""What lets a saved folder load where jam_hf is not installed: the classes that the Auto classes find, and their files.

Every folder that a JAM, its config or its processor is saved to carries the code files of this folder, so that
`from_pretrained(..., trust_remote_code=True)` finds them. It knows names only: no class is imported here.
"""

from typing import Any


# transformers copies the file of a class that is saved, and the files that are named by lines of this form in it, and
# in those. It reads lines and runs nothing, so the list is a text: an import, were it for types alone, would close a
# circle. Each class that is saved imports this file, so that whichever is saved, all files go together.
FILES = """
from .configuration_jam import JamConfig
from .image_processing_jam import JamImageProcessor
from .modeling_jam import JamForCausalLM
from .processing_jam import JamProcessor
"""

# `file.Class` for each Auto class, as `auto_map` in config.json has it. transformers records only the class it saves.
AUTO_MAP = {
    "AutoConfig": "configuration_jam.JamConfig",
    "AutoModel": "modeling_jam.JamModel",
    "AutoModelForCausalLM": "modeling_jam.JamForCausalLM",
    "AutoModelForImageTextToText": "modeling_jam.JamForCausalLM",
    "AutoModelForMultimodalLM": "modeling_jam.JamForCausalLM",
    "AutoImageProcessor": "image_processing_jam.JamImageProcessor",
    "AutoProcessor": "processing_jam.JamProcessor",
}
VQ_AUTO_MAP = {"AutoConfig": "configuration_jam_vq.JamVQConfig", "AutoModel": "modeling_jam_vq.JamVQModel"}


def add_auto_map(config: Any, auto_map: dict[str, str]) -> None:
    """Entries that are there already, those of a subclass say, stay."""
    config.auto_map = {**auto_map, **(getattr(config, "auto_map", None) or {})}


__all__ = ["AUTO_MAP", "VQ_AUTO_MAP", "add_auto_map"]
