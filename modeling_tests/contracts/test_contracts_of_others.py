"""What JAM relies on inside trainers, tokenizers, torch, diffusers, peft and trl: a failure here says what moved."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    trainer,
)

from jam_hf.integrations import private
from jam_hf.model import transformers_private_jam as carried
from jam_hf.model.modeling_jam import is_trl_forward


SIZES = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "</s>": 2}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.contract("_prepare_inputs", "_get_train_sampler")
def test_a_trainer_prepares_each_batch_and_asks_for_its_sampler(tmp_path):
    calls = []

    class Watched(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            calls.append("sampler")
            return super()._get_train_sampler(train_dataset)

        def _prepare_inputs(self, inputs):
            prepared = super()._prepare_inputs(inputs)
            assert isinstance(prepared, dict) and set(prepared) == {"input_ids", "labels"}
            calls.append("inputs")
            return prepared

    ids = torch.tensor([1, 5, 6])
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        report_to=[],
        use_cpu=True,
        label_smoothing_factor=0.1,
        disable_tqdm=True,
        save_strategy="no",
    )
    run = Watched(LlamaForCausalLM(LlamaConfig(**SIZES)), arguments, train_dataset=[{"input_ids": ids, "labels": ids}])
    run.train()
    assert calls == ["sampler", "inputs"]
    assert isinstance(run.label_smoother, trainer.LabelSmoother) and run.args.include_for_metrics == []
    assert "shift_labels" in inspect.signature(trainer.LabelSmoother.__call__).parameters
    assert "self._get_train_sampler" in inspect.getsource(Trainer.get_train_dataloader)


@pytest.mark.contract("create_model_card", "create_or_update_model_card", "_BaseTrainer")
def test_who_writes_cards_and_where_to():
    from peft import PeftModel

    assert "output_dir" in inspect.getsource(Trainer.create_model_card)
    assert list(inspect.signature(PeftModel.create_or_update_model_card).parameters) == ["self", "output_dir"]
    base = pytest.importorskip("trl.trainer.base_trainer")
    assert "create_model_card" in vars(getattr(base, "_BaseTrainer", None) or base.BaseTrainer)


@pytest.mark.contract("fused_lm_head")
def test_trl_puts_a_forward_in_place_that_is_known_by_its_signature_and_keeps_its_temperature():
    utils = pytest.importorskip("trl.trainer.utils")
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert not is_trl_forward(model.forward)
    utils.add_fused_lm_head(model, temperature=0.7)
    assert is_trl_forward(model.forward)
    assert inspect.getclosurevars(inspect.unwrap(model.forward, stop=is_trl_forward)).nonlocals["temperature"] == 0.7
    ids = torch.tensor([[1, 5, 6]])
    fused = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert {"loss", "log_probs", "label_mask"} <= set(fused) and fused.log_probs.shape == (1, 2)


@pytest.mark.contract("_tokenizer", "_auto_map", "_add_bos_token", "_add_eos_token")
def test_a_tokenizer_is_its_backend_and_settings(tmp_path):
    one = tokenizer()
    one._tokenizer = Tokenizer.from_str(one.backend_tokenizer.to_str())
    assert one("a")["input_ids"] == [1] and one.backend_tokenizer is one._tokenizer
    one._auto_map = {"AutoTokenizer": ["x.Y", None]}
    one.save_pretrained(tmp_path)
    assert "auto_map" in json.loads((tmp_path / "tokenizer_config.json").read_text())
    one._auto_map = None
    one.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    llama = LlamaTokenizer(
        vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581a": 3, "\u2581": 4, "a": 5}, merges=[("\u2581", "a")]
    )
    llama._add_bos_token, llama._add_eos_token = True, True
    llama.update_post_processor()
    ids = llama("a")["input_ids"]
    assert (ids[0], ids[-1]) == (llama.bos_token_id, llama.eos_token_id)


@pytest.mark.contract("get_tokenizer_config", "tokenizer_class_from_name", "render_jinja_template", "bytes_to_unicode")
def test_what_is_asked_of_tokenizers_before_there_is_one(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    assert private.get_tokenizer_config(str(tmp_path))["bos_token"] == "<s>"
    assert private.tokenizer_class_from_name("LlamaTokenizer") is LlamaTokenizer
    assert private.tokenizer_class_from_name("NoSuchTokenizer") is None
    chat, template = (
        [{"role": "user", "content": "hi"}],
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    assert private.render_jinja_template([chat], chat_template=template, bos_token="<s>")[0] == ["<s>hi"]
    letters = private.bytes_to_unicode()
    assert (
        len(letters) == len(set(letters.values())) == 256 and letters[ord("a")] == "a" and letters[ord(" ")] == "\u0120"
    )


@pytest.mark.contract("extract_commit_hash")
def test_the_path_of_a_file_in_the_cache_has_its_commit():
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert private.extract_commit_hash(f"/hub/models--a--b/snapshots/{commit}/config.json", None) == commit
    assert private.extract_commit_hash("/a/folder/config.json", None) is None


@pytest.mark.contract("_apply", "_forward_hooks", "_forward_pre_hooks", "_orig_mod")
def test_modules_of_torch():
    class Watch(nn.Linear):
        def _apply(self, fn, recurse=True):
            self.seen = fn(torch.zeros(1)).dtype
            return super()._apply(fn, recurse)

    module = Watch(1, 1)
    for move, dtype in ((lambda: module.to(torch.bfloat16), torch.bfloat16), (module.half, torch.float16)):
        move()
        assert module.seen == module.weight.dtype == dtype
    assert not module._forward_hooks and not module._forward_pre_hooks
    module.register_forward_hook(lambda *args: None)
    module.register_forward_pre_hook(lambda *args: None)
    assert len(module._forward_hooks) == len(module._forward_pre_hooks) == 1
    assert torch.compile(module, backend="eager")._orig_mod is module


@pytest.mark.contract("register_fsdp_forward_method")
def test_fsdp_registers_methods_as_attributes_of_the_wrapped_module():
    from torch.distributed.fsdp import register_fsdp_forward_method

    assert list(inspect.signature(register_fsdp_forward_method).parameters) == ["module", "method_name"]
    assert "setattr" in inspect.getsource(register_fsdp_forward_method)


@pytest.mark.contract("_hf_hook")
def test_accelerate_hangs_its_hook_on_the_module():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    module = nn.Linear(1, 1)
    assert not hasattr(module, "_hf_hook")
    add_hook_to_module(module, AlignDevicesHook())
    assert hasattr(module, "_hf_hook")


@pytest.mark.contract("Attention")
@torch.no_grad()
def test_diffusers_attention_gives_its_result_channels_last():
    attention = carried.Attention(4, heads=1, dim_head=4, norm_num_groups=2, residual_connection=True)
    pixels = torch.randn(2, 4, 3, 3)
    assert attention(pixels).shape == pixels.shape
    assert not attention(pixels).is_contiguous()  # if it is, JAM's hook behind it is not needed any more


@pytest.mark.contract("constants")
def test_pefts_targets_are_tables_by_model_type():
    tables = {n: t for n, t in vars(private.constants).items() if n.startswith("TRANSFORMERS_MODELS_TO_")}
    tables = {n: t for n, t in tables.items() if n.endswith("_TARGET_MODULES_MAPPING")}
    assert tables["TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"]["llama"] == ["q_proj", "v_proj"]
    assert all(isinstance(table, dict) for table in tables.values()) and len(tables) > 20


@pytest.mark.contract("httpx")
def test_pictures_are_fetched_by_get():
    assert "follow_redirects" in inspect.signature(carried.httpx.get).parameters
