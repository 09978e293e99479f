"""safetensors files in blocks of rows, against the safetensors package: what one writes the other reads, and
refuses alike.
"""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from jam_hf.checkpoints.tensor_files import DTYPES, TensorFile, TensorFileWriter, TensorSpec


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text("abc.", min_size=1, max_size=8) | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8
).filter(lambda name: name != "__metadata__")
quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def random_tensor(shape, dtype, seed):
    """Any bits at all: NaN payloads and negative zeros must come back as they were."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


def bits(tensor):
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@st.composite
def states(draw):
    names = draw(st.lists(NAMES, unique=True, max_size=5))
    return {
        name: random_tensor(draw(SHAPES), DTYPES[draw(st.sampled_from(sorted(DTYPES)))], index)
        for index, name in enumerate(names)
    }


def write(path, state, order):
    writer = TensorFileWriter(path, {key: TensorSpec(tuple(t.shape), t.dtype) for key, t in state.items()})
    for key, first, last in order:
        writer.write(key, first, state[key][first:last] if state[key].dim() else state[key])
    writer.close()


@quick
@given(states(), st.randoms(use_true_random=False))
def test_what_is_written_the_package_reads(tmp_path, state, random):
    rows = [(key, i, i + 1) for key, t in state.items() for i in range(t.shape[0] if t.dim() else 1)]
    random.shuffle(rows)
    write(tmp_path / "ours.safetensors", state, rows)
    read = load_file(tmp_path / "ours.safetensors")
    assert read.keys() == state.keys() and all(same(read[key], state[key]) for key in state)
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for key in state:
            assert same(file.get_tensor(key), state[key])
    save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    plain = all(name.isascii() and name.isprintable() for name in state)  # other letters are escaped in another way
    if plain and len({tensor.dtype.itemsize for tensor in state.values()}) == len({t.dtype for t in state.values()}):
        theirs, ours = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("theirs", "ours"))
        assert theirs == ours


@quick
@given(states(), st.data())
def test_what_the_package_writes_is_read(tmp_path, state, data):
    save_file(state, tmp_path / "theirs.safetensors")
    file = TensorFile(tmp_path / "theirs.safetensors")
    assert file.specs == {key: TensorSpec(tuple(t.shape), t.dtype) for key, t in state.items()}
    for key, tensor in state.items():
        assert same(file.read(key), tensor)
        if tensor.dim():
            first = data.draw(st.integers(0, len(tensor)))
            last = data.draw(st.integers(first, len(tensor)))
            assert same(file.read(key, first, last), tensor[first:last])
    file.close()


def test_rows_of_other_tensors_are_never_read(tmp_path):
    save_file({"a": torch.ones(3, 2), "b": torch.ones(5, 2)}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    for first, last in ((0, 4), (2, 4), (-1, 2), (3, 2)):
        with pytest.raises(IndexError, match="'a'"):
            file.read("a", first, last)


def raw(header, data=b"", padding=b""):
    text = (header if isinstance(header, str) else json.dumps(header)).encode() + padding
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, first, last, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


TWICE = json.dumps({"a": entry([1], 0, 4)})[:-1] + ", " + json.dumps({"a": entry([1], 0, 4)})[1:]
DAMAGED = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"1234567", "7"),
    "no header": (struct.pack("<Q", 0), "0 bytes"),
    "header beyond the file": (struct.pack("<Q", 500) + b"{}", "500 bytes"),
    "huge header": (struct.pack("<Q", 2**63) + b"{}", "bytes"),
    "garbage": (raw("{not json"), "damaged"),
    "not utf-8": (struct.pack("<Q", 4) + b'{"\xff}', "damaged"),
    "a list": (raw([1, 2]), "damaged"),
    "deep": (raw("[" * 50_000), "damaged"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
    "no dtype": (raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"), "no 'dtype'"),
    "entry is no mapping": (raw({"a": 3}), "damaged"),
    "lying shape": (raw({"a": entry([3], 0, 4)}, b"1234"), "'a' of shape \\[3\\].* takes 4 bytes, not 12"),
    "wraps to nothing": (
        raw({"a": entry([2**32, 2**32], 0, 0)}),
        "'a' has the shape .* more elements than can be counted",
    ),
    "wraps to four": (raw({"a": entry([2**61 + 1, 8], 0, 32)}, b"1234" * 8), "'a' has the shape"),
    "wraps in bytes": (raw({"a": entry([2**62], 0, 0)}), "'a' has the shape"),
    "negative shape": (raw({"a": entry([-1, -1], 0, 4)}, b"1234"), "'a' has the shape"),
    "broken shape": (raw({"a": entry([1.0], 0, 4)}, b"1234"), "'a' has the shape"),
    "three offsets": (raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"1234"), "'a'"),
    "backwards": (raw({"a": entry([1], 4, 0)}, b"1234"), "'a'"),
    "overlap": (raw({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"1234" * 3), "'b' overlaps"),
    "same place": (raw({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234"), "'b' overlaps"),
    "gap": (raw({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"1234" * 3), "'b' lies behind a gap"),
    "begins late": (raw({"a": entry([1], 4, 8)}, b"1234" * 2), "'a' lies behind a gap"),
    "twice": (raw(TWICE, b"1234"), "'a' stands there twice"),
    "cut in a tensor": (raw({"a": entry([1], 0, 4), "b": entry([2], 4, 12)}, b"1234" * 2), "'b' \\(1 of 2\\)"),
    "cut before a tensor": (raw({"a": entry([1], 0, 4), "b": entry([1], 4, 8)}, b"12"), "'a' \\(2 of 2\\)"),
    "more behind": (raw({"a": entry([1], 0, 4)}, b"1234" * 2), "behind its"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_as_the_package_refuses_them(name, tmp_path):
    content, words = DAMAGED[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        TensorFile(path)
    assert str(path) in str(error.value) and "Fetch or save it again" in str(error.value)
    if name not in ("twice", "cut before a tensor"):  # of doubled keys, the package takes one
        with pytest.raises((SafetensorError, ValueError)):
            load_file(path)


def test_dtypes_that_no_parent_should_have_are_named(tmp_path):
    save_file({"w": torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors: tensor 'w' has the dtype F8_E4M3; .* unquantised"):
        TensorFile(tmp_path / "x.safetensors")


def test_padded_headers_and_metadata(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(
        raw({"__metadata__": {"by": "x"}, "a": entry([1], 0, 4)}, b"\0\0\x80\x3f", b"   ")
    )
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.specs.keys() == {"a"} and file.read("a").tolist() == [1.0]


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    save_file({"a": torch.ones(1000)}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("r+b") as handle:
        handle.truncate(500)
    with pytest.raises(ValueError, match=r"x\.safetensors ends inside tensor 'a'"):
        file.read("a")


def test_files_are_closed(tmp_path):
    import os

    before = len(os.listdir("/proc/self/fd"))
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    for _ in range(5):
        file = TensorFile(tmp_path / "x.safetensors")
        file.close()
        file.close()
        with pytest.raises(ValueError):
            TensorFile(tmp_path / "bad.safetensors")
        with pytest.raises(TypeError):
            TensorFileWriter(tmp_path / "y.safetensors", {"a": TensorSpec(("1",), torch.float32)})
    assert len(os.listdir("/proc/self/fd")) == before
