"""What lets a saved folder load where jam_hf is not installed: the classes that the Auto classes find, and their files.

Every folder that a JAM, its config or its processor is saved to carries the code files of this folder, so that
`from_pretrained(..., trust_remote_code=True)` finds them. It knows names only: no class is imported here.
"""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    # transformers reads these lines (it does not run them) when it copies the file of a class and all that the file needs.
    # Each class that is saved imports this file, so that whichever is saved, all files go together.
    from .caching_jam import JamBlockCache  # noqa: F401
    from .configuration_jam import JamConfig  # noqa: F401
    from .image_processing_jam import JamImageProcessor  # noqa: F401
    from .modeling_jam import JamForCausalLM  # noqa: F401
    from .processing_jam import JamProcessor  # noqa: F401

# `file.Class` for each Auto class, as `auto_map` in config.json has it. transformers itself records only the class it saves.
AUTO_MAP = {
    "AutoConfig": "configuration_jam.JamConfig",
    "AutoModel": "modeling_jam.JamModel",
    "AutoModelForCausalLM": "modeling_jam.JamForCausalLM",
    "AutoModelForImageTextToText": "modeling_jam.JamForCausalLM",
    "AutoModelForMultimodalLM": "modeling_jam.JamForCausalLM",
    "AutoImageProcessor": "image_processing_jam.JamImageProcessor",
    "AutoProcessor": "processing_jam.JamProcessor",
}
VQ_AUTO_MAP = {
    "AutoConfig": "configuration_jam_vq.JamVQConfig",
    "AutoModel": "modeling_jam_vq.JamVQModel",
}


def add_auto_map(config: Any, auto_map: dict[str, str]) -> None:
    """Entries that are there already, those of a subclass say, stay."""
    config.auto_map = {**auto_map, **(getattr(config, "auto_map", None) or {})}


__all__ = ["AUTO_MAP", "VQ_AUTO_MAP", "add_auto_map"]
