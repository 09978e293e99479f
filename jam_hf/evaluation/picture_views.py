"""How a JAM and each class of image parents read a caption and a picture, and what they say of its codes.

It knows models, tokenizers and layouts of pictures; what is measured with them is retention.py.
Shape suffixes: B documents, T tokens, K image codes, N codes of a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.multimodal import MULTIMODAL
from ..fusion.parents import code_ids, code_names, picture_layout
from ..fusion.recipe import FusionRecipe
from ..fusion.vocabulary import differing_tokens
from ..model.configuration_jam import JamConfig
from ..model.modeling_jam import JamForCausalLM
from ..model.picture_layout_jam import PictureLayout


@dataclass(frozen=True)
class PictureView:
    """How one model reads a caption and the picture behind it. Of a model it knows what is needed to predict the codes.

    Args:
        model: the model. caption: its ids, up to and with what announces the picture.
        layout: of the picture; its `codes` are the ids that stand for them, and where codes have embeddings of their
            own (Janus), numbers behind the vocabulary.
        code_logits: ids and attention mask, int64 `[B, T]` -> logits over the codes, `[B, T, K]`.
    """

    model: PreTrainedModel
    caption: Callable[[str], list[int]]
    layout: PictureLayout
    code_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def check_length(self, caption: str, name: str) -> None:
        """Raise `ValueError` if a caption and its picture have more tokens than the model has positions."""
        length, positions = len(self.caption(caption)) + len(self.layout.template), positions_of(self.model)
        if length > positions:
            raise ValueError(
                f"{name} has {length} tokens with its picture, more than the {positions} positions of "
                f"{type(self.model).__name__}. Shorten its caption, or leave it out."
            )

    def document(self, caption: str, codes: torch.Tensor) -> tuple[list[int], list[int]]:
        """Ids of the caption and its picture of `codes` (int64 `[N]`, 0..K-1), and the places of the codes among
        them.
        """
        ids = list(self.caption(caption))
        picture = self.layout.inside(self.layout.ids_of(codes.numpy()))
        return [*ids, *picture.tolist()], [len(ids) + position for position in self.layout.positions]


def jam_view(jam: JamForCausalLM, tokenizer: PreTrainedTokenizerBase) -> PictureView:
    """The JAM's own way: the caption, `<break>`, the codes in the layout of its config."""
    layout = jam.config.picture_layout
    return PictureView(jam, _caption(tokenizer, layout.begin), layout, _plain_logits(jam, torch.tensor(layout.codes)))


def image_parent_view(
    parent: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    jam_tokenizer: PreTrainedTokenizerBase,
    config: JamConfig,
    name: str,
    image_token_offset: int | None = None,
    recipe: FusionRecipe | None = None,
) -> PictureView:
    """The parent's way, by its class; code k of the JAM is code k of the parent.

    Args:
        tokenizer: the parent's; `None` where it brings none. config: the JAM's. name: how messages call the parent.
        image_token_offset: id of code 0, for plain causal LMs. recipe: the JAM's, which may say it too.
    Raises:
        ValueError: if it has another number of codes, or marks and codes cannot be found.
    """
    sheet, vocabulary = MULTIMODAL.get(parent.config.model_type), parent.get_input_embeddings().weight.shape[0]
    if sheet is None:
        return _plain_view(parent, tokenizer, jam_tokenizer, config, name, image_token_offset, recipe)
    if tokenizer is None:
        raise ValueError(f"The image parent {name} brings no tokenizer to read captions with. Pass image_tokenizer=...")
    codes = code_ids(parent.config, vocabulary, config.num_image_tokens, tokenizer, image_token_offset, name)
    layout = picture_layout(parent.config, tokenizer, codes, config.grid_size, name)
    assert layout is not None, "a multimodal class marks its pictures"

    def logits_of_states(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # The class's own forward forbids image codes; the weights do predict them.
        states = parent.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return parent.lm_head(states)[..., codes.to(ids.device)]

    def logits_of_own_head(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        is_code = (ids >= vocabulary)[..., None]
        text = parent.get_input_embeddings()(ids.clamp(max=vocabulary - 1))
        pictures = parent.prepare_embeddings_for_image_generation((ids - vocabulary).clamp(min=0))
        embeds = torch.where(is_code, pictures, text)
        outputs = parent.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        return parent.model.generation_head(outputs.last_hidden_state)

    logits = _plain_logits(parent, codes)
    if sheet.own_code_modules:
        logits = logits_of_own_head
    elif sheet.forward_forbids_codes:
        logits = logits_of_states
    return PictureView(parent, _caption(tokenizer, layout.begin, begin=sheet.bos_by_processor), layout, logits)


def _plain_view(
    parent: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    jam_tokenizer: PreTrainedTokenizerBase,
    config: JamConfig,
    name: str,
    offset: int | None,
    recipe: FusionRecipe | None,
) -> PictureView:
    """A causal LM whose vocabulary holds the codes: over the JAM's own ids, or with a tokenizer that names the marks.

    Its pictures have the layout of the JAM's.
    """
    size = parent.get_input_embeddings().weight.shape[0]
    layout, first, count = config.picture_layout, config.image_token_offset, config.num_image_tokens
    same_ids = size == config.vocab_size and (tokenizer is None or not differing_tokens(tokenizer, jam_tokenizer))
    if same_ids:
        codes = code_ids(parent.config, size, count, tokenizer, first if offset is None else offset, name)
        if int(codes[0]) != first:
            raise ValueError(
                f"The image parent {name} has the JAM's vocabulary, in which code 0 is id {first}, not "
                f"{int(codes[0])}. Leave image_token_offset out."
            )
        caption = _caption(tokenizer or jam_tokenizer, layout.begin)
        return PictureView(parent, caption, replace(layout, codes=codes.tolist()), _plain_logits(parent, codes))
    if tokenizer is None:
        raise ValueError(
            f"The image parent {name} has a vocabulary of {size} ids, the JAM one of {config.vocab_size}, and it "
            "brings no tokenizer to say what they mean. Pass image_tokenizer=..."
        )
    known = tokenizer.get_vocab()
    if offset is None and not code_names(tokenizer):
        if recipe is None:
            raise ValueError(
                f"Where the image codes of the image parent {name} are is not known: its tokenizer names no <img:0>, "
                "and the JAM's folder has no recipe (fusion.yaml). Say what its code 0 is: image_token_offset=..."
            )
        offset = recipe.image_token_offset
    codes = code_ids(parent.config, size, count, tokenizer, offset, name)
    declared = recipe.special_tokens if recipe is not None else {}
    parents = picture_layout(parent.config, tokenizer, codes, config.grid_size, name)

    def own(token: int) -> int:
        string = jam_tokenizer.convert_ids_to_tokens(token)
        if string not in declared and token == layout.begin and parents is not None:
            return parents.begin
        string = declared.get(string, string)
        if string not in known:
            raise ValueError(f"The vocabulary of the image parent {name} has no {string}, which its pictures need.")
        return known[string]

    begin = own(layout.begin)
    theirs = replace(
        layout,
        begin=begin,
        end=begin,  # nothing is read behind the codes
        codes=codes.tolist(),
        prefix=tuple(own(token) for token in layout.prefix),
        row_end=None if layout.row_end is None else own(layout.row_end),
        suffix=tuple(own(token) for token in layout.suffix),
    )
    return PictureView(parent, _caption(tokenizer, begin), theirs, _plain_logits(parent, codes))


def _plain_logits(model: PreTrainedModel, codes: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def code_logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[..., codes.to(ids.device)]

    return code_logits


def _caption(tokenizer: PreTrainedTokenizerBase, mark: int | None, begin: bool = False) -> Callable[[str], list[int]]:
    """Caption to ids, `mark` behind it. begin: the tokenizer leaves the begin of the document to its processor."""

    def encode(caption: str) -> list[int]:
        ids = tokenizer(caption)["input_ids"]
        first = [tokenizer.bos_token_id] if begin and ids[:1] != [tokenizer.bos_token_id] else []
        return [*first, *ids, mark]

    return encode


def positions_of(model: PreTrainedModel) -> int:
    """Tokens that the model can read; where its config names no limit, none is known."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**63
