"""trl's SFTTrainer, as it is, on chats with text and pictures in them: what it learns from, and that it learns.

trl puts its own `forward` in place of the model's. The oracle is torch's cross-entropy on the model's own logits, with
the codes of the pictures as targets.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_ids
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForCausalLM

from jam_hf import JamForCausalLM
from jam_hf.training.adapters import lora_config


trl = pytest.importorskip("trl")

ON_CPU = {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False}
MODES = [("uniform", "average"), ("width", "copy"), ("cross", "preserving"), ("cross", "paper")]
every_mode = pytest.mark.parametrize(("mode", "init"), MODES)


def pictures(count: int) -> list[Image.Image]:
    """Noise of different brightness: pictures with different codes."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 40 + 200 * i // count, (16, 16, 3)).astype(np.uint8), mode="RGB")
        for i in range(count)
    ]


def chats(count: int = 4) -> Dataset:
    """Interleaved both ways: the user shows a picture, the assistant answers with text, a picture and text."""
    rows = []
    shown = pictures(2 * count)
    for i in range(count):
        question = [{"type": "text", "text": "like"}, {"type": "image", "text": None}, {"type": "text", "text": "?"}]
        answer = [{"type": "text", "text": "red"}, {"type": "image", "text": None}, {"type": "text", "text": "so"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": shown[2 * i : 2 * i + 2]})
    return Dataset.from_list(rows)


def trainer(model, processor, tmp_path, dataset=None, max_steps=4, peft_config=None, **settings):
    settings = {"assistant_only_loss": True, "learning_rate": 1e-2, "activation_checkpointing": False, **settings}
    arguments = trl.SFTConfig(
        str(tmp_path / "out"),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        **ON_CPU,
        **settings,
    )
    return trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=chats() if dataset is None else dataset,
        processing_class=processor,
        peft_config=peft_config,
    )


def losses(run) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


@torch.no_grad()
def oracle(model: JamForCausalLM, batch: dict) -> torch.Tensor:
    """Mean cross-entropy of text and codes, from logits and codes alone."""
    codes = model.get_image_tokens(batch["pixel_values"]).flatten()
    ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    places = ids == model.config.image_token_id
    ids[places] = codes
    labels[places & (labels != -100)] = ids[places & (labels != -100)]
    logits = JamForCausalLM.forward(model, input_ids=ids, attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.sampled
@pytest.mark.feature("trl", "SFTTrainer on interleaved chats")
@every_mode
@pytest.mark.parametrize("assistant_only", [True, False], ids=["assistant only", "all"])
def test_the_loss_is_that_of_the_models_own_logits_and_codes(assistant_only, mode, init, jam, processor, tmp_path):
    model = jam("llama", mode, init)
    run = trainer(model, processor, tmp_path, assistant_only_loss=assistant_only)
    batch = run.data_collator([run.train_dataset[i] for i in range(4)])
    image_token = model.config.image_token_id
    counts = [(batch["labels"][i] == image_token).sum().item() for i in range(4)]
    assert counts == [16 if assistant_only else 32] * 4
    assert len(model.get_image_tokens(batch["pixel_values"]).unique()) > 2
    model.eval()
    with torch.no_grad():
        loss = run.compute_loss(model, dict(batch))
        torch.testing.assert_close(loss, oracle(model, batch), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(**batch).loss, loss, rtol=1e-5, atol=1e-5)  # plain calls are what they were


@pytest.mark.feature("trl", "SFTTrainer on interleaved chats")
@every_mode
def test_the_loss_falls_and_the_vq_model_stays(mode, init, jam, processor, tmp_path):
    model = jam("llama", mode, init)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run = trainer(model, processor, tmp_path, max_steps=4, activation_checkpointing=True)
    run.train()
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    for name, parameter in model.named_parameters():
        if "vq_model" in name:
            assert torch.equal(parameter, before[name]), name
    if model.image_head is not None:
        assert not torch.equal(model.image_head.weight, before["image_head.weight"])
    run.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(saved, JamForCausalLM)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in saved.state_dict().items())


@pytest.mark.feature("trl", "SFTTrainer with a LoRA (peft_config)")
@every_mode
def test_an_adapter_is_trained_alone(mode, init, jam, processor, tmp_path):
    model = jam("llama", mode, init)
    run = trainer(model, processor, tmp_path, max_steps=4, peft_config=lora_config(model, r=4), learning_rate=5e-2)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    batch = run.data_collator([run.train_dataset[i] for i in range(4)])
    run.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(run.compute_loss(run.model, dict(batch)), oracle(model, batch), rtol=1e-5, atol=1e-5)
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 0.1
    moved = {name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name}


@pytest.mark.feature("trl", "SFTTrainer on text")
@every_mode
def test_text_alone_is_learned_by_the_models_own_logits(mode, init, jam, processor, tmp_path):
    model = jam("llama", mode, init)
    rows = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "red"}]] * 4
    run = trainer(model, processor.tokenizer, tmp_path, Dataset.from_dict({"messages": rows}), max_steps=3)
    batch = run.data_collator([run.train_dataset[i] for i in range(4)])
    model.eval()
    with torch.no_grad():
        logits = JamForCausalLM.forward(model, batch["input_ids"], batch.get("attention_mask")).logits
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        torch.testing.assert_close(run.compute_loss(model, dict(batch)), expected, rtol=1e-5, atol=1e-5)
    run.train()
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.feature("trl", "token statistics (log-probabilities, entropy) at a temperature")
@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_statistics_are_those_that_trl_has_for_a_stock_model(family, parents, fused):
    """A uniform JAM is a stock decoder: trl's own arithmetic on the same decoder must say the same."""
    from trl.trainer.utils import add_fused_lm_head

    model = JamForCausalLM.from_pretrained(fused(family, "uniform", "average")).eval()
    stock = AutoModelForCausalLM.from_pretrained(parents(family)[0]).eval()
    decoder = stock.model if family == "llama" else stock.model.decoder
    decoder.load_state_dict(model.model.language_model.state_dict())
    stock.lm_head.load_state_dict(model.lm_head.state_dict())
    ids = random_ids(model, 2, 9)
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    results = []
    for candidate in (stock, model):
        add_fused_lm_head(candidate, temperature=0.7, outputs=names)
        results.append(candidate(input_ids=ids, labels=labels, fused_lm_head=True, num_items_in_batch=5))
    for name in (*names, "loss", "label_mask"):
        expected = results[0][name]
        tolerance = {} if expected.dtype == torch.bool else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(results[1][name].to(expected.dtype), expected, **tolerance)
    with pytest.raises(ValueError, match="not `shift_labels`"):
        model(input_ids=ids, shift_labels=labels, fused_lm_head=True)


def test_without_the_package_trls_loss_is_refused(jam, monkeypatch):
    """As in a folder loaded without jam_hf: trl's own arithmetic would be wrong without a word."""
    from trl.trainer.utils import add_fused_lm_head

    monkeypatch.setattr("jam_hf.model.package_jam.OFFERED", {})
    model = jam("llama", "cross", "preserving")
    with pytest.raises(ImportError, match="Training by trl needs the package jam_hf"):
        add_fused_lm_head(model)
    model.forward = model.forward  # what is not trl's is kept, as by any module


def test_preferences_take_the_codes_of_pictures_for_ids(jam, processor, tmp_path):
    """DPO makes its labels of `input_ids` itself. Before the first step policy and reference are one: the loss is
    log 2.
    """
    model = jam("llama", "cross", "preserving", alive=False)
    question = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "?"}]}]
    answers = {"chosen": "red", "rejected": "a ruby"}
    sides = {n: [{"role": "assistant", "content": [{"type": "text", "text": t}]}] for n, t in answers.items()}
    rows = [{"prompt": question, **sides, "images": [picture]} for picture in pictures(4)]
    arguments = trl.DPOConfig(
        str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        activation_checkpointing=False,
        learning_rate=0.0,
        **ON_CPU,
    )
    run = trl.DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=processor)
    batch = run._prepare_inputs(run.data_collator([run.train_dataset[i] for i in range(4)]))
    assert "pixel_values" not in batch and not bool((batch["input_ids"] == model.config.image_token_id).any())
    run.train()
    assert losses(run) == pytest.approx([np.log(2)] * 2, rel=1e-4)


def test_answers_rated_alone_have_the_codes_of_pictures_in_every_batch(jam, processor, tmp_path):
    """KTO compares each prompt with another's answer, too. Before the first step policy and reference are one: 1
    / 2.
    """
    question = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "?"}]}]
    answers = ("red", "a ruby", "red", "a ruby is red")
    sides = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in answers]
    rows = [
        {"prompt": question, "completion": side, "label": i % 2 == 0, "images": [picture]}
        for i, (side, picture) in enumerate(zip(sides, pictures(4)))
    ]
    arguments = trl.KTOConfig(
        str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=4,
        activation_checkpointing=False,
        learning_rate=0.0,
        **ON_CPU,
    )
    model = jam("llama", "cross", "preserving", alive=False)
    run = trl.KTOTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=processor)
    raw = run.data_collator([run.train_dataset[i] for i in range(4)])
    batch = run._prepare_inputs(raw)
    for name in ("input_ids", "KL_input_ids"):
        assert torch.equal(batch[name], model.model.insert_image_tokens(raw[name], raw["pixel_values"]))
    run.train()
    assert losses(run) == pytest.approx([0.5], rel=1e-4)


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_rewarded_answers_have_the_probabilities_of_full_documents(kind, jam, processor, tmp_path):
    """They prepare prompts where other trainers prepare batches, write answers, and need the pixels once more."""
    model = jam("llama", "cross", "preserving")
    rows = []
    for count, picture in zip((0, 1, 2, 1), pictures(4)):  # pictures in the prompt
        content = [*[{"type": "image", "text": None}] * count, {"type": "text", "text": "a ruby"}]
        rows.append({"prompt": [{"role": "user", "content": content}], "images": [picture] * count})
    arguments = getattr(trl, f"{kind}Config")(
        str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=24,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        learning_rate=0.0,
    )
    run = getattr(trl, f"{kind}Trainer")(
        model,
        reward_funcs=lambda completions, **kwargs: [float(i) for i in range(len(completions))],
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    calls, stock = [], run._get_per_token_logps_and_entropies

    def watched(model, ids, mask, kept, *args, **kwargs):
        answer = stock(model, ids, mask, kept, *args, **kwargs)
        calls.append((model, ids, mask.bool(), kept, kwargs.get("pixel_values"), answer[0].detach()))
        return answer

    run._get_per_token_logps_and_entropies = watched
    run.train()
    assert calls
    for asked, ids, mask, kept, pixels, found in calls:  # of the reference model too
        ids = ids if pixels is None else model.model.insert_image_tokens(ids, pixels)
        for row in range(len(ids)):
            document = ids[row][mask[row]]
            with torch.no_grad():
                expected = JamForCausalLM.forward(asked, document[None]).logits[0, :-1].log_softmax(-1)
            expected = expected.gather(1, document[1:, None])[-int(mask[row, -kept:].sum()) :, 0]
            torch.testing.assert_close(found[row][mask[row, -kept:]], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.feature("trl", "assistant_only_loss (mask of the assistant's tokens)")
def test_the_chat_template_marks_what_the_assistant_writes(processor):
    messages = [
        {"role": "system", "content": "be red"},
        {"role": "user", "content": [{"type": "image", "image": pictures(1)[0]}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "see"}, {"type": "image", "image": pictures(1)[0]}]},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "no"},
    ]
    output = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    ids, mask = output["input_ids"][0], output["assistant_masks"][0].bool()
    picture = "<break>" + "<image>" * 16 + "<break>"
    assert processor.tokenizer.decode(ids[mask]) == f"see{picture}</s>no</s>"
    rest = f"<s><|system|>be red<|user|>{picture}?<|assistant|><|user|>more<|assistant|>"
    assert processor.tokenizer.decode(ids[~mask]) == rest


def test_placeholders_without_their_pictures_are_not_learned(jam, processor, tmp_path):
    model = jam("llama", "cross", "preserving")
    run = trainer(model, processor, tmp_path)
    batch = run.data_collator([run.train_dataset[0]])
    batch.pop("pixel_values")
    with pytest.raises(ValueError, match="no pixel_values came with them"):
        run.compute_loss(model, dict(batch))
    short = trainer(model, processor, tmp_path, max_length=12)
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):  # transformers' own, from the processor
        short.data_collator([short.train_dataset[0]])
