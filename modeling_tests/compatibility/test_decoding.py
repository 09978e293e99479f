"""Every way to decode that `generate()` knows, against full forwards without a cache (decoding_oracles.py)."""

import processes
import pytest
import torch
from conftest import random_ids
from decoding_oracles import BREAK, BY_MODE, CASES, beam_search, draw_beams, greedy, sample, unequal_streams
from transformers import AutoModelForCausalLM, LogitsProcessorList, TextIteratorStreamer
from transformers.generation import LogitsProcessor
from transformers.generation.streamers import BaseStreamer


SECTION = "Generation"
PLAIN = {"eos_token_id": None, "generation_mode": None}  # no end, and no grammar of pictures
GREEDY = {"do_sample": False, **PLAIN}
by_case = pytest.mark.parametrize(("family", "mode", "init"), CASES)
by_mode = pytest.mark.parametrize(("family", "mode", "init"), BY_MODE)


def _prompt(model, length=6, seed=0):
    return random_ids(model, 1, length, seed)


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "greedy decoding")
@pytest.mark.parametrize("use_cache", [True, False])
@by_case
def test_greedy(family, mode, init, use_cache, jam):
    model = jam(family, mode, init)
    ids = _prompt(model)
    output = model.generate(input_ids=ids, max_new_tokens=10, use_cache=use_cache, **GREEDY)
    assert output[0, 6:].tolist() == greedy(model, ids[0].tolist(), 10)
    assert len(set(output[0, 6:].tolist())) > 1


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "greedy decoding, streams of unequal heads and widths", modes=("cross",))
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("text_family", ["llama", "opt"])
def test_greedy_with_unequal_streams(text_family, use_cache):
    model = unequal_streams(text_family)
    ids = _prompt(model)
    output = model.generate(input_ids=ids, max_new_tokens=10, use_cache=use_cache, **GREEDY)
    assert output[0, 6:].tolist() == greedy(model, ids[0].tolist(), 10)


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "left padding")
@pytest.mark.parametrize("use_cache", [True, False])
@by_case
def test_a_batch_with_left_padding(family, mode, init, use_cache, jam):
    model = jam(family, mode, init)
    rows = [_prompt(model, length, seed=length)[0].tolist() for length in (3, 6, 8)]
    ids = torch.tensor([[0] * (8 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (8 - len(row)) + [1] * len(row) for row in rows])
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, use_cache=use_cache, **GREEDY)
    assert output[:, 8:].tolist() == [greedy(model, row, 6) for row in rows]


@pytest.mark.feature(SECTION, "sampling, several return sequences")
@by_case
def test_sampling_with_a_seed(family, mode, init, jam):
    model = jam(family, mode, init)
    ids = _prompt(model)
    torch.manual_seed(3)
    output = model.generate(
        input_ids=ids, do_sample=True, top_k=0, temperature=0.7, num_return_sequences=3, max_new_tokens=8, **PLAIN
    )
    torch.manual_seed(3)
    assert output.tolist() == sample(model, ids.repeat(3, 1), 8, temperature=0.7).tolist()
    assert len({tuple(row) for row in output.tolist()}) == 3


@pytest.mark.feature(SECTION, "beam search")
@by_case
def test_beam_search(family, mode, init, jam):
    model = jam(family, mode, init)
    prompts = [_prompt(model, seed=seed) for seed in (0, 1)]
    output = model.generate(
        input_ids=torch.cat(prompts),
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_scores=True,
        **GREEDY,
    )
    expected = [pair for ids in prompts for pair in beam_search(model, ids[0].tolist(), 3, 6)[:2]]
    assert output.sequences[:, 6:].tolist() == [ids for _, ids in expected]
    torch.testing.assert_close(output.sequences_scores, torch.tensor([s for s, _ in expected]), rtol=1e-4, atol=1e-4)


@pytest.mark.feature(SECTION, "beam search")
@by_mode
def test_beam_search_that_ends(family, mode, init, jam):
    """`early_stopping="never"` without a length penalty is the textbook's beam search; an <eos> that is likely ends
    beams.
    """
    model = jam(family, mode, init)
    ids = _prompt(model)
    end = beam_search(model, ids[0].tolist(), 4, 3)[1][1][1]
    settings = {
        "num_beams": 4,
        "early_stopping": "never",
        "length_penalty": 0.0,
        "max_new_tokens": 6,
        "do_sample": False,
    }
    output = model.generate(input_ids=ids, num_return_sequences=4, **settings, **(PLAIN | {"eos_token_id": end}))
    expected = [row for _, row in beam_search(model, ids[0].tolist(), 4, 6, end=end, length_penalty=0.0)]
    assert any(len(row) < 6 for row in expected)
    for row, wanted in zip(output[:, 6:].tolist(), expected):
        assert row[: len(wanted)] == wanted


@pytest.mark.feature(SECTION, "beam sampling")
@by_case
def test_beam_sampling(family, mode, init, jam):
    model = jam(family, mode, init)
    ids = _prompt(model)
    torch.manual_seed(11)
    output = model.generate(
        input_ids=ids, do_sample=True, top_k=0, num_beams=3, num_return_sequences=3, max_new_tokens=5, **PLAIN
    )
    torch.manual_seed(11)
    expected = beam_search(model, ids[0].tolist(), 3, 5, choose=draw_beams)
    assert output[:, 6:].tolist() == [row for _, row in expected]


HUB_MODES = {
    "group beam search": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "constrained beam search": {"force_words_ids": [[30]], "num_beams": 3},
    "DoLa": {"dola_layers": "low"},
}


@pytest.mark.feature(SECTION, "group beam, contrastive, constrained and DoLa decoding (Hub code)")
@by_mode
def test_what_moved_to_the_hub_is_refused_as_for_a_stock_llama(family, mode, init, jam, parents):
    model = jam(family, mode, init)
    parent = AutoModelForCausalLM.from_pretrained(parents("llama")[0])
    for name, settings in HUB_MODES.items():
        messages = []
        for candidate in (parent, model):
            with pytest.raises(ValueError, match="requires `trust_remote_code=True`") as error:
                candidate.generate(input_ids=_prompt(model), max_new_tokens=3, do_sample=False, **settings)
            messages.append(str(error.value))
        assert messages[0] == messages[1], name
    pytest.skip(
        "transformers 5 moved them to custom_generate repositories on the Hub; a stock Llama refuses them the same way"
    )


@pytest.mark.feature(SECTION, "custom_generate, own decoding loop")
@by_mode
def test_a_decoding_loop_of_ones_own(family, mode, init, jam):
    model = jam(family, mode, init)
    ids = _prompt(model)

    def least_likely(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        while not stopping_criteria(input_ids, None).all():
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=1 if kwargs["past_key_values"].get_seq_length() else None, **kwargs
            )
            output = model(**inputs)
            kwargs = model._update_model_kwargs_for_generation(output, kwargs)
            input_ids = torch.cat((input_ids, output.logits[:, -1:].argmin(-1)), dim=1)
        return input_ids

    output = model.generate(input_ids=ids, custom_generate=least_likely, max_new_tokens=5, **GREEDY)
    expected = greedy(model, ids[0].tolist(), 5, process=lambda _, scores: -scores)
    assert output[0, 6:].tolist() == expected


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "assisted decoding (a draft model)")
@pytest.mark.parametrize("draft", ["stock Llama", "small JAM", "itself"])
@by_mode
def test_assisted(family, mode, init, draft, jam, parents):
    model = jam(family, mode, init)
    if draft == "stock Llama":
        assistant = AutoModelForCausalLM.from_pretrained(parents("llama")[0]).eval()
    else:
        assistant = jam("llama", "uniform", "average") if draft == "small JAM" else jam(family, mode, init)
    assistant.generation_config.assistant_confidence_threshold = 0.0  # drafts of 20 ids, however unsure
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    ids = _prompt(model)
    output = model.generate(input_ids=ids, assistant_model=assistant, max_new_tokens=12, **GREEDY)
    hook.remove()
    assert output[0, 6:].tolist() == greedy(model, ids[0].tolist(), 12)
    if draft == "itself":
        assert len(calls) < 6  # its own drafts are taken


@pytest.mark.feature(SECTION, "assisted decoding (a draft model)")
@by_mode
def test_assisted_sampling_repeats_with_a_seed_and_draws_from_the_model(family, mode, init, jam, parents):
    """At a temperature near zero, speculative sampling can only draw the most likely ids."""
    model, assistant = jam(family, mode, init), AutoModelForCausalLM.from_pretrained(parents("llama")[0]).eval()
    ids = _prompt(model)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 8, "assistant_model": assistant, **PLAIN}
    torch.manual_seed(2)
    cold = model.generate(input_ids=ids, temperature=1e-3, **settings)
    assert cold[0, 6:].tolist() == greedy(model, ids[0].tolist(), 8)
    warm = []
    for _ in range(2):
        torch.manual_seed(4)
        warm.append(model.generate(input_ids=ids, temperature=2.0, **settings).tolist())
    assert warm[0] == warm[1] != cold.tolist()


@pytest.mark.feature(SECTION, "prompt-lookup decoding")
@by_case
def test_prompt_lookup(family, mode, init, jam):
    model = jam(family, mode, init)
    ids = _prompt(model, 4).repeat(1, 3)  # repeats itself, so that there is something to look up
    calls = []
    hook = model.register_forward_hook(lambda _, __, output: calls.append(output.logits.shape[1]))
    output = model.generate(input_ids=ids, prompt_lookup_num_tokens=3, max_new_tokens=10, **GREEDY)
    hook.remove()
    assert output[0, 12:].tolist() == greedy(model, ids[0].tolist(), 10)
    assert max(calls) == 4  # three ids looked up and one more


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "inputs_embeds")
@pytest.mark.parametrize("use_cache", [True, False])
@by_mode
def test_inputs_embeds(family, mode, init, use_cache, jam):
    model = jam(family, mode, init)
    ids = _prompt(model)
    embeds = model.get_input_embeddings()(ids)
    alone = model.generate(inputs_embeds=embeds, max_new_tokens=6, use_cache=use_cache, **GREEDY)
    both = model.generate(input_ids=ids, inputs_embeds=embeds, max_new_tokens=6, use_cache=use_cache, **GREEDY)
    expected = greedy(model, ids[0].tolist(), 6)
    assert alone[0].tolist() == expected
    assert both[0].tolist() == ids[0].tolist() + expected


@pytest.mark.feature(SECTION, "output_scores, output_logits, return_dict_in_generate")
@by_mode
def test_scores_and_logits_that_come_back(family, mode, init, jam):
    model = jam(family, mode, init)
    ids = _prompt(model)
    output = model.generate(
        input_ids=ids,
        max_new_tokens=5,
        output_scores=True,
        output_logits=True,
        repetition_penalty=1.3,
        return_dict_in_generate=True,
        **GREEDY,
    )
    full = model(input_ids=output.sequences, use_cache=False).logits[:, 5:-1].unbind(1)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(full), rtol=1e-4, atol=1e-4)
    for step, (logits, scores) in enumerate(zip(full, output.scores)):
        penalised = logits.clone()
        seen = output.sequences[0, : 6 + step].unique()
        seen = seen[(seen < model.config.image_token_offset) & (seen != BREAK)]  # codes and marks are not penalised
        penalised[0, seen] = torch.where(logits[0, seen] < 0, logits[0, seen] * 1.3, logits[0, seen] / 1.3)
        torch.testing.assert_close(scores, penalised, rtol=1e-4, atol=1e-4)
    transitions = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    assert transitions.shape == (1, 5) and (transitions <= 0).all()
    assert len(output.past_key_values.layers) == len(model.config.per_layer_config)


@pytest.mark.feature(SECTION, "output_hidden_states, output_attentions")
@by_mode
def test_states_and_attentions_that_come_back(family, mode, init, fused):
    model = AutoModelForCausalLM.from_pretrained(fused(family, mode, init), attn_implementation="eager").eval()
    output = model.generate(
        input_ids=_prompt(model),
        max_new_tokens=3,
        output_hidden_states=True,
        output_attentions=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    layers = model.config.num_hidden_layers
    full = model(input_ids=output.sequences[:, :-1], output_hidden_states=True, output_attentions=True, use_cache=False)
    for step, (states, attentions) in enumerate(zip(output.hidden_states, output.attentions)):
        places = slice(0, 6) if step == 0 else slice(5 + step, 6 + step)
        assert len(states) == layers + 1 and len(attentions) == layers
        for ours, theirs in zip(states, full.hidden_states):
            torch.testing.assert_close(ours, theirs[:, places], rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(attentions, full.attentions):
            torch.testing.assert_close(ours, theirs[:, :, places, : places.stop], rtol=1e-4, atol=1e-4)


class _Collector(BaseStreamer):
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.feature(SECTION, "streamers")
@by_mode
def test_streamers(family, mode, init, jam, tokenizer):
    model = jam(family, mode, init)
    ids, streamer = _prompt(model), _Collector()
    output = model.generate(input_ids=ids, max_new_tokens=6, streamer=streamer, **GREEDY)
    assert streamer.ended and streamer.ids == output[0].tolist() == ids[0].tolist() + greedy(model, ids[0].tolist(), 6)
    text = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=processes.PATIENCE)
    model.generate(input_ids=ids, max_new_tokens=6, streamer=text, **GREEDY)
    assert "".join(text) == tokenizer.decode(output[0, 6:])


@pytest.mark.feature(SECTION, "stop strings")
@by_mode
def test_stop_strings(family, mode, init, jam, tokenizer):
    model = jam(family, mode, init)
    ids = _prompt(model)
    written = greedy(model, ids[0].tolist(), 12)
    stop = next(word for word in map(tokenizer.decode, written[2:]) if "\N{REPLACEMENT CHARACTER}" not in word)
    output = model.generate(input_ids=ids, max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer, **GREEDY)
    expected = next(end for end in range(1, 13) if stop in tokenizer.decode(written[:end]))
    assert output[0, 6:].tolist() == written[:expected] and expected < 12


class _Shift(LogitsProcessor):
    """Moves the scores by a step that depends on what was written."""

    def __call__(self, input_ids, scores):
        return scores.roll(1 + int(input_ids[0, -1]) % 5, dims=-1)


@pytest.mark.feature(SECTION, "custom logits processors and stopping criteria")
@by_mode
def test_a_logits_processor_and_a_stopping_criterion_of_ones_own(family, mode, init, jam):
    model = jam(family, mode, init)
    ids = _prompt(model)
    output = model.generate(
        input_ids=ids,
        max_new_tokens=20,
        logits_processor=LogitsProcessorList([_Shift()]),
        stopping_criteria=[lambda ids, scores, **_: torch.full((ids.shape[0],), ids.shape[1] >= 13)],
        **GREEDY,
    )
    assert output[0, 6:].tolist() == greedy(model, ids[0].tolist(), 7, process=_Shift())
