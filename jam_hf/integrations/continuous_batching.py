"""Pictures under transformers' continuous batching (`generate_batch`): the grammar, request by request.

There a processor sees the last id of each request only. The grammar's states are kept on the host beside the requests,
and each
step tells the device one number a request: the kind of set its next id comes from. What continuous batching cannot do
for a JAM
is refused here with the reason: it has no branch beside a request, so nothing is guided.

Shape suffixes: R requests with a new id, V vocabulary.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.generation.continuous_batching import ContinuousMixin

from ..model.call_settings_jam import JamCallSettings, end_ids
from ..model.families_jam import family_of
from ..model.grammar_jam import DocumentRules, PictureGrammar, PictureState, as_ids
from .continuous_settings import PAGE_SIZE, check_model, check_rotation, check_settings, num_pages, sized
from .padded_batches import generate_padded
from .private import ContinuousBatchingLogitsProcessor


NEW_TOKENS_BY_DEFAULT = 20  # transformers' default of max_length, which generate() counts from the prompt's end


class PictureGrammarContinuousLogitsProcessor(ContinuousBatchingLogitsProcessor):
    """`PictureGrammarLogitsProcessor` for a batch whose requests come and go, each with a length of its own."""

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, grammar: PictureGrammar, rules: DocumentRules, max_positions: int):
        """`max_positions`: ids that the model can read, beyond which no picture may reach."""
        self.grammar, self.rules, self.max_positions = grammar, rules, max_positions
        self._read: tuple[list[tuple[str, int]], PictureState] | None = (
            None  # requests and lengths, and their states [R]
        )

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """int32 `[R]`: the kind of set from which each request's next id comes (`PictureGrammar.kinds`)."""
        requests = [future.state for future in requests_with_new_token]
        if not requests:
            return torch.zeros(0, dtype=torch.int32)
        read = [(r.request_id, len(r.initial_tokens) + len(r.generated_tokens)) for r in requests]
        if self._read is not None and read == [(name, length + 1) for name, length in self._read[0]]:
            last = torch.tensor([(r.generated_tokens or r.initial_tokens)[-1] for r in requests])
            state = self.grammar.advance(self._read[1], last)
        else:
            state = PictureState(*map(torch.cat, zip(*map(self._state, requests))))
        self._read = (read, state)
        return self.grammar.kinds(state, self.rules).to(torch.int32)

    def _state(self, request: Any) -> PictureState:
        """Of one request, `[1]`, from all its ids. One that was set back has its first ids in `initial_tokens`."""
        ids = [*request.initial_tokens, *request.generated_tokens]
        room = self.max_positions - len(ids)
        if request.max_new_tokens is not None:
            room = min(room, request.max_new_tokens - len(request.generated_tokens))
        prompt_length = request._true_initial_tokens or len(request.initial_tokens)
        return self.grammar.state(torch.tensor([ids], dtype=torch.int64), prompt_length, room)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """float `[R, V]` and int32 `[R or more]` -> float `[R, V]`."""
        return self.grammar.masked(scores, tensor_arg[: scores.shape[0]].to(torch.int64))


def generate_batch(
    model: Any,
    inputs: list[list[int]],
    generation_config: Any = None,
    continuous_batching_config: Any = None,
    **kwargs: Any,
) -> Any:
    """As in `ContinuousMixin`; a JAM's settings stand in `generation_config`, or in the model's own.

    What neither says is as in `generate()`. On a CPU the requests are written by `generate()`, in padded batches
    (padded_batches.py), unless a `continuous_batching_config`, `persistent_manager` or `record_timestamps` asks for
    transformers' pages. Pools and batches are as large as these requests need, at most a quarter of the memory that is
    free, where `continuous_batching_config` does not say otherwise.

    Raises:
        ValueError: on arguments and settings that would be passed over, placeholders `<image>`, and what is not served
            (see `init_continuous_batching`).
    """
    kwargs["continuous_batching_config"] = continuous_batching_config
    known = ("continuous_batching_config", "record_timestamps", "progress_bar", "persistent_manager", "warmup")
    if unknown := set(kwargs) - {*known, "max_new_tokens"}:
        raise ValueError(
            f"generate_batch does not take {', '.join(sorted(unknown))}. Settings of generation go into "
            "generation_config=GenerationConfig(...)."
        )
    config = _complete_config(model, generation_config)
    check_settings(config, JamCallSettings.said({}, config, model.generation_config))
    settings = model.call_settings(config)
    check_model(model.config)
    inputs = [_prompt(ids, model.config, f"Prompt {number}") for number, ids in enumerate(inputs)]
    positions, rules = model.config.max_position_embeddings, settings.rules()
    grammar = PictureGrammar(model.config)
    if rules is not None:
        grammar.check_rules(rules)
    budgets = []
    for ids in inputs:  # before anything runs: there an error would be logged and its requests be missing
        budget = _budget(config, rules is None, model.config, ids, kwargs.get("max_new_tokens"))
        if rules is not None:
            grammar.check_room(rules, min(positions - len(ids), budget), torch.tensor([ids], dtype=torch.int64))
        budgets.append(budget)
    if not inputs:
        return {}
    lengths = [len(ids) + budget for ids, budget in zip(inputs, budgets)]
    check_rotation(model.config, max(lengths))
    batching = kwargs.pop("continuous_batching_config", None) or config.continuous_batching_config
    asks_for_pages = batching is not None or kwargs.get("persistent_manager") or kwargs.get("record_timestamps")
    if model.device.type == "cpu" and not asks_for_pages:
        tokens = PAGE_SIZE * num_pages(model.config, model.dtype, model.device, lengths)
        with _evaluated(model):
            return generate_padded(model, inputs, budgets, config, tokens, kwargs.get("progress_bar", False))
    lengths = [length for length in lengths for _ in range(config.num_return_sequences or 1)]
    batching = sized(batching, model.config, model.dtype, model.device, lengths)
    with _evaluated(model):
        return ContinuousMixin.generate_batch(model, inputs, config, batching, **kwargs)


def init_continuous_batching(
    model: Any, generation_config: Any = None, continuous_batching_config: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """As in `ContinuousMixin`. Pools are sized for sixteen documents of full length, within a quarter of the memory
    that is free, where `continuous_batching_config` does not say otherwise.

    Raises:
        ValueError: on settings that would be passed over (continuous_settings.py), windows, streams with unlike heads,
            asynchronous batching of pictures, and a manager that was kept (`persistent_manager`) with other settings.
    """
    config = _complete_config(model, generation_config)
    check_settings(config, JamCallSettings.said({}, config, model.generation_config))
    settings = model.call_settings(config)
    check_model(model.config)
    kept = getattr(model, "_cached_continuous_batching_manager", None)
    if kept is not None:
        _check_same_settings(kept.generation_config, config)
        return ContinuousMixin.init_continuous_batching(model, config, continuous_batching_config, *args, **kwargs)
    batching = continuous_batching_config or config.continuous_batching_config
    batching = sized(batching, model.config, model.dtype, model.device, [model.config.max_position_embeddings] * 16)
    if settings.generation_mode is not None:
        # Asynchronous batches are prepared before the ids of the last one are known.
        if batching.use_async_batching:
            raise ValueError(
                "generation_mode needs each id before the next step: set use_async_batching=False, or None."
            )
        batching.use_async_batching = False
    manager = ContinuousMixin.init_continuous_batching(model, config, batching, *args, **kwargs)
    # transformers counts the processors that it has made itself from others; each gets a row of numbers.
    processors = manager.logit_processor
    processors.tensors_required = sum(
        isinstance(processor, ContinuousBatchingLogitsProcessor) for processor in processors.logits_processor
    )
    _bound_requests(model, manager, config, settings.generation_mode is None)
    return manager


def _bound_requests(model: Any, manager: Any, config: Any, plain: bool) -> None:
    """`max_length`, and where nothing bounds a document the model's positions, as in `generate()`: both depend on the
    prompt, and continuous batching knows `max_new_tokens` alone."""
    add_request = manager.add_request

    @functools.wraps(add_request)
    def bounded(
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> str | None:
        input_ids = _prompt(input_ids, model.config, "The prompt" if request_id is None else f"Prompt {request_id}")
        budget = _budget(config, plain, model.config, input_ids, max_new_tokens)
        check_rotation(model.config, len(input_ids) + budget)
        return add_request(input_ids, request_id, budget, *args, **kwargs)

    manager.add_request = bounded


def _complete_config(model: Any, generation_config: Any) -> Any:
    """A complete copy, as `generate()` makes it; continuous batching asks the model's own config for nothing."""
    said = any(
        getattr(config, "max_length", None) is not None for config in (generation_config, model.generation_config)
    )
    config, _ = model._prepare_generation_config(generation_config)
    if not said:  # a default of transformers' that counts from the prompt's end
        config.max_length = None
    if config.eos_token_id is None:
        config.eos_token_id = -1
    return config


def continuous_grammar(model: Any, generation_config: Any) -> list[PictureGrammarContinuousLogitsProcessor]:
    """None, or the one of the grammar, where this is not a call of `generate()`."""
    rules = model.call_settings(generation_config).rules()
    if rules is None:
        return []
    grammar = PictureGrammar(model.config, end_ids(generation_config.eos_token_id))
    return [PictureGrammarContinuousLogitsProcessor(grammar, rules, model.config.max_position_embeddings)]


def _prompt(ids: Any, config: Any, name: str) -> list[int]:
    """A request's ids as transformers wants them, of a list, an array or a tensor of one dimension.

    Raises:
        ValueError: unless there is one at least, all are whole numbers of the vocabulary, and none stands for a picture
            or for padding.
    """
    try:
        row = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} must be a list of token ids, got {type(ids).__name__}: {error}") from error
    if row.ndim != 1 or not len(row):
        raise ValueError(
            f"{name} must be a list of token ids, one at least (bos, id {config.bos_token_id}), got shape "
            f"{tuple(row.shape)}. generate_batch takes one list a request."
        )
    found = as_ids(row, name).tolist()
    if outside := [token for token in found if not 0 <= token < config.vocab_size]:
        raise ValueError(f"{name} has the id {outside[0]}; the model has ids 0 to {config.vocab_size - 1}.")
    if config.image_token_id in found:
        raise ValueError(
            f"{name} has placeholders <image>, and generate_batch takes ids only. Put the codes of the pictures in "
            "their place: model.model.insert_image_tokens(input_ids, pixel_values)."
        )
    pad = config.pad_token_id
    if pad in (found[0], found[-1]) and pad not in (config.bos_token_id, *end_ids(config.eos_token_id)):
        raise ValueError(
            f"{name} begins or ends with padding (id {pad}), which would be read. Give the ids without it."
        )
    return found


def _budget(settings: Any, plain: bool, config: Any, input_ids: list[int], max_new_tokens: int | None) -> int:
    """Ids to be written after a prompt; `max_new_tokens` goes first, and where nothing was said it is as in
    `generate()`. `plain`: without a grammar.

    Raises:
        ValueError: if there is no room for one, or the model has no positions for all.
    """
    positions = config.max_position_embeddings
    budget = settings.max_new_tokens if max_new_tokens is None else max_new_tokens
    if budget is None and settings.max_length is not None:
        budget = settings.max_length - len(input_ids)
    elif budget is None and not plain:
        budget = positions - len(input_ids)
    elif budget is None:
        budget = NEW_TOKENS_BY_DEFAULT
    try:
        budget = operator.index(budget)
    except TypeError as error:
        raise ValueError(f"max_new_tokens must be a whole number, got {budget!r}.") from error
    learned = any(family_of(decoder).learned_positions for decoder in config.decoder_configs)
    if budget < 1 or (learned and len(input_ids) + budget - 1 > positions):  # the last id is not read
        raise ValueError(
            f"A prompt of {len(input_ids)} ids leaves no room to write {max(budget, 1)}: max_new_tokens="
            f"{settings.max_new_tokens if max_new_tokens is None else max_new_tokens}, "
            f"max_length={settings.max_length}, and the model has {positions} positions."
        )
    return budget


@contextmanager
def _evaluated(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout; behind it each part is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_same_settings(kept: Any, config: Any) -> None:
    """Raises a `ValueError` where a manager that was kept goes by other settings: transformers would go on with
    those.
    """
    before, now = ({n: v for n, v in vars(c).items() if not n.startswith("_")} for c in (kept, config))
    if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        raise ValueError(
            f"A manager is kept from an earlier call (persistent_manager) with other settings: {', '.join(changed)}. "
            "Call model.destroy_cached_continuous_batching_manager() first."
        )


__all__ = [
    "PictureGrammarContinuousLogitsProcessor",
    "continuous_grammar",
    "generate_batch",
    "init_continuous_batching",
]
