from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import CorruptWeights, NotFound
from core.weights.gguf import GgufCheckpoint
from tests.core.weights import gguf_bytes as raw
from tests.core.weights.gguf_bytes import GgufBytes
from tests.support.models import TINY_MODELS, random_weights, write_gguf

HUGE = 2**64 - 1


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_and_tensors_are_what_was_written(tmp_path: Path, version: int) -> None:
    checkpoint = GgufCheckpoint(GgufBytes(version=version).write(tmp_path / "m.gguf"))
    metadata = checkpoint.metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["words"] == ["a", "", "Grüße"]
    assert metadata["numbers"].tolist() == [7, 8]
    assert metadata["switches"].tolist() == [True, False]
    assert (metadata["scale"], metadata["flag"]) == (0.5, True)
    assert list(metadata) == [
        "general.architecture",
        "words",
        "numbers",
        "switches",
        "scale",
        "flag",
    ]
    assert checkpoint.tensor_names == ("matrix", "vector")
    assert checkpoint.shape("matrix") == (2, 8)
    assert checkpoint.size_bytes("vector") == 16
    assert checkpoint.read("matrix").tolist() == np.arange(16.0).reshape(2, 8).tolist()
    assert checkpoint.read("vector").tolist() == [16.0, 17.0, 18.0, 19.0]
    checkpoint.close()


def test_the_library_reads_the_same_from_a_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", TINY_MODELS["llama3"], extra={"words": ["x", "yz"]})
    checkpoint, library = GgufCheckpoint(path), gguf.GGUFReader(path)
    assert set(checkpoint.tensor_names) == {tensor.name for tensor in library.tensors}
    for tensor in library.tensors:
        assert checkpoint.shape(tensor.name) == tuple(reversed(tensor.shape.tolist()))
        assert checkpoint.size_bytes(tensor.name) == tensor.n_bytes
        assert np.array_equal(checkpoint.read(tensor.name), tensor.data)
    for key, value in checkpoint.metadata.items():
        assert value == library.fields[key].contents()


def test_only_bytes_that_are_read_are_counted(tmp_path: Path) -> None:
    checkpoint = GgufCheckpoint(GgufBytes().write(tmp_path / "m.gguf"))
    assert checkpoint.metadata["words"]
    assert checkpoint.bytes_read == 0
    checkpoint.read("vector")
    assert checkpoint.bytes_read == 16
    checkpoint.read("matrix")
    assert checkpoint.bytes_read == 16 + 64


def test_a_tensor_of_many_pages_can_be_read_again(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "m.gguf", model))
    expected = random_weights(model)["model.embed_tokens.weight"]
    assert expected.nbytes > 16 * 4096
    for _ in range(2):  # its pages are given back after the first time
        assert np.array_equal(checkpoint.read("token_embd.weight"), expected)


def test_arrays_outlive_the_file(tmp_path: Path) -> None:
    checkpoint = GgufCheckpoint(GgufBytes().write(tmp_path / "m.gguf"))
    values, numbers = checkpoint.read("vector"), checkpoint.metadata["numbers"]
    checkpoint.close()
    values += 1
    assert values.tolist() == [17.0, 18.0, 19.0, 20.0]
    assert numbers.tolist() == [7, 8]


def test_rows_and_whole_tensors_have_the_same_digest(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", TINY_MODELS["llama"])
    whole, by_rows = GgufCheckpoint(path), GgufCheckpoint(path)
    name = "token_embd.weight"
    num_rows, _ = whole.shape(name)
    whole.read(name)
    for first in (0, num_rows // 2):
        by_rows.read_rows(name, first=first, count=num_rows // 2)
    assert whole.digest_of([name]) == by_rows.digest_of([name])
    before = whole.digest_of([name])
    whole.read(name)
    assert whole.digest_of([name]) == before
    with pytest.raises(KeyError):
        whole.digest_of(["output_norm.weight"])


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = GgufBytes().to_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptWeights, match=r"cut\.gguf"):
            GgufCheckpoint(path)


def test_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="No such file"):
        GgufCheckpoint(tmp_path / "none.gguf")


HOSTILE = {
    "magic": (GgufBytes(magic=b"GGML"), "does not begin with 'GGUF'"),
    "version 1": (GgufBytes(version=1), "version is 1"),
    "version 4": (GgufBytes(version=4), "version is 4"),
    "big-endian": (GgufBytes(version=3 << 24), "big-endian"),
    "huge tensor count": (GgufBytes(num_tensors=HUGE), "claims 18446744073709551615 tensors"),
    "huge key count": (GgufBytes(num_key_values=HUGE), "claims 18446744073709551615 key-values"),
    "one tensor too many": (GgufBytes(num_tensors=3), ""),
    "duplicate key": (
        GgufBytes(key_values=[raw.u32("a", 1), raw.u32("a", 2)]),
        "'a' occurs twice",
    ),
    "key not UTF-8": (
        GgufBytes(key_values=[raw.string(b"\xff\xfe") + b"\x04\x00\x00\x00" * 2]),
        "a key is not UTF-8",
    ),
    "huge key": (GgufBytes(key_values=[struct.pack("<Q", HUGE)], tensors=[]), "ends inside a key"),
    "string not UTF-8": (
        GgufBytes(key_values=[raw.key_value("a", raw.STRING, raw.string(b"\xc3\x28"))]),
        "value of 'a' is not UTF-8",
    ),
    "huge string": (
        GgufBytes(key_values=[raw.key_value("a", raw.STRING, struct.pack("<Q", HUGE))]),
        "ends inside the value of 'a'",
    ),
    "unknown value type": (
        GgufBytes(key_values=[raw.key_value("a", 13, bytes(8))]),
        "unknown type 13",
    ),
    "huge array": (GgufBytes(key_values=[raw.array("a", raw.U64, HUGE, b"")]), "the array 'a'"),
    "huge array of strings": (
        GgufBytes(key_values=[raw.array("a", raw.STRING, HUGE, b"")]),
        "claims 18446744073709551615 strings",
    ),
    "array of long strings": (
        GgufBytes(key_values=[raw.array("a", raw.STRING, 2, struct.pack("<QQ", 2**40, 1))]),
        "the array 'a'",
    ),
    "nested array": (
        GgufBytes(key_values=[raw.array("a", raw.ARRAY, 1, bytes(12))]),
        "unsupported type 9",
    ),
    "alignment 0": (GgufBytes(key_values=[raw.u32("general.alignment", 0)]), "alignment 0"),
    "alignment 24": (GgufBytes(key_values=[raw.u32("general.alignment", 24)]), "alignment 24"),
    "alignment of 2 GiB": (
        GgufBytes(key_values=[raw.u32("general.alignment", 1 << 31)]),
        "alignment 2147483648",
    ),
    "alignment as text": (
        GgufBytes(key_values=[raw.key_value("general.alignment", raw.STRING, raw.string("32"))]),
        "alignment '32'",
    ),
    "tensor without name": (GgufBytes(tensors=[raw.tensor("", [4])]), "0 characters"),
    "duplicate tensor": (
        GgufBytes(tensors=[raw.tensor("t", [4]), raw.tensor("t", [4], offset=32)]),
        "'t' occurs twice",
    ),
    "no dimensions": (GgufBytes(tensors=[raw.tensor("t", [])]), "0 dimensions"),
    "five dimensions": (GgufBytes(tensors=[raw.tensor("t", [1] * 5)]), "5 dimensions"),
    "billions of dimensions": (
        GgufBytes(tensors=[raw.string("t") + struct.pack("<I", 2**32 - 1) + bytes(64)]),
        "4294967295 dimensions",
    ),
    "empty dimension": (GgufBytes(tensors=[raw.tensor("t", [4, 0])]), "does not consist of F32"),
    "product beyond 64 bits": (
        GgufBytes(tensors=[raw.tensor("t", [2**32, 2**32, 2**32, 2])]),
        "reaches byte",
    ),
    "product that wraps to 4": (
        GgufBytes(tensors=[raw.tensor("t", [4, 2**63, 2])]),
        "reaches byte",
    ),
    "row is no whole block": (
        GgufBytes(tensors=[raw.tensor("t", [33], block_type=raw.TYPE_Q4_0)]),
        "does not consist of Q4_0 blocks",
    ),
    "removed type": (GgufBytes(tensors=[raw.tensor("t", [32], block_type=4)]), "unknown type 4"),
    "unknown type": (
        GgufBytes(tensors=[raw.tensor("t", [32], block_type=2**31)]),
        "unknown type 2147483648",
    ),
    "unaligned offset": (GgufBytes(tensors=[raw.tensor("t", [4], offset=4)]), "not aligned"),
    "offset beyond the file": (
        GgufBytes(tensors=[raw.tensor("t", [4], offset=96)]),
        "is it cut short?",
    ),
    "offset that wraps": (
        GgufBytes(tensors=[raw.tensor("t", [4], offset=2**64 - 32)]),
        "is it cut short?",
    ),
    "overlap": (
        GgufBytes(tensors=[raw.tensor("a", [16]), raw.tensor("b", [4], offset=32)]),
        "'a' and 'b' overlap",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    file, reason = HOSTILE[name]
    path = file.write(tmp_path / "hostile.gguf")
    tracemalloc.start()
    with pytest.raises(CorruptWeights) as refusal:
        GgufCheckpoint(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert peak_bytes < 1_000_000


def test_a_string_array_that_is_not_utf8_is_refused_when_parsed(tmp_path: Path) -> None:
    file = GgufBytes(key_values=[raw.array("a", raw.STRING, 1, raw.string(b"\xff"))])
    checkpoint = GgufCheckpoint(file.write(tmp_path / "m.gguf"))
    with pytest.raises(CorruptWeights, match="an item of 'a' is not UTF-8"):
        checkpoint.metadata["a"]


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8)
)
def test_damaged_bytes_never_raise_anything_else(
    tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(GgufBytes().to_bytes())
    for position, value in changes:
        content[position % len(content)] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    try:
        checkpoint = GgufCheckpoint(path)
        for key in checkpoint.metadata:
            checkpoint.metadata[key]
        for name in checkpoint.tensor_names:
            assert checkpoint.read(name).shape == checkpoint.shape(name)
        checkpoint.close()
    except CorruptWeights:
        pass


def test_unused_tensors_of_unreadable_types_do_not_hinder(tmp_path: Path) -> None:
    integers = gguf.GGMLQuantizationType.I32
    file = GgufBytes(tensors=[raw.tensor("ids", [4], block_type=integers), raw.TENSORS[1]])
    checkpoint = GgufCheckpoint(file.write(tmp_path / "m.gguf"))
    assert checkpoint.read("vector").tolist() == [16.0, 17.0, 18.0, 19.0]
    with pytest.raises(CorruptWeights, match="type I32 cannot be decoded"):
        checkpoint.read("ids")
    checkpoint.close()


def test_other_alignments_are_followed(tmp_path: Path) -> None:
    file = GgufBytes(
        key_values=[raw.u32("general.alignment", 8)],
        tensors=[raw.tensor("t", [2], offset=8)],
        alignment=8,
        data=struct.pack("<4f", 1, 2, 3, 4),
    )
    checkpoint = GgufCheckpoint(file.write(tmp_path / "m.gguf"))
    assert checkpoint.read("t").tolist() == [3.0, 4.0]


def test_an_unknown_tensor_is_a_key_error(tmp_path: Path) -> None:
    checkpoint = GgufCheckpoint(GgufBytes().write(tmp_path / "m.gguf"))
    for method in (checkpoint.read, checkpoint.shape, checkpoint.size_bytes):
        with pytest.raises(KeyError):
            method("none")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_a_quantised_model_reads_as_the_library_decodes_it(tmp_path: Path, kind: str) -> None:
    block_type = gguf.GGMLQuantizationType[kind]
    model = TINY_MODELS["qwen2"]
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "m.gguf", model, block_type=block_type))
    weights = random_weights(model)["model.layers.1.mlp.up_proj.weight"]
    expected = gguf.dequantize(gguf.quantize(weights, block_type), block_type)
    assert np.array_equal(checkpoint.read("blk.1.ffn_up.weight"), expected)
    assert checkpoint.block_type("blk.1.ffn_up.weight") == kind
