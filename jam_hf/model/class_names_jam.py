"""The names of the JAM classes in transformers' static tables, which Auto registration does not fill.

`transformers serve` reads there what a model can do, pipelines whether they support it, model cards their task, trl and
lm_eval whether it is a causal LM and takes pictures. It knows names only, and comes along with the config: a table may
be read before any model class is loaded.
"""

from .transformers_private_jam import modeling_auto


MODEL_TYPE = "jam"
CAUSAL_LM = "JamForCausalLM"
TABLES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)

for _table in TABLES:
    getattr(modeling_auto, _table)[MODEL_TYPE] = CAUSAL_LM


__all__ = ["CAUSAL_LM", "MODEL_TYPE", "TABLES"]
