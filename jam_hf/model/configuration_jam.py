# Licensed under the Apache License, Version 2.0.
"""Configuration of a JAM: the one home of every id, of the grid and of the shapes.

It knows numbers only: nothing here builds a module or reads a file. Everything that can be derived is derived here, and
everything that can contradict is checked here, when the config is built.
"""

# No `from __future__ import annotations` here: `strict` checks the types of the fields only where they are no strings.
import copy
import os
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .class_names_jam import MODEL_TYPE
from .configuration_jam_vq import Derived, JamVQConfig, Part
from .families_jam import FAMILIES, attention_type, embedding_size_of, head_dim_of, key_value_heads_of
from .package_jam import PackageFunction, tell
from .picture_layout_jam import PictureLayout
from .remote_code_jam import AUTO_MAP, add_auto_map
from .transformers_private_jam import SubConfigSpec, strict


FUSION_MODES = ("uniform", "width", "cross")
CROSS_FORMS = ("preserving", "paper")
# Read from, and written to, the decoders' own configs: they are the home of these numbers.
_DELEGATED = (
    "vocab_size hidden_size num_attention_heads num_key_value_heads head_dim max_position_embeddings use_cache"
).split()


@strict
class JamConfig(PreTrainedConfig):
    r"""Configuration of a Joint Autoregressive Mixture (arXiv 2309.15564).

    Args:
        fusion_mode (`str`, defaults to `"cross"`): `"uniform"` and `"width"` are one stock decoder (of one parent's
            size, of twice the hidden size); `"cross"` is two stock decoders in lockstep with cross blocks between them.
        text_config (`PreTrainedConfig` or `dict`): the decoder (uniform, width) or the text stream (cross). Families:
            Llama, Mistral, Qwen2, Qwen3, OPT, Chameleon's decoder (cross only) and Emu3's (`emu3_text_model`). The
            streams may be of different families.
        image_config (`PreTrainedConfig` or `dict`, *optional*): the image stream; cross only.
        vq_config ([`JamVQConfig`] or `dict`): the image tokenizer.
        layer_pairing (`list[list[int]]`, *optional*): which layers of the two streams stand at one depth, where the
            streams have different numbers of layers: one pair `[text layer, image layer]` for each layer of the
            shallower stream. Follows from relative position where `None` (see `layer_pairs`), and is saved. `None`
            where the numbers are equal: layer i stands beside layer i.
        cross_attention_interval (`int`, defaults to 2): cross blocks follow every so many-th pair of layers, from the
            first on: in streams of equal depth layers 0, interval, 2*interval, ...
        cross_form (`str`, defaults to `"preserving"`): `"paper"`: one embedding feeds both streams, and a new linear
            layer over both final states feeds one output projection. `"preserving"` (ours): each stream reads its own
            parent's embedding, text logits are read from the text stream and image logits from the image stream, and
            the cross blocks' outputs start at zero, so that a fusion reproduces both parents.
        image_head_hidden_size (`int`, *optional*): hidden size of an image head that is an MLP, as Janus has it
            (`JanusVQVAEHead`); the logits of image codes then come from it in every mode. Where `None`, they come from
            rows of a linear layer.
        image_head_act (`str`, defaults to `"gelu"`): its activation, by transformers' name.
        break_token_id, mask_token_id, image_token_id (`int`): `<break>` on both sides of a picture, the first CM3
            sentinel `<mask>`, and the placeholder `<image>` that stands for a code in text.
        image_end_token_id (`int`, *optional*): closes a picture that `<break>` opened; `None`: `<break>` does both.
        image_prefix_token_ids, image_suffix_token_ids (`list[int]`, default to none): tokens between the opening token
            and the first code, and between the last code and the closing token.
        image_row_end_token_id (`int`, *optional*): follows each row of a picture's grid, the last one included. With
            these four a JAM writes pictures as its image parent does (Chameleon: a closing token of its own; Emu3: a
            prefix that tells the size, row ends, an end of frame). Their tokens never occur in text.
        num_mask_tokens (`int`, defaults to 8): CM3 sentinels, ids `mask_token_id + i` (paper: 512).
        mask_end_token_id (`int`, *optional*): end of an infilled span; right after the sentinels where `None`.
        image_token_offset (`int`, *optional*): id of image code 0; the last codes of the vocabulary where `None`.
        image_seq_length (`int`, *optional*): codes in one picture (N). Follows from `vq_config`; checked if given.
        provenance (`dict`, *optional*): what the JAM was made of and what was done since, for the card and the recipe
            that every save carries on; see jam_hf/provenance.py.
        tie_word_embeddings (`bool`, *optional*): follows `text_config` where `None`; never in the preserving form.

    `vocab_size`, `hidden_size`, `num_hidden_layers` and their like are read from, and written to, the decoders'
    configs. `num_hidden_layers` of a cross JAM is its number of depths, that of the deeper stream.

    Raises:
        ValueError: if the parts contradict each other; the message says what was expected and what came.
    """

    model_type = MODEL_TYPE
    paper = PackageFunction(class_method=True)  # the paper's own JAMs: jam_hf/fusion/paper.py
    document_end = PackageFunction(method=True)  # in which id documents for training end: jam_hf/data/sequences.py
    keys_to_ignore_at_inference = ["past_key_values"]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "image_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", optional=True),
        "vq_config": JamVQConfig,
    }

    fusion_mode: str = "cross"
    text_config: Part = None
    image_config: Part = None
    vq_config: Part = None
    layer_pairing: list[list[int]] | None = None
    cross_attention_interval: int = 2
    cross_form: str = "preserving"
    image_head_hidden_size: int | None = None
    image_head_act: str = "gelu"
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    break_token_id: int = 3
    image_token_id: int = 4
    mask_token_id: int = 5
    num_mask_tokens: int = 8
    mask_end_token_id: Derived = None
    image_token_offset: Derived = None
    image_seq_length: Derived = None
    tie_word_embeddings: bool | None = None

    # What else stands in a picture; with the defaults, nothing.
    image_end_token_id: int | None = None
    image_prefix_token_ids: list[int] | tuple[int, ...] = ()
    image_row_end_token_id: int | None = None
    image_suffix_token_ids: list[int] | tuple[int, ...] = ()

    # The texts of card and recipe, and what was done since: see jam_hf/provenance.py.
    provenance: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Checked before the sub-configs are built: a wrong mode must not surface as a wrong shape.
        _check_choice("fusion_mode", self.fusion_mode, FUSION_MODES)
        _check_choice("cross_form", self.cross_form, CROSS_FORMS)
        for name in ("cross_attention_interval", "num_mask_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"JamConfig: `{name}` must be at least 1, got {getattr(self, name)}.")
        if self.fusion_mode == "cross" and self.image_config is None:
            self.image_config = copy.deepcopy(self.text_config) if self.text_config is not None else {}
        elif self.fusion_mode != "cross" and self.image_config is not None:
            raise ValueError(
                f"JamConfig: `image_config` is for fusion_mode='cross'; a JAM of fusion_mode='{self.fusion_mode}' is "
                "one decoder, described by `text_config`. Leave `image_config` out."
            )
        super().__post_init__(**kwargs)
        for name, config in (("text_config", self.text_config), ("image_config", self.image_config)):
            if config is not None and config.model_type not in FAMILIES:
                raise ValueError(
                    f"JamConfig: `{name}` is of the family '{config.model_type}', which JAM does not support yet. "
                    f"Supported families: {', '.join(FAMILIES)}. (Others may scale embeddings, cap logits or mix kinds "
                    "of attention; fusing them unseen would give a wrong model, not an error.)"
                )
        # Whether the parts fit together was seen when they were put together; a saved JAM is as it was then.
        tell("check_parts", self)
        pairs = self.layer_pairs
        if self.fusion_mode == "cross":
            unequal = self.text_config.num_hidden_layers != self.image_config.num_hidden_layers
            self.layer_pairing = [list(pair) for pair in pairs] if unequal else None
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = len(self.embedding_sizes) == 1 and bool(self.text_config.tie_word_embeddings)
        self._derive_and_check_ids()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "JamConfig":
        """As in `PreTrainedConfig`; the config of another model is refused, not read as a JAM's."""
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"This is the config of a '{config_dict['model_type']}' model, not of a JAM. Load it with AutoConfig "
                "or AutoModel..., or make a JAM of it with `jam_hf.fuse`."
            )
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in `PreTrainedConfig`; the folder carries the code that it needs (remote_code_jam.py)."""
        add_auto_map(self, AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        tell("drop_moved_files", save_directory)
        tell("carry_on", self, save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        tell("carry_on", self, working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in `PreTrainedConfig`; without fields of what this JAM has not (unequal depths, an MLP as image head)."""
        values = super().to_dict()
        for name in ("layer_pairing", "provenance"):
            if getattr(self, name) is None:
                values.pop(name, None)
        if self.image_head_hidden_size is None:
            values.pop("image_head_hidden_size", None)
            values.pop("image_head_act", None)
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """As in `PreTrainedConfig`; files say nothing of what a picture does not have."""
        names = ("image_end_token_id", "image_prefix_token_ids", "image_row_end_token_id", "image_suffix_token_ids")
        return {k: value for k, value in super().to_diff_dict().items() if k not in names or value not in (None, [])}

    # ----- checks -----------------------------------------------------------------------------------------------------

    def _derive_and_check_ids(self) -> None:
        vocab_size, codes = self.vocab_size, self.num_image_tokens
        expected = self.vq_config.image_seq_length
        if self.image_seq_length is None:
            self.image_seq_length = expected
        elif self.image_seq_length != expected:
            raise ValueError(
                f"JamConfig: `image_seq_length` is {self.image_seq_length}, but vq_config makes a grid of "
                f"{self.grid_size}x{self.grid_size} = {expected} codes (sample_size {self.vq_config.sample_size}, "
                f"downsampling {self.vq_config.downsampling_factor}). Leave it out, or change vq_config."
            )
        if self.mask_end_token_id is None:
            self.mask_end_token_id = self.mask_token_id + self.num_mask_tokens
        if self.image_token_offset is None:
            self.image_token_offset = vocab_size - codes
        first, last = self.image_token_range.start, self.image_token_range.stop
        if not 0 <= first < last <= vocab_size:
            raise ValueError(
                f"JamConfig: the {codes} image codes would take the ids [{first}, {last}), outside the vocabulary of "
                f"{vocab_size}. Enlarge vocab_size of the decoders or move `image_token_offset`."
            )
        # pad, bos and eos may coincide (OPT and metaseq start a document with eos); what marks pictures may not.
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        shared = {
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            **{f"eos_token_id[{i}]" if len(eos) > 1 else "eos_token_id": value for i, value in enumerate(eos)},
        }
        own = {name: getattr(self, name) for name in ("break_token_id", "image_token_id", "mask_end_token_id")}
        own |= {f"mask_token_id + {i}": self.mask_token_id + i for i in range(self.num_mask_tokens)}
        own |= self._derive_layout_ids()
        taken: dict[int, str] = {}
        for name, value in {**own, **shared}.items():
            if value is not None and not 0 <= value < vocab_size:
                raise ValueError(
                    f"JamConfig: {name} is {value}, outside the vocabulary of {vocab_size} (ids 0..{vocab_size - 1})."
                )
            if value is not None and first <= value < last:
                raise ValueError(f"JamConfig: {name} is {value}, inside the range of image codes [{first}, {last}).")
            if value in taken:
                raise ValueError(f"JamConfig: {name} and {taken[value]} have the same id {value}; each needs its own.")
            if name in own:
                taken[value] = name

    def _derive_layout_ids(self) -> dict[str, int]:
        """The ids that stand in pictures beside `<break>` and the codes, by their names in messages."""
        ids: dict[str, int | None] = {}
        for name in ("image_prefix_token_ids", "image_suffix_token_ids"):
            setattr(self, name, list(getattr(self, name)))  # as json reads it
            ids |= {f"{name}[{i}]": value for i, value in enumerate(getattr(self, name))}
        ids |= {name: getattr(self, name) for name in ("image_row_end_token_id", "image_end_token_id")}
        return {name: value for name, value in ids.items() if value is not None}

    # ----- derived ----------------------------------------------------------------------------------------------------

    @property
    def decoder_configs(self) -> list[PreTrainedConfig]:
        """Text and, in cross, image: the configs of the decoders that this JAM is made of."""
        return [config for config in (self.text_config, self.image_config) if config is not None]

    @property
    def embedding_sizes(self) -> tuple[int, ...]:
        """Widths of the parts of a row of the input embedding: one, or text and image in the preserving cross form."""
        if self.fusion_mode == "cross" and self.cross_form == "preserving":
            return embedding_size_of(self.text_config), embedding_size_of(self.image_config)
        return (embedding_size_of(self.text_config),)

    @property
    def num_image_tokens(self) -> int:
        """Size of the codebook (K): image codes take the ids `[image_token_offset, image_token_offset + K)`."""
        return self.vq_config.num_vq_embeddings

    @property
    def grid_size(self) -> int:
        """Codes per side of a picture."""
        return self.vq_config.grid_size

    @property
    def image_token_range(self) -> range:
        """The ids of the image codes, of code 0 first."""
        return range(self.image_token_offset, self.image_token_offset + self.num_image_tokens)

    @property
    def picture_layout(self) -> PictureLayout:
        """What a picture is made of in a document, in ids."""
        return PictureLayout(
            begin=self.break_token_id,
            end=self.break_token_id if self.image_end_token_id is None else self.image_end_token_id,
            codes=self.image_token_range,
            grid=(self.grid_size, self.grid_size),
            prefix=tuple(self.image_prefix_token_ids),
            row_end=self.image_row_end_token_id,
            suffix=tuple(self.image_suffix_token_ids),
            placeholder=self.image_token_id,
        )

    # Short for fields of `picture_layout`.
    picture_template = property(lambda self: self.picture_layout.template)
    picture_length = property(lambda self: len(self.picture_layout.template))
    picture_structure_token_ids = property(lambda self: self.picture_layout.structure)
    picture_end_token_id = property(lambda self: self.picture_layout.end)

    def laid_out(self, image_tokens: Any) -> list[int]:
        """`picture_layout.inside` of any iterable of ids, as a list."""
        return self.picture_layout.inside(list(image_tokens)).tolist()

    @property
    def eos_token_ids(self) -> list[int]:
        """What ends a document: `eos_token_id`, which may be one, a list or None, as a list."""
        ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        return [i for i in ids if i is not None]

    @property
    def num_hidden_layers(self) -> int:
        """Number of depths: the decoder's layers, or those of the deeper stream. Written to every decoder."""
        return max(config.num_hidden_layers for config in self.decoder_configs)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        for config in self.decoder_configs:
            config.num_hidden_layers = value
        self.layer_pairing = None  # the streams are equally deep from here on

    @property
    def layer_pairs(self) -> list[list[int]]:
        """The pairs `[text layer, image layer]` that stand at one depth, upwards (empty for uniform and width).

        `layer_pairing` where it is given. Otherwise layer i of the shallower stream, of S layers, stands beside layer
        `ceil((i + 1) * L / S) - 1` of the deeper one, of L layers: the last layers are a pair, and in streams of equal
        depth layer i stands beside layer i.

        Raises:
            ValueError: if `layer_pairing` does not fit the streams.
        """
        if self.fusion_mode != "cross":
            return []
        if self.layer_pairing is None:
            return pairs_by_position(*(config.num_hidden_layers for config in self.decoder_configs))
        tell("check_pairing", self)
        return [list(pair) for pair in self.layer_pairing]

    @property
    def text_layer_depths(self) -> tuple[int, ...]:
        """The depth at which each layer of the text stream stands (uniform and width: of the decoder)."""
        return self._layer_depths(0)

    @property
    def image_layer_depths(self) -> tuple[int, ...]:
        """The depth at which each layer of the image stream stands (empty for uniform and width)."""
        return self._layer_depths(1)

    def _layer_depths(self, stream: int) -> tuple[int, ...]:
        """The deeper stream, 0 (text) or 1 (image), numbers the depths."""
        counts = [config.num_hidden_layers for config in self.decoder_configs]
        if stream == len(counts):
            return ()
        if counts[stream] == max(counts):
            return tuple(range(counts[stream]))
        return tuple(pair[1 - stream] for pair in self.layer_pairs)

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """Depths followed by cross blocks (empty for uniform and width): every interval-th that has both layers."""
        # Depths are numbered by the deeper stream, whose layer has the higher number in a pair.
        return tuple(max(pair) for pair in self.layer_pairs[:: self.cross_attention_interval])

    @property
    def visited_attentions(self) -> tuple[tuple[int, str], ...]:
        """Every attention of a cross JAM as (depth, module of the depth), in the order in which a forward visits them.

        Depth by depth: "text_layer" and "image_layer", where the stream has a layer there, and, where cross blocks
        follow, "text_cross" (text reads image) and "image_cross". The place in this order is the place in the cache.
        """
        text, image, crossed = (
            set(self.text_layer_depths),
            set(self.image_layer_depths),
            set(self.cross_attention_layers),
        )
        parts = {"text_layer": text, "image_layer": image, "text_cross": crossed, "image_cross": crossed}
        return tuple(
            (at, part) for at in range(self.num_hidden_layers) for part, depths in parts.items() if at in depths
        )

    @property
    def initializer_range(self) -> float:
        for name in ("initializer_range", "init_std"):
            if (value := getattr(self.text_config, name, None)) is not None:
                return value
        return 0.02

    @initializer_range.setter
    def initializer_range(self, value: float) -> None:
        for config in self.decoder_configs:
            for name in ("initializer_range", "init_std"):
                if hasattr(config, name):
                    setattr(config, name, value)

    @property
    def per_layer_config(self) -> list[PreTrainedConfig]:
        """One config per cached attention, in the order in which a forward visits them.

        Uniform and width: the layers. Cross: as `visited_attentions` has it. An offloaded cache fetches the next entry
        while one is at work, so it needs the order of the visits. An entry has a `sliding_window` where that attention
        slides, and only there: caches go by it. Cross blocks attend to all that came before.
        """
        whole = [_without_window(config) for config in self.decoder_configs]
        if self.fusion_mode != "cross":
            visited: list[tuple[int, int | None]] = [(0, layer) for layer in range(self.num_hidden_layers)]
        else:
            places = {"text_layer": (0, self.text_layer_depths), "image_layer": (1, self.image_layer_depths)}
            visited = []
            for depth, part in self.visited_attentions:
                stream, depths = places.get(part, (int(part == "image_cross"), None))
                visited.append((stream, None if depths is None else depths.index(depth)))
        return [
            self.decoder_configs[stream]
            if layer is not None and attention_type(self.decoder_configs[stream], layer) == "sliding_attention"
            else whole[stream]
            for stream, layer in visited
        ]

    @per_layer_config.setter
    def per_layer_config(self, value: Any) -> None:
        if value is not None:
            raise ValueError("JamConfig: per-layer overrides are not supported; set text_config or image_config.")

    @property
    def layer_types(self) -> list[str]:
        """ "full_attention" or "sliding_attention" for each cached attention, in the order of `per_layer_config`."""
        slides = [getattr(config, "sliding_window", None) is not None for config in self.per_layer_config]
        return ["sliding_attention" if sliding else "full_attention" for sliding in slides]

    @layer_types.setter
    def layer_types(self, value: Any) -> None:
        if value is not None:
            raise ValueError("JamConfig: layer_types follow from text_config and image_config; set them there.")

    def validate_layer_type(self) -> None:
        """Nothing to check: a cross JAM has more attentions than depths, and the decoders' configs check their own."""

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Tensor parallel styles by the names of a [`JamModel`]'s modules, see jam_hf/integrations/sharding.py."""
        return tell("tensor_parallel_plan", self, otherwise={})

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:
        """FSDP2 styles by the same names: a unit each for the embedding, every depth and the frozen image tokenizer."""
        return dict.fromkeys(("language_model.embed_tokens", "language_model.layers.*", "vq_model"), "free_full_weight")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The JAM is the language model: vocabulary and caches are its own, not one stream's."""
        return self


def _without_window(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config, or a shallow copy of it without its sliding window where it has one."""
    if getattr(config, "sliding_window", None) is None:
        return config
    config = copy.copy(config)
    config.sliding_window = None
    return config


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"JamConfig: `{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def pairs_by_position(text: int, image: int) -> list[list[int]]:
    """See `JamConfig.layer_pairs`; `text` and `image` are numbers of layers."""
    shallow, deep = sorted((text, image))
    pairs = [[i, -(-(i + 1) * deep // shallow) - 1] for i in range(shallow)]
    return pairs if text == shallow else [pair[::-1] for pair in pairs]


def _delegate(name: str) -> property:
    """A property that reads the text config's value and writes every decoder's."""

    def read(self: "JamConfig") -> Any:
        if name == "head_dim":
            return head_dim_of(self.text_config)
        if name == "max_position_embeddings":  # both streams read every token
            return min(config.max_position_embeddings for config in self.decoder_configs)
        if name == "num_key_value_heads":
            return key_value_heads_of(self.text_config)
        return getattr(self.text_config, name)

    def write(self: "JamConfig", value: Any) -> None:
        for config in self.decoder_configs:
            setattr(config, name, value)

    return property(read, write, doc=f"`{name}` of the decoders; written to each of them.")


for _name in _DELEGATED:
    setattr(JamConfig, _name, _delegate(_name))

# transformers copies the code files beside what it saves of classes that say so.
JamConfig.register_for_auto_class()


__all__ = ["JamConfig", "JamVQConfig"]
