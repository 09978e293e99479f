"""The room of private symbols: whatever the model's code uses of other libraries that they do not promise to keep.

`from .transformers_private_jam import NAME` is the only way to one, and imports no other. Each line says since which
version of the library it is so ("-": before transformers 5.20) and why nothing public does it. Layers of the families
come by their fact sheets (families_jam.py). jam_hf/integrations/private.py has what is touched without an import, here
too, and what stays at home; modeling_tests/contracts/ has what is relied on.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any


# fmt: off
# module, names, since, why no public symbol will do
IMPORTED = (
    ("transformers.utils.output_capturing", "OutputRecorder capture_outputs", "-", "Records what layers return."),
    ("transformers.utils.output_capturing", "resolve_hidden_states_indices selected_hidden_states", "5.23",
     "output_hidden_states may name layers; what is recorded of the image stream follows."),
    ("transformers.utils.generic", "merge_with_config_defaults", "-", "Config's defaults of use_cache and outputs."),
    ("transformers.utils.generic", "is_flash_attention_requested", "-", "Flash-attention goes by many names."),
    ("transformers.utils", "torch_compilable_check", "-", "A check of tensors that torch.compile can trace."),
    ("transformers.modeling_utils", "slice_logits_to_keep", "5.21", "What logits_to_keep means, sharded states too."),
    ("transformers.masking_utils", "create_masks_for_generate", "-", "Masks of a static cache."),
    ("transformers.integrations.sdpa_attention", "sdpa_attention_forward", "-", "What lanes of a cache fall back to."),
    ("transformers.integrations.tensor_parallel", "replace_layer_number_by_wildcard", "-", "Names in parallel plans."),
    ("transformers.configuration_utils", "SubConfigSpec", "-", "Sub-configs of any family, one of them optional."),
    ("transformers.image_utils", "SizeDict", "-", "How an image processor hands sizes to its own steps."),
    ("transformers.processing_utils", "MultiModalData", "-", "What servers ask a processor for."),
    ("transformers.processing_utils", "_MARKED_RE", "5.23", "Control tokens that a user typed are marked by it."),
    ("transformers.models.auto", "modeling_auto", "-", "Tables of class names, which registration does not fill."),
    ("transformers.models.janus.modeling_janus", "JanusVQVAEHead", "-", "The MLP that Janus has for an image head."),
    ("transformers.models.llama.modeling_llama", "apply_rotary_pos_emb eager_attention_forward", "-",
     "What cross blocks do as Llama does."),
    ("huggingface_hub.dataclasses", "strict", "-", "transformers' configs are checked by it; a subclass must be, too."),
    ("huggingface_hub.utils", "httpx", "-", "The HTTP client that transformers itself fetches pictures with."),
    ("diffusers.models.attention_processor", "Attention", "-", "Its output is channels-last; ours is not."),
)
# fmt: on


def room(imported: tuple[tuple[str, str, str, str], ...], path: str) -> Callable[[str], Any]:
    """The `__getattr__` of a room: each name of `imported`, from where it is today."""
    homes = {name: module for module, names, *_ in imported for name in names.split()}

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {path!r} has no attribute {name!r}")
        try:
            return getattr(import_module(homes[name]), name)
        except (ImportError, AttributeError) as error:
            library = homes[name].partition(".")[0]
            raise ImportError(
                f"{homes[name]}.{name} has moved: this version of {library} is not supported ({error})."
            ) from error

    return __getattr__


__getattr__ = room(IMPORTED, __name__)
