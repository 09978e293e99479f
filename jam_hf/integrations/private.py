"""The room of private symbols for what stays at home, and of all that is touched without an import.

What the model imports, and what the columns mean, is in model/transformers_private_jam.py.
"""

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
    ("peft.utils", "constants", "-", "Which modules an adapter adapts where nobody says it; tables by model type."),
)

# class or module, names, since, why: methods that are overridden or replaced, attributes that are read or written.
TOUCHED = (
    ("GenerationMixin",
     "_prepare_generation_config _prepare_cache_for_generation _get_logits_processor _get_stopping_criteria "
     "_update_model_kwargs_for_generation _reorder_cache _mask_length", "-",
     "The loops of generate() have no public hook at a step."),
    ("Cache", "_is_user_defined DynamicLayer StaticLayer QuantizedCache.layers per_layer_config", "-",
     "Columns beside the document, and a layer for each of a depth's attentions."),
    ("PreTrainedConfig", "_attn_implementation _attn_implementation_internal", "-",
     "Each stream has its own, set in no model."),
    ("PreTrainedModel",
     "_fsdp_plan _pp_plan _tp_plan _resolve_parallel_plans init_parallel_plans maybe_distribute_model", "-",
     "A depth of two streams has no plan among the stock ones."),
    ("PreTrainedModel, PreTrainedConfig", "_upload_modified_files", "-",
     "push_to_hub has no other step before the upload."),
    ("PilBackend", "_preprocess", "-", "The step between pictures as arrays and pixel_values."),
    ("OPTConfig", "_remove_final_layer_norm", "-", "Written in old OPT configs, and obeyed by OPTDecoder."),
    ("PreTrainedTokenizerFast", "_tokenizer", "-", "The backend cannot be replaced in public."),
    ("Trainer", "_prepare_inputs", "-", "Replaced: placeholders become codes before labels are taken away."),
    ("torch.nn.Module", "_apply _forward_hooks _forward_pre_hooks", "-",
     "The one way of all casts; whether a head is bare."),
    ("torch.compile", "_orig_mod", "-", "The JAM inside of a compiled model."),
    ("torch.distributed.fsdp", "register_fsdp_forward_method", "-",
     "Pictures are encoded outside of forward, by a Trainer."),
    ("accelerate", "_hf_hook", "-", "Whether a head's weights are elsewhere (device_map)."),
    # Beside the model:
    ("Trainer, PeftModel, trl", "create_model_card create_or_update_model_card _BaseTrainer", "-",
     "Replaced: cards that they write keep a JAM's licence and parents."),
    ("Trainer", "_get_train_sampler", "-", "Documents of like length go together."),
    ("trl", "fused_lm_head", "1.16", "Of the forward that trl puts in place: by this argument it is known."),
    ("GenerationConfig", "_get_default_generation_params", "-", "What a setting is where nobody says it."),
    ("ContinuousMixin",
     "_cached_continuous_batching_manager _true_initial_tokens ContinuousBatchingManager.add_request "
     "ContinuousBatchingLogitsProcessorList.tensors_required", "-",
     "What pages know of a request; they bound new ids alone."),
    ("PreTrainedTokenizerFast", "_auto_map _add_bos_token _add_eos_token", "-",
     "What a saved tokenizer would be read with."),
)
# fmt: on

__getattr__ = room(IMPORTED, __name__)
