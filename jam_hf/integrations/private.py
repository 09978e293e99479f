"""The room of private symbols for what stays at home; the model's own, and what its columns mean, is
model/transformers_private_jam.py."""

from ..model.transformers_private_jam import room


# fmt: off
IMPORTED = (
    ("transformers.utils.chat_template_utils", "render_jinja_template", "-",
     "A template is tried without a tokenizer."),
    ("transformers.models.auto.tokenization_auto", "get_tokenizer_config tokenizer_class_from_name", "-",
     "What a folder says of its tokenizer, before it is one."),
    ("transformers.utils.hub", "extract_commit_hash", "-",
     "Which commit a revision was; configs do not keep it any more."),
    ("transformers.convert_slow_tokenizer", "bytes_to_unicode", "-", "How byte-level vocabularies spell bytes."),
    ("transformers.models.janus.modeling_janus", "JanusVQVAEAlignerMLP", "-",
     "Embeds codes in Janus; run once at fusion."),
    ("transformers.generation.continuous_batching.cb_logits_processors", "ContinuousBatchingLogitsProcessor", "-",
     "Public processors see one request at a time, and no request by name."),
    ("transformers.generation.continuous_batching.requests", "GenerationOutput RequestStatus", "-",
     "What generate_batch returns."),
)
TOUCHED = (
    ("Trainer, PeftModel, trl", "create_model_card create_or_update_model_card _BaseTrainer", "-",
     "Replaced: cards that they write keep a JAM's licence and parents."),
    ("Trainer", "_get_train_sampler", "-", "Documents of like length go together."),
    ("trl", "fused_lm_head", "1.16", "Of the forward that trl puts in place: by this argument it is known."),
    ("GenerationConfig", "_get_default_generation_params", "-", "What a setting is where nobody says it."),
    ("ContinuousMixin",
     "_cached_continuous_batching_manager _true_initial_tokens ContinuousBatchingManager.add_request "
     "ContinuousBatchingLogitsProcessorList.tensors_required", "-", "What pages know of a request; they bound new ids alone."),
    ("PreTrainedTokenizerFast", "_auto_map _add_bos_token _add_eos_token", "-",
     "What a saved tokenizer would be read with."),
)
# fmt: on

__getattr__ = room(IMPORTED, __name__)
