"""What a fusion holds in memory: blocks of rows, and at most the tables of one tensor where two vocabularies meet.

Each fusion runs in a process of its own; its peak is that of the process, less what the process had when it began.
"""

import contextlib
import re
import shutil
import weakref

import pytest
import torch
from fusion_zoo import image_parent, text_parent, vq_model
from test_restart import in_a_clean_process
from transformers import LlamaForCausalLM

import jam_hf.fusion.fuse as engine
from jam_hf.fusion import sources
from jam_hf.fusion.plan import peak_memory


ROWS, HIDDEN = 150_000, 256
TABLE = ROWS * HIDDEN * 2  # 73 MiB in bfloat16: what must not be there twice
MARGIN = 55 << 20  # blocks in flight, tokenizers, lists of ids


def status(field):
    with open("/proc/self/status") as file:
        return int(re.search(rf"{field}:\s+(\d+) kB", file.read()).group(1)) << 10


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Parents whose embedding and head are all that counts; "same" has the text parent's vocabulary, "foreign" has
    not.
    """
    root = tmp_path_factory.mktemp("large")
    vq_model().save_pretrained(root / "vq")
    (text, ours), (image, theirs) = text_parent("llama"), image_parent("plain")
    theirs_too = theirs.get_vocab()
    for name, model, tokenizer, rows in (
        ("text", text, ours, 512),  # each id without a token gets a name, so that there are few
        ("same text", image, theirs, ROWS),
        ("same", image, theirs, ROWS),
        ("foreign", image, theirs, ROWS + 8),
    ):
        config = model.config
        sizes = {"vocab_size": rows, "hidden_size": HIDDEN, "dtype": torch.bfloat16, "num_hidden_layers": 1}
        for field, value in sizes.items():
            setattr(config, field, value)
        if name.startswith("same"):
            tokenizer.add_tokens(
                [t for t in ("<image>", "<mask>", "</mask>") if t not in theirs_too], special_tokens=True
            )
        torch.manual_seed(len(name))
        LlamaForCausalLM(config).bfloat16().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def measure(root, text, image, mode, init, out):
    """(peak above the start, peak above the plan, bytes of tables at once, peak in all, plan's estimate and tables)."""
    alive, tables = weakref.WeakSet(), [0]
    table = sources.VocabularyRows.table

    def counted(self):
        found = table(self)
        alive.add(self)
        tables[0] = max(tables[0], sum(rows._table.nbytes for rows in list(alive) if rows._table is not None))
        return found

    sources.VocabularyRows.table = counted
    start = status("VmRSS")
    plan = engine.plan_fusion(root / text, root / image, mode, init, root / "vq")
    planned = status("VmHWM")
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = status("VmRSS")
    engine.run_fusion(plan, out)
    left = sum(rows._table is not None for rows in alive)
    loads = max(tensor.loads for tensor in plan.tensors.values())
    return planned - start, status("VmHWM") - before, tables[0], status("VmHWM"), peak_memory(plan), loads, left


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("image", "mode", "init", "tables"),
    [
        ("same", "uniform", "average", 0),
        ("same", "width", "block_diagonal", 0),
        ("same", "cross", "preserving", 0),
        ("same", "cross", "paper", 0),
        ("foreign", "uniform", "average", 1),
        ("foreign", "width", "copy", 1),
        ("foreign", "cross", "preserving", 1),
        ("foreign", "cross", "paper", 1),
    ],
)
def test_no_more_than_one_table_is_in_memory(image, mode, init, tables, large, tmp_path):
    text = "same text" if image == "same" else "text"
    planning, writing, held, peak, estimate, loads, left = in_a_clean_process(
        measure, large, text, image, mode, init, tmp_path / "jam"
    )
    shutil.rmtree(tmp_path / "jam")
    assert not left and held <= loads
    assert loads <= tables * (TABLE + 64 * HIDDEN)
    assert writing <= loads + MARGIN
    assert planning <= 3 * MARGIN
    assert peak <= estimate
