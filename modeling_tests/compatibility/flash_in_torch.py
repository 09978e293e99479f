"""A stand-in for the package flash-attn, in plain torch, so that transformers' own way to it runs on the CPU.

It has flash-attn's signatures and meaning (causal masks aligned at the bottom right; lengths that add up), and notes
what it was called with. It knows nothing of JAM.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.modeling_utils import PreTrainedModel


@dataclass
class Calls:
    """lengths: of each call on rows of equal length, its (queries, keys). cumulative: of each call on packed rows,
    the sums.
    """

    lengths: list[tuple[int, int]] = field(default_factory=list)
    cumulative: list[list[int]] = field(default_factory=list)


def _attend(query_THQ, key_SKQ, value_SKQ, causal, scale):
    groups = query_THQ.shape[1] // key_SKQ.shape[1]
    key_SHQ, value_SHQ = (states.repeat_interleave(groups, dim=1) for states in (key_SKQ, value_SKQ))
    scores_HTS = torch.einsum("thq,shq->hts", query_THQ, key_SHQ) * scale
    if causal:
        seen = torch.ones(scores_HTS.shape[1:], dtype=torch.bool).tril(scores_HTS.shape[2] - scores_HTS.shape[1])
        scores_HTS = scores_HTS.masked_fill(~seen, float("-inf"))
    return torch.einsum("hts,shq->thq", scores_HTS.softmax(-1), value_SHQ)


def install(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """From here on `flash_attention_2` is installed and runs on the CPU, in any precision."""
    calls = Calls()

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
        assert q.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
        calls.lengths.append((q.shape[1], k.shape[1]))
        return torch.stack([_attend(*row, causal, softmax_scale) for row in zip(q, k, v)])

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0,
    ):  # fmt: skip
        assert q.dim() == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert int(cu_seqlens_q.diff().max()) == max_seqlen_q and int(cu_seqlens_k.diff().max()) == max_seqlen_k
        calls.cumulative.append(cu_seqlens_q.tolist())
        ends = zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:])
        parts = [_attend(q[a:b], k[c:d], v[c:d], causal, softmax_scale) for a, b, c, d in ends]
        return torch.cat(parts)

    functions = (flash_attn_func, flash_attn_varlen_func, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
    return calls
