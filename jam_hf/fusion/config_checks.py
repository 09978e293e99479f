"""Whether the parts of a [`JamConfig`] fit together: asked by the config itself, whenever one is built, through its
door.

A saved JAM was checked when it was put together, so a checkpoint does not carry this. Ids and shapes of pictures are
checked in the config, which derives them.
"""

from __future__ import annotations

from ..model.configuration_jam import JamConfig, pairs_by_position
from ..model.families_jam import attention_type, embedding_size_of, family_of


def check_parts(config: JamConfig) -> None:
    """See `JamConfig`; what is derived may still be None. The families are known to be supported.

    Raises:
        ValueError: if the parts contradict each other; the message says what was expected and what came.
    """
    _check_layer_types(config, "text_config")
    if config.fusion_mode != "cross" and family_of(config.text_config).decoder is None:
        raise ValueError(
            f"JamConfig: a JAM of fusion_mode='{config.fusion_mode}' is one stock decoder, and transformers has that "
            f"of the family '{config.text_config.model_type}' only together with a VQ model. Use fusion_mode='cross', "
            "where it can be either stream."
        )
    if config.image_config is not None:
        _check_layer_types(config, "image_config")
        _check_streams(config)
    if config.fusion_mode != "cross" and config.layer_pairing is not None:
        raise ValueError(
            f"JamConfig: `layer_pairing` is for fusion_mode='cross'; a JAM of fusion_mode='{config.fusion_mode}' is "
            "one decoder. Leave it out."
        )
    if config.layer_pairing is not None:
        check_pairing(config)
    _check_image_head(config)
    if len(config.embedding_sizes) > 1 and config.tie_word_embeddings:
        raise ValueError(
            "JamConfig: a cross JAM in the preserving form keeps both parents' input embeddings side by side, so its "
            "output projection cannot be tied to them. Set tie_word_embeddings=False (a tied parent is untied by "
            "`jam_hf.fuse`)."
        )


def _check_layer_types(config: JamConfig, name: str) -> None:
    """`layer_types` may say what the stock decoder does not do; a cache, which goes by it, would then hold too
    little.
    """
    decoder = getattr(config, name)
    stated = getattr(decoder, "layer_types", None)
    known = ("full_attention", "sliding_attention")
    does = [attention_type(decoder, depth) for depth in range(decoder.num_hidden_layers)]
    if stated is not None and (list(stated) != does or not set(stated) <= set(known)):
        raise ValueError(
            f"JamConfig: {name}.layer_types is {list(stated)}, but the layers of a '{decoder.model_type}' decoder with "
            f"sliding_window={getattr(decoder, 'sliding_window', None)} are {does}; known kinds: {', '.join(known)}. "
            "Correct layer_types, or leave it out."
        )
    if "sliding_attention" in does and not decoder.sliding_window:
        raise ValueError(
            f"JamConfig: {name} has layers of the kind 'sliding_attention' but "
            f"sliding_window={decoder.sliding_window}. Set the window's size (in Qwen2 and Qwen3 with "
            "use_sliding_window=True), or make the layers 'full_attention'."
        )


def _check_streams(config: JamConfig) -> None:
    text, image = config.text_config, config.image_config
    if text.vocab_size != image.vocab_size:
        raise ValueError(
            f"JamConfig: in cross mode both streams need the same `vocab_size`, got {text.vocab_size} in text_config "
            f"and {image.vocab_size} in image_config."
        )
    for size in (embedding_size_of, lambda decoder: decoder.hidden_size):  # OPT's may differ
        if config.cross_form == "paper" and size(text) != size(image):
            raise ValueError(
                "JamConfig: cross_form='paper' feeds both streams from one embedding, so both need the same hidden "
                f"size, got {size(text)} in text_config and {size(image)} in image_config. "
                "Use cross_form='preserving' for streams of different widths."
            )
    learned = [family_of(decoder).learned_positions for decoder in (text, image)]
    if config.cross_form == "paper" and learned[0] != learned[1]:
        kinds = ["learned" if is_learned else "rotary" for is_learned in learned]
        raise ValueError(
            "JamConfig: cross_form='paper' feeds the text stream's embedding and positions to both streams, so both "
            f"need positions of the same kind, got {kinds[0]} ones in text_config ('{text.model_type}') and {kinds[1]} "
            f"ones in image_config ('{image.model_type}'). Use cross_form='preserving' for such a pair."
        )
    for name, decoder in (("text_config", text), ("image_config", image)):
        if getattr(decoder, "layerdrop", 0.0):
            raise ValueError(
                f"JamConfig: LayerDrop would break the lockstep of the two streams; set {name}.layerdrop to 0.0 (it "
                f"is {decoder.layerdrop})."
            )


def check_pairing(config: JamConfig) -> None:
    """Raises a `ValueError` if `layer_pairing` does not fit the streams."""
    text, image = (decoder.num_hidden_layers for decoder in config.decoder_configs)
    found, count = config.layer_pairing or [], min(text, image)
    problem = None
    if len(found) != count:
        problem = f"has {len(found)} pairs"
    elif any(len(pair) != 2 for pair in found):
        problem = f"has the entry {next(pair for pair in found if len(pair) != 2)}"
    elif outside := [pair for pair in found if not (0 <= pair[0] < text and 0 <= pair[1] < image)]:
        problem = f"names a layer that does not exist in {outside[0]}"
    elif crossed := [(a, b) for a, b in zip(found, found[1:]) if not (a[0] < b[0] and a[1] < b[1])]:
        problem = f"does not go up in both streams from {crossed[0][0]} to {crossed[0][1]}"
    if problem is not None:
        raise ValueError(
            f"JamConfig: `layer_pairing` {problem}. With {text} layers in text_config and {image} in image_config it "
            f"needs {count} pairs [text layer, image layer], going up in both streams, one for each layer of the "
            f"shallower one. Leave it out for pairs by relative position: {pairs_by_position(text, image)}."
        )


def _check_image_head(config: JamConfig) -> None:
    size = config.image_head_hidden_size
    if size is not None and size < 1:
        raise ValueError(f"JamConfig: `image_head_hidden_size` must be at least 1, got {size}.")
    if size is None and config.image_head_act != "gelu":
        raise ValueError(
            f"JamConfig: `image_head_act` is {config.image_head_act!r}, but without `image_head_hidden_size` the image "
            "head is a linear layer. Set `image_head_hidden_size`, or leave `image_head_act` out."
        )


__all__ = ["check_pairing", "check_parts"]
