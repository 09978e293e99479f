"""Two vocabularies into one: what tokens spell, whose rows they get, and the rows themselves, against slow
definitions.
"""

import copy
import json

import pytest
import torch
from fusion_zoo import SENTENCES, byte_level_tokenizer, sentencepiece_like_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jam_hf.checkpoints.parent import Parent
from jam_hf.fusion.parents import Decoder, ImageCodes
from jam_hf.fusion.sources import VocabularyRows
from jam_hf.fusion.vocabulary import (
    BYTES,
    NONE,
    PIECES,
    SAME_ROLE,
    SAME_TEXT,
    RowMap,
    TokenNames,
    add_special_tokens,
    joined_vocabulary,
    surfaces,
    transplant,
)
from jam_hf.model.picture_layout_jam import PictureLayout


ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
SPECIALS = list(ROLES.values())
MORE = ["naïve café, 12 %\n\tdéjà vu", "日本語の絵", "emoji \U0001f600 \U0001f680!"]


def byte_level(which="text", size=330, **roles):
    return byte_level_tokenizer(SENTENCES[which] + MORE, size, SPECIALS, **(roles or ROLES))


def sentencepiece(which="text", size=60):
    roles = {name: token for name, token in ROLES.items() if name != "unk_token"}
    return sentencepiece_like_tokenizer(SENTENCES[which] + MORE[:1], size, ["<s>", "</s>", "<pad>"], **roles)


def unigram(which="text"):
    """As T5's: a space is U+2581, no bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=70, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES[which] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ROLES)


def wordpiece(which="text"):
    """As BERT's: "##ing" goes on a word, "ing" begins one."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES[which], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ROLES)


KINDS = {"byte level": byte_level, "sentencepiece": sentencepiece, "unigram": unigram, "wordpiece": wordpiece}


# ----- what tokens spell ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_a_text_spell_it(kind):
    """A text, tokenised, is its pieces one behind the other; at most a space stands before it."""
    tokenizer = KINDS[kind]()
    spelled = surfaces(tokenizer)
    texts = ["a small red circle", "the sky", "ruby"]
    if kind in ("byte level", "sentencepiece"):
        texts += [*MORE, "  two  spaces ", "\n\nlines\n", "\u2603 snow \x00"]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = b"".join(spelled[index] for index in ids)
        assert found == text.encode() or (kind != "byte level" and found == b" " + text.encode()), (text, found)
    assert all(spelled[index] is None for index in tokenizer.all_special_ids)


def test_surfaces_of_odd_tokens():
    tokenizer = byte_level()
    tokenizer.add_tokens(["plain added", AddedToken("  \u0120x", normalized=False), AddedToken("<mark>", special=True)])
    vocabulary, found = tokenizer.get_vocab(), surfaces(tokenizer)
    assert found[vocabulary["plain added"]] == b"plain added"
    assert found[vocabulary["  \u0120x"]] == "  \u0120x".encode()  # as it is: added tokens are no bytes in letters
    assert found[vocabulary["<mark>"]] is None
    assert found[vocabulary["\u00e3\u0123"]] == b"\xe3\x81" if "\u00e3\u0123" in vocabulary else True
    assert {spelled for spelled in found if spelled and len(spelled) == 1} == {bytes([byte]) for byte in range(256)}

    vocabulary = {"<unk>": 0, "": 1, "\u2581": 2, "<0x41>": 3, "<0xZZ>": 4, "\u2581a": 6, "a": 7}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert surfaces(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")) == [
        None, b"", b" ", b"A", b"<0xZZ>", None, b" a", b"a",
    ]  # fmt: skip


def test_byte_level_without_a_decoder_is_seen_by_its_pre_tokenizer():
    tokenizer = byte_level()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps({**state, "decoder": None})), **ROLES)
    assert surfaces(bare) == surfaces(tokenizer)


# ----- whose rows they get --------------------------------------------------------------------------------------------


def is_byte(name):
    return name in {f"<0x{byte:02X}>" for byte in range(256)}


def marked(tokenizer):
    return {*tokenizer.all_special_tokens, *(token.content for token in tokenizer.added_tokens_decoder.values())}


def slow(text, image, declared=()):
    """The rule, token by token, said as plainly as it can be."""
    ours, theirs, names = surfaces(text), surfaces(image), {index: token for token, index in text.get_vocab().items()}
    roles = dict(declared)
    for role in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        if getattr(text, role) is not None and getattr(image, role) is not None and getattr(text, role) not in roles:
            roles[getattr(text, role)] = getattr(image, role)
    found = {}

    def whose(spelled, byte_first=False):
        """Their token that spells it: an ordinary one before a byte, by which only bytes are read."""
        ids = [index for index, other in enumerate(theirs) if other == spelled]
        return min(ids, key=lambda index: (is_byte(image.convert_ids_to_tokens(index)) != byte_first, index))

    for index, name in names.items():
        spelled = ours[index]
        if index in roles:
            found[index] = (roles[index],), SAME_ROLE
        elif name in marked(text) and name in marked(image):
            found[index] = (image.get_vocab()[name],), SAME_TEXT
        elif spelled is not None and spelled in theirs and (name not in marked(text) or spelled.isspace()):
            found[index] = (whose(spelled, is_byte(name)),), SAME_TEXT
        elif spelled:
            found[index] = (), NONE
            if spelled in theirs:
                found[index] = (whose(spelled),), SAME_TEXT
            elif all(bytes([byte]) in theirs for byte in spelled):
                found[index] = tuple(whose(bytes([byte])) for byte in spelled), BYTES
            try:
                ids = image(spelled.decode(), add_special_tokens=False)["input_ids"]
                after = image("\n" + spelled.decode(), add_special_tokens=False)["input_ids"]
            except UnicodeDecodeError:
                continue
            for candidate in [ids, *(after[skip:] for skip in range(1, len(after)))]:
                if candidate and all(theirs[i] is not None for i in candidate):
                    if b"".join(theirs[i] for i in candidate) == spelled:
                        found[index] = tuple(candidate), PIECES if len(candidate) > 1 else SAME_TEXT
                        break
        else:
            found[index] = (), NONE
    return found


@pytest.mark.parametrize("image_kind", KINDS)
@pytest.mark.parametrize("text_kind", KINDS)
def test_transplants_follow_the_rule(text_kind, image_kind):
    text, image = KINDS[text_kind]("text"), KINDS[image_kind]("image")
    text.add_tokens(
        ["red circle", " leading", AddedToken("<only here>", special=True), AddedToken("<both>", special=True)]
    )
    image.add_tokens([AddedToken("<both>", special=True), "sky and"])
    pieces, coverage = transplant(text, image, len(text) + 3, {})
    expected = slow(text, image)
    assert {index: found for index, found in enumerate(pieces) if found} == {
        i: e for i, (e, _) in expected.items() if e
    }
    counts = {
        way: sum(way == other for _, other in expected.values()) for way in (SAME_TEXT, SAME_ROLE, PIECES, BYTES, NONE)
    }
    assert {way: count for way, count in counts.items() if count} == dict(coverage.counts)
    assert coverage.total == len(text.get_vocab()) and len(pieces) == len(text) + 3
    assert counts[SAME_TEXT] > 20 and counts[NONE] >= 1
    if image_kind in ("byte level", "sentencepiece"):  # all bytes have rows there
        assert counts[NONE] <= 2
    assert pieces[text.convert_tokens_to_ids("<both>")] == (image.convert_tokens_to_ids("<both>"),)
    assert pieces[text.convert_tokens_to_ids("<only here>")] == ()


def test_parts_of_a_character_are_matched_byte_by_byte():
    text, image = byte_level("text", 420), sentencepiece("image")
    ours, names = surfaces(text), image.get_vocab()
    parts = [index for index, found in enumerate(ours) if found and len(found) > 1 and is_part(found)]
    assert parts
    pieces, _ = transplant(text, image, len(text), {})
    for index in parts:
        letters = [
            chr(byte).replace(" ", "\u2581") for byte in ours[index]
        ]  # what is a token by itself is no byte there
        expected = [
            names.get(a if a.isascii() or a == "\u2581" else "", names[f"<0x{b:02X}>"])
            for a, b in zip(letters, ours[index])
        ]
        assert pieces[index] == tuple(expected)


def is_part(text):
    try:
        text.decode()
    except UnicodeDecodeError:
        return True
    return False


def test_words_get_their_pieces_with_and_without_a_space_before_them():
    text, image = byte_level("text"), sentencepiece("image", 40)
    text.add_tokens(["ruby sky", " ruby sky", "\nruby"])
    theirs = surfaces(image)
    pieces, _ = transplant(text, image, len(text), {})
    for token in ("ruby sky", " ruby sky", "\nruby"):
        found = pieces[text.get_vocab()[token]]
        assert len(found) > 1 and b"".join(theirs[index] for index in found) == token.encode()


def test_special_tokens_go_by_role_and_declaration():
    text = byte_level(eos_token="</s>", pad_token="</s>")  # one token, two roles: the first that the image parent has
    image = byte_level("image", bos_token="<pad>", eos_token="<unk>")
    ids, theirs = text.get_vocab(), image.get_vocab()
    assert transplant(text, image, len(text), {})[0][ids["</s>"]] == (theirs["<unk>"],)
    declared = {ids["</s>"]: theirs["<s>"], ids["a"]: 5}
    pieces, coverage = transplant(text, image, len(text), declared)
    assert pieces[ids["</s>"]] == (theirs["<s>"],) and pieces[ids["a"]] == (5,) and coverage.counts[SAME_ROLE] == 2
    text.add_tokens([AddedToken("<new>", special=True), AddedToken("<newer>", special=True)])
    ids = text.get_vocab()
    pieces, coverage = transplant(text, image, len(text), {ids["<newer>"]: 9}, {"<new>", "<newer>"})
    assert pieces[ids["<new>"]] == () and pieces[ids["<newer>"]] == (9,) and coverage.total == len(text) - 1


def test_ordinary_tokens_come_before_bytes():
    """Training never touched the row of `<0x61>` where "a" is a token; what is a byte in both is a byte in both."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "b ", "\u2581"]
    image = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    image.normalizer = normalizers.Replace(" ", "\u2581")
    image.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    image = PreTrainedTokenizerFast(tokenizer_object=image, unk_token="<unk>")
    theirs = image.get_vocab()
    text = byte_level()
    pieces, _ = transplant(text, image, len(text), {})
    for token, wanted in {"a": "a", "b": "b", "\u0120": "\u2581", "c": "<0x63>", "\u010a": "<0x0A>"}.items():
        assert pieces[text.get_vocab()[token]] == (theirs[wanted],), token
    text = sentencepiece()
    pieces, _ = transplant(text, image, len(text), {})
    for token, wanted in {"a": "a", "<0x61>": "<0x61>", "<0x0A>": "<0x0A>", "\u2581": "\u2581"}.items():
        assert pieces[text.get_vocab()[token]] == (theirs[wanted],), token


@pytest.mark.parametrize("image_kind", ("byte level", "sentencepiece"))
def test_a_texts_tokens_get_the_rows_that_the_image_parent_reads_for_it(image_kind):
    """Where both split a text alike, the transplant gives each token what the image parent itself reads there."""
    text, image = sentencepiece("text"), KINDS[image_kind]("image")
    pieces, _ = transplant(text, image, len(text), {})
    for word in ["A", "3.", "x", "the circle is red, 12 %", "a\nb"]:
        mine = text(word, add_special_tokens=False)["input_ids"]
        theirs = image(" " + word if image_kind == "byte level" else word, add_special_tokens=False)["input_ids"]
        ours, others = surfaces(text), surfaces(image)
        if [ours[i] for i in mine] == [others[i] for i in theirs]:
            assert [pieces[i] for i in mine] == [(i,) for i in theirs], word
    assert pieces[text.get_vocab()["a"]] == (image.get_vocab()["a"],)


def test_special_tokens_match_special_and_added_tokens_alone():
    """Qwen3 has ordinary entries `<s>` and `</s>`, which its encoding never yields: no counterpart of a bos."""
    vocabulary = {**byte_level().get_vocab()}
    ordinary = ["<mark>", "<other>", "<tool>"]
    state = json.loads(byte_level("image").backend_tokenizer.to_str())
    state["model"]["vocab"] |= {name: len(vocabulary) + 10 + i for i, name in enumerate(ordinary)}
    image = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    for name in ordinary:  # as Qwen3 does
        assert image.get_vocab()[name] not in image(f"a {name} b")["input_ids"]
    text = byte_level()
    text.add_tokens([AddedToken("<mark>", special=True), AddedToken("<tool>"), AddedToken("<other>", special=True)])
    ids = text.get_vocab()
    pieces, coverage = transplant(text, image, len(text), {})
    assert pieces[ids["<mark>"]] == pieces[ids["<other>"]] == () and coverage.counts[NONE] >= 2
    # An added token that is no special one spells its name; what the image parent reads there are the pieces of the
    # name.
    assert pieces[ids["<tool>"]] == tuple(image("<tool>", add_special_tokens=False)["input_ids"])
    # Added on both sides, special or not, it is one token.
    image = byte_level("image")
    image.add_tokens([AddedToken("<tool>", special=True), AddedToken("<mark>")])
    pieces, _ = transplant(text, image, len(text), {})
    for name in ("<tool>", "<mark>"):
        assert pieces[ids[name]] == (image.get_vocab()[name],)


def test_added_runs_of_spaces_are_spaces():
    """Gemma 3 adds runs of U+2581, which decode to spaces; a byte-level tokenizer has such runs as ordinary tokens."""
    gemma = sentencepiece()
    gemma.add_tokens([AddedToken("\u2581" * count, normalized=False) for count in (2, 3, 5)])
    qwen = byte_level()
    qwen.add_tokens(["  ", "   "])
    found, theirs = surfaces(gemma), gemma.get_vocab()
    for count in (2, 3, 5):
        assert found[theirs["\u2581" * count]] == b" " * count
        assert gemma.decode([theirs["a"], theirs["\u2581" * count], theirs["a"]]) == "a" + " " * count + "a"
    pieces, _ = transplant(qwen, gemma, len(qwen), {})
    for count in (2, 3):
        assert pieces[qwen.get_vocab()[" " * count]] == (theirs["\u2581" * count],)
    pieces, _ = transplant(gemma, qwen, len(gemma), {})
    for count in (2, 3):
        assert pieces[theirs["\u2581" * count]] == (qwen.get_vocab()[" " * count],)
    read = surfaces(qwen)
    assert b"".join(read[index] for index in pieces[theirs["\u2581" * 5]]) == b" " * 5
    literal = byte_level()  # a byte-level decoder leaves them what they are
    literal.add_tokens([AddedToken("\u2581\u2581", normalized=False)])
    assert surfaces(literal)[-1] == "\u2581\u2581".encode()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.text(max_size=6), unique=True, max_size=6),
    st.lists(st.text(max_size=6), unique=True, max_size=6),
    st.booleans(),
)
def test_any_added_tokens_follow_the_rule(ours, theirs, swap):
    text, image = copy.deepcopy(TEXT), copy.deepcopy(IMAGE)
    if swap:
        text, image = image, text
    text.add_tokens([token for token in ours if token.strip()])
    image.add_tokens([token for token in theirs if token.strip()])
    pieces, _ = transplant(text, image, len(text), {})
    assert {i: found for i, found in enumerate(pieces) if found} == {
        i: e for i, (e, _) in slow(text, image).items() if e
    }


TEXT, IMAGE = byte_level("text"), sentencepiece("image")


# ----- the rows -------------------------------------------------------------------------------------------------------


@st.composite
def maps(draw, rows=9):
    """Maps with a leading part that is the parent's own, and anything behind it."""
    identity = draw(st.integers(0, rows))
    rest = draw(st.lists(st.lists(st.integers(0, rows - 1), max_size=4).map(tuple), max_size=12))
    return [*((row,) for row in range(identity)), *rest]


@pytest.fixture(scope="module")
def decoder():
    config = LlamaConfig(vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    return {dtype: Decoder(Parent(LlamaForCausalLM(config).to(dtype), "text parent"), ("llama",)) for dtype in DTYPES}


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(maps(), st.data())
def test_rows_are_means_of_the_parents_rows(decoder, pieces, data):
    row_map = RowMap.of(pieces)
    assert len(row_map) == len(pieces) and row_map.present.tolist() == [bool(ids) for ids in pieces]
    assert all(pieces[index] == (index,) for index in range(row_map.identity))
    first = data.draw(st.integers(0, len(pieces)))
    last = data.draw(st.integers(first, len(pieces)))
    dtype = data.draw(st.sampled_from(DTYPES))
    folded = data.draw(st.booleans())
    one = decoder[dtype]
    table = one.parent.get(one.embedding_key)
    mean = table.double().mean(0).to(dtype)
    extra = torch.full((2, 4), 7.0).to(dtype)
    if folded:  # rows behind the table are made of other modules
        pieces = [*pieces, (9,), (10, 3)]
        row_map, last, table = RowMap.of(pieces), len(pieces), torch.cat((table, extra))
    codes = ImageCodes(torch.arange(9, 11), folded=extra) if folded else None
    rows = VocabularyRows(one, one.embedding_key, row_map, codes)

    made = rows.read(first, last)
    expected = [table[list(ids)].float().mean(0).to(dtype) if ids else mean for ids in pieces[first:last]]
    assert made.dtype == dtype and made.shape == (last - first, 4)
    for ids, got, wanted in zip(pieces[first:last], made, expected):
        if len(ids) <= 1:
            assert torch.equal(got, wanted)
        else:  # sums of floats in another order
            torch.testing.assert_close(got, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert (rows._table is None) or rows.loads  # what is kept is announced
    rows.release()
    assert rows._table is None


def test_rows_that_are_the_parents_own_are_never_kept(decoder):
    """Also where a block reaches from them into rows of which the parent knows nothing."""
    one = decoder[torch.float32]
    rows = VocabularyRows(one, one.embedding_key, RowMap.of([*((row,) for row in range(9)), (), ()]))
    assert torch.equal(rows.read(0, 11)[:9], one.parent.get(one.embedding_key))
    assert rows._table is None and rows.loads == 0


# ----- new ids --------------------------------------------------------------------------------------------------------


def with_holes(vocabulary):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [])))


@pytest.mark.parametrize(
    "vocabulary", [{"a": 0, "b": 1, "c": 2, "d": 5, "e": 4}, {"a": 0, "b": 1, "c": 9}, {"a": 1, "b": 2}]
)
def test_new_tokens_in_a_vocabulary_with_holes_are_refused(vocabulary):
    """tokenizers counts: the new token would get the id of "d"."""
    with pytest.raises(ValueError, match="behind all others.* ids have no token.*tokenizer.json"):
        add_special_tokens(with_holes(vocabulary), ["<break>", "<image>"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sets(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, 4))
def test_new_ids_are_new_or_refused(ids, count):
    vocabulary = {chr(ord("a") + index): index for index in ids}
    tokenizer, names = with_holes(vocabulary), [f"<new:{i}>" for i in range(count)]
    try:
        assert add_special_tokens(tokenizer, names) == names
    except ValueError:
        assert max(ids) + 1 > len(ids)  # only where there are holes
    else:
        assert tokenizer.convert_tokens_to_ids(names) == list(range(max(ids) + 1, max(ids) + 1 + count))
        assert tokenizer.convert_ids_to_tokens(sorted(ids)) == [chr(ord("a") + index) for index in sorted(ids)]


def test_an_ordinary_token_is_no_markup():
    tokenizer = with_holes({"a": 0, "<break>": 1})
    with pytest.raises(ValueError, match="'<break>' as an ordinary token .*break_token="):
        add_special_tokens(tokenizer, ["<break>"])


@pytest.mark.parametrize(
    ("there", "first"),
    [
        ([], "<mask>"),
        (["<mask>"], "<jam:mask>"),
        (["<image>", "<mask:3>"], "<jam:mask>"),
        (["<mask>", "<other>", *(f"<mask:{i}>" for i in range(1, 8))], "<jam:mask>"),
        (["<mask>", *(f"<mask:{i}>" for i in range(1, 12))], "<mask>"),
    ],
)
def test_markup_that_is_there_does_not_shrink_the_sentinels(there, first):
    text, image = byte_level(), byte_level("image")
    text.add_tokens([AddedToken(token, special=True) for token in there])
    names = TokenNames()
    joined = joined_vocabulary(text, len(text), image, torch.arange(5), None, names, {})
    mask, count = joined.ids["mask_token_id"], joined.ids["num_mask_tokens"]
    assert count == (12 if len(there) == 12 else names.num_mask_tokens)
    sentinels = joined.tokenizer.convert_ids_to_tokens(list(range(mask, mask + count)))
    assert sentinels == [first, *(f"{first[:-1]}:{i}>" for i in range(1, count))]
    assert all(
        joined.tokenizer(token, add_special_tokens=False)["input_ids"] == [mask + i]
        for i, token in enumerate(sentinels)
    )


def test_a_mask_token_that_was_asked_for_is_not_renamed():
    text = byte_level()
    text.add_tokens([AddedToken("[MASK]", special=True)])
    arguments = (byte_level("image"), torch.arange(5), None)
    with pytest.raises(ValueError, match=r"some of the 8 sentinels '\[MASK\]'.*mask_token="):
        joined_vocabulary(text, len(text), *arguments, TokenNames(mask_token="[MASK]"), {})
    joined = joined_vocabulary(text, len(text), *arguments, TokenNames(mask_token="[GAP]"), {})
    assert joined.ids["num_mask_tokens"] == 8 and "[GAP]:7" in joined.added


def test_layout_tokens_take_no_ordinary_tokens_place():
    state = json.loads(byte_level().backend_tokenizer.to_str())
    state["model"]["vocab"]["<row>"] = len(byte_level())
    text = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **ROLES)
    joined = joined_vocabulary(
        text,
        len(text),
        byte_level("image"),
        torch.arange(5),
        PictureLayout(begin=1, end=2, row_end=0),
        TokenNames(),
        {},
    )
    assert (
        joined.layout["image_row_end_token"] == "<jam:row>"
        and joined.ids["image_row_end_token_id"] >= len(byte_level()) + 1
    )
