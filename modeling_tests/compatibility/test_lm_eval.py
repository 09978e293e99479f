"""lm_eval on a JAM, from a folder and from a model in memory, with task files of our own: no network, text only.

The oracle of a log-likelihood is one forward over context and continuation; of a completion, an uncached greedy loop.
"""

import json
from pathlib import Path

import pytest
import torch
from datasets import disable_caching

from jam_hf import JamForCausalLM
from jam_hf.evaluation.lm_eval_model import harness_model


lm_eval = pytest.importorskip("lm_eval")
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


TASKS = Path(__file__).parent / "lm_eval_tasks"
ROWS = [json.loads(line) for line in (TASKS / "colours.jsonl").read_text().splitlines()]
every_mode = pytest.mark.parametrize(
    ("mode", "init"), [("uniform", "average"), ("width", "copy"), ("cross", "preserving")]
)


@pytest.fixture(scope="module")
def tasks():
    return TaskManager(include_path=str(TASKS), include_defaults=False)


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    """The task files name their data from the root of the repository; what is cached goes to a folder of the test."""
    monkeypatch.chdir(TASKS.parents[2])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    disable_caching()


def evaluate(model, task: str, tasks: TaskManager) -> dict:
    return lm_eval.simple_evaluate(
        model=model, tasks=[task], task_manager=tasks, bootstrap_iters=0, batch_size=3, verbosity="ERROR"
    )


@torch.no_grad()
def log_likelihood(model: JamForCausalLM, tokenizer, context: str, continuation: str) -> tuple[float, int]:
    """Of `continuation` after `context`, in nats, and its number of tokens."""
    start, ids = tokenizer(context)["input_ids"], tokenizer(context + continuation)["input_ids"]
    assert ids[: len(start)] == start and ids[0] == tokenizer.bos_token_id
    logs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return sum(logs[i - 1, ids[i]].item() for i in range(len(start), len(ids))), len(ids) - len(start)


@pytest.mark.feature("lm_eval", "multiple choice")
@every_mode
def test_log_likelihoods_are_those_of_a_plain_forward(mode, init, jam, tokenizer, tasks, tmp_path):
    model = jam("llama", mode, init)
    model.save_pretrained(tmp_path / "jam")
    tokenizer.save_pretrained(tmp_path / "jam")
    harness = HFLM(pretrained=str(tmp_path / "jam"), device="cpu", dtype="float32", batch_size=3)
    assert isinstance(harness.model, JamForCausalLM) and harness.backend == "causal" and harness.max_length == 128
    results = evaluate(harness, "jam_choices", tasks)
    right = 0
    samples = sorted(results["samples"]["jam_choices"], key=lambda sample: sample["doc_id"])
    for sample, row in zip(samples, ROWS, strict=True):
        expected = [log_likelihood(model, tokenizer, row["question"], f" {choice}")[0] for choice in row["choices"]]
        found = [float(answer[0][0]) for answer in sample["resps"]]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-3)
        right += max(range(3), key=expected.__getitem__) == row["answer"]
    assert results["results"]["jam_choices"]["acc,none"] == right / len(ROWS)


@pytest.mark.feature("lm_eval", "generation (generate_until)")
@every_mode
def test_completions_are_those_of_an_uncached_greedy_loop(mode, init, jam, tokenizer, tasks):
    model = jam("llama", mode, init)
    results = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3), "jam_completions", tasks)
    first = model.config.image_token_offset
    no_text = [
        *range(first, len(tokenizer)),
        *tokenizer.convert_tokens_to_ids(["<pad>", "<break>", "<image>", "<mask>"]),
    ]
    no_text += tokenizer.convert_tokens_to_ids([f"<mask:{i}>" for i in range(1, 8)] + ["</mask>"])
    samples = sorted(results["samples"]["jam_completions"], key=lambda sample: sample["doc_id"])
    for sample, row in zip(samples, ROWS, strict=True):
        ids = tokenizer(row["question"])["input_ids"]
        start = len(ids)
        with torch.no_grad():
            for _ in range(8):
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                logits[no_text] = float("-inf")  # the task asks for generation_mode="text"
                ids.append(int(logits.argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
        expected = tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert sample["resps"][0][0] == expected.split(".")[0]
    assert "exact_match,none" in results["results"]["jam_completions"]


@pytest.mark.feature("lm_eval", "by the model's folder (model='hf')")
def test_a_folder_is_enough(fused, tasks):
    folder = fused("llama", "cross", "preserving")
    arguments = {"pretrained": str(folder), "dtype": "float32", "device": "cpu"}
    by_folder, by_model = (
        lm_eval.simple_evaluate(
            model=model,
            model_args=extra,
            tasks=["jam_choices"],
            task_manager=tasks,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
        for model, extra in (("hf", arguments), (HFLM(**{**arguments, "batch_size": 2}), None))
    )
    assert by_folder["results"]["jam_choices"]["acc,none"] == by_model["results"]["jam_choices"]["acc,none"]
    assert by_folder["results"]["jam_choices"]["sample_len"] == len(ROWS)


@pytest.mark.feature("lm_eval", "image codes in or out of the softmax, as certify has it")
@pytest.mark.parametrize("softmax", ["text", "all"])
def test_codes_are_in_or_out_of_the_softmax(softmax, jam, tokenizer):
    model = jam("llama", "cross", "preserving")
    asked = {"softmax": "all"} if softmax == "all" else {}  # text is what certify has where nothing is said
    harness = harness_model(model, tokenizer, **asked, batch_size=1)
    ids = torch.tensor([tokenizer("a small red circle")["input_ids"]])
    found = torch.log_softmax(harness._model_call(ids), -1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    first = model.config.image_token_offset
    text = [i for i in range(model.config.vocab_size) if softmax == "all" or not first <= i < first + 16]
    torch.testing.assert_close(found[..., text], logits[..., text].log_softmax(-1))
    with pytest.raises(ValueError, match="softmax must be 'text'"):
        harness_model(model, tokenizer, softmax="codes")
