"""What JAM relies on inside transformers' generation, on a stock Llama: a failure here says what moved."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    DynamicLayer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    QuantizedCache,
    StaticCache,
    StaticLayer,
    StoppingCriteriaList,
)

from jam_hf.integrations import private
from jam_hf.model import transformers_private_jam as carried
from jam_hf.model.generation_jam import JamGenerationMixin


SIZES = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
STEPS = (
    "_prepare_generation_config",
    "_prepare_cache_for_generation",
    "_get_logits_processor",
    "_get_stopping_criteria",
    "_update_model_kwargs_for_generation",
    "_reorder_cache",
)


def stock(owner=LlamaForCausalLM):
    torch.manual_seed(0)
    return owner(
        LlamaConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=32)
    ).eval()


def watched_model():
    """A Llama that notes each step's call and what it gave; each is put to the signature that a JAM has for it."""
    calls = []

    def watch(name):
        def method(self, *args, **kwargs):
            bound = inspect.signature(getattr(JamGenerationMixin, name)).bind(self, *args, **kwargs)
            if name == "_reorder_cache":  # has no default in transformers: it is called where a model has one
                cache = bound.arguments["past_key_values"]
                cache.reorder_cache(bound.arguments["beam_idx"])
                result = cache
            else:
                result = getattr(super(Watched, self), name)(*args, **kwargs)
            calls.append(SimpleNamespace(name=name, arguments=bound.arguments, result=result))
            return result

        return method

    Watched = type("Watched", (LlamaForCausalLM,), {name: watch(name) for name in STEPS})
    return stock(Watched), calls


@pytest.mark.contract(*STEPS)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_takes_these_steps_in_this_order_with_these_arguments(num_beams):
    model, calls = watched_model()
    model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=3, min_new_tokens=3, num_beams=num_beams, temperature=None)
    names = [call.name for call in calls]
    assert names[:4] == list(STEPS[:4])
    assert names[4:] == [*STEPS[4 : 4 + num_beams]] * 3
    of = {call.name: call for call in calls}
    config, model_kwargs = of["_prepare_generation_config"].result
    assert isinstance(config, GenerationConfig) and config.max_new_tokens == 3 and isinstance(model_kwargs, dict)
    arguments = of["_prepare_cache_for_generation"].arguments
    assert arguments["generation_config"] is config and arguments["max_cache_length"] == 5
    assert arguments["batch_size"] == 1  # before beams
    assert str(arguments["generation_mode"].value) == ("greedy_search" if num_beams == 1 else "beam_search")
    assert type(arguments["model_kwargs"]["past_key_values"]) is DynamicCache  # what the step itself has put there
    arguments = of["_get_logits_processor"].arguments
    assert isinstance(of["_get_logits_processor"].result, LogitsProcessorList)
    assert arguments["input_ids_seq_length"] == 3 and arguments["encoder_input_ids"].shape == (1, 3)
    assert (
        type(arguments["model_kwargs"]["past_key_values"]) is DynamicCache
        and "attention_mask" in arguments["model_kwargs"]
    )
    assert isinstance(of["_get_stopping_criteria"].result, StoppingCriteriaList)
    assert "logits" in of["_update_model_kwargs_for_generation"].arguments["outputs"]
    assert isinstance(of["_update_model_kwargs_for_generation"].result, dict)
    if num_beams > 1:
        assert of["_reorder_cache"].arguments["beam_idx"].shape == (2,)


@pytest.mark.contract("_prepare_generation_config")
def test_a_call_goes_first_then_its_config_then_the_models_own_and_what_is_no_setting_is_handed_back():
    model = stock()
    model.generation_config.update(top_k=7, max_length=9)
    given = GenerationConfig(top_p=0.5, max_length=8)
    config, rest = model._prepare_generation_config(given, max_length=6, attention_mask=1)
    assert (
        (config.max_length, config.top_p, config.top_k) == (6, 0.5, 7) and config is not given and given.top_k is None
    )
    assert rest["attention_mask"] == 1 and "max_length" not in rest


@pytest.mark.contract("_mask_length")
def test_without_a_mask_of_its_own_a_static_cache_keeps_the_masks_length():
    model, seen = stock(), []
    prepare = model._prepare_cache_for_generation
    model._prepare_cache_for_generation = lambda config, *rest: (
        seen.append(config._mask_length),
        prepare(config, *rest),
    )
    model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=2, cache_implementation="static", disable_compile=True)
    assert seen == [3]


@pytest.mark.contract("_get_default_generation_params")
def test_defaults_of_generation_are_a_table_by_name():
    defaults = GenerationConfig._get_default_generation_params()
    assert defaults["temperature"] == 1.0 and defaults["num_beams"] == 1 and GenerationConfig().temperature is None


@pytest.mark.contract("_is_user_defined")
def test_a_cache_that_a_user_gives_is_marked_and_none_that_generate_makes():
    model, cache = stock(), DynamicCache()
    settings = {
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
        "max_new_tokens": 2,
        "return_dict_in_generate": True,
    }
    own = model.generate(torch.tensor([[1, 5, 6]]), **settings).past_key_values
    model.generate(torch.tensor([[1, 5, 6]]), past_key_values=cache, **settings)
    assert cache._is_user_defined and not getattr(own, "_is_user_defined", False)


@pytest.mark.contract("DynamicLayer", "StaticLayer", "QuantizedCache.layers")
def test_layers_of_caches_have_these_fields():
    states = torch.zeros(1, 2, 3, 4)
    dynamic = DynamicCache(config=LlamaConfig(**SIZES))
    dynamic.update(states, states, 0)
    assert type(dynamic.layers[0]) is DynamicLayer and dynamic.layers[0].keys.shape == (1, 2, 3, 4)
    dynamic.crop(-1)
    assert dynamic.layers[0].keys.shape[2] == 2
    static = StaticCache(config=LlamaConfig(**SIZES), max_cache_len=5)
    static.update(states, states, 0)
    layer = static.layers[0]
    assert type(layer) is StaticLayer and layer.max_cache_len == 5 and layer.keys.shape[2] == 5
    assert torch.is_tensor(layer.cumulative_length) and int(layer.cumulative_length) == 3
    assert "layers" in inspect.getsource(QuantizedCache.__init__) and "num_hidden_layers" in inspect.getsource(
        QuantizedCache
    )


@pytest.mark.contract("per_layer_config")
def test_caches_have_a_layer_for_each_entry_of_per_layer_config():
    class Config(LlamaConfig):
        per_layer_config = property(lambda self: [LlamaConfig(**SIZES)] * 5, lambda self, value: None)

    config = Config(**SIZES)
    assert len(DynamicCache(config=config).layers) == len(StaticCache(config=config, max_cache_len=4).layers) == 5


@pytest.mark.contract(
    "ContinuousBatchingLogitsProcessor",
    "GenerationOutput",
    "RequestStatus",
    "_true_initial_tokens",
    "_cached_continuous_batching_manager",
    "ContinuousBatchingManager.add_request",
    "ContinuousBatchingLogitsProcessorList.tensors_required",
)
def test_continuous_batching_asks_processors_and_requests_like_this():
    seen = []

    class Watch(private.ContinuousBatchingLogitsProcessor):
        supported_kwargs, ignored_kwargs = {}, ()

        def fill_defaults(self, int32_tensor):
            seen.append(int32_tensor.dtype)
            int32_tensor.zero_()

        def prepare_tensor_args(self, requests_with_new_token):
            for future in requests_with_new_token:
                request = future.state
                seen.append((request.request_id, list(request.initial_tokens), list(request.generated_tokens)))
                assert request._true_initial_tokens == 0 and request.max_new_tokens == 3
            return torch.full((len(requests_with_new_token),), 4, dtype=torch.int32)

        def __call__(self, scores, tensor_arg):
            assert scores.ndim == 2 and tensor_arg.dtype == torch.int32
            chosen = torch.zeros_like(scores)
            chosen[:, 5] = 1
            return torch.where(tensor_arg[: len(scores), None] == 4, chosen, scores)

    class Model(LlamaForCausalLM):
        def _get_logits_processor(self, generation_config, input_ids_seq_length=None, **kwargs):
            assert input_ids_seq_length is None  # by which a JAM knows continuous batching
            return LogitsProcessorList([Watch()])

    batching = ContinuousBatchingConfig(page_size=8, num_blocks=8, max_batch_tokens=16, use_async_batching=False)
    model = stock(Model)
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(config, batching)
    names = list(inspect.signature(manager.add_request).parameters)
    assert names[:3] == ["input_ids", "request_id", "max_new_tokens"]
    processors = manager.logit_processor
    assert processors.tensors_required == 0  # it does not count those that a model brings
    processors.tensors_required = len(processors.logits_processor)
    manager.start()
    manager.add_request([1, 6], "one", 3)
    result = next(r for r in iter(lambda: manager.get_result(timeout=60), None) if r.is_finished())
    manager.stop(block=True)
    assert isinstance(result, private.GenerationOutput) and result.status == private.RequestStatus.FINISHED
    assert (result.request_id, result.prompt_ids, result.generated_tokens) == ("one", [1, 6], [5, 5, 5])
    assert torch.int32 in seen and ("one", [1, 6], [5]) in seen
    assert "_cached_continuous_batching_manager" in inspect.getsource(type(model).init_continuous_batching)


@pytest.mark.contract("is_flash_attention_requested")
def test_flash_attention_by_any_name():
    for name, asked in (
        ("flash_attention_2", True),
        ("kernels-community/flash-attn3", True),
        ("sdpa", False),
        ("eager", False),
    ):
        config = SimpleNamespace(_attn_implementation=name)
        assert carried.is_flash_attention_requested(config) is asked
