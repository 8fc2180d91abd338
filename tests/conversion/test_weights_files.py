"""Reading and writing weights files: lazily, safely, as a stream."""

import errno
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from weights_conversion import files
from weights_conversion.files import find_weights, open_file, open_weights, read_json, write_safetensors


def mixed_tensors():
    """Tensors of many formats and shapes, some of odd sizes, empty or without dimensions."""
    generator = torch.Generator().manual_seed(0)
    return {
        "b.half": torch.randn(3, 5, generator=generator).half(),
        "a.float": torch.randn(7, generator=generator),
        "bf16": torch.randn(5, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "ints": torch.arange(9).reshape(3, 3),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "transposed": torch.randn(4, 6, generator=generator).T,
        "double": torch.randn(2, generator=generator).double(),
    }


@pytest.mark.parametrize("chunk", [3, 1 << 24])
def test_written_files_are_read_by_the_library(tmp_path, monkeypatch, chunk):
    """Names, shapes, formats and numbers survive; the header says that torch wrote the file."""
    monkeypatch.setattr(files, "CHUNK", chunk)
    tensors = mixed_tensors()
    pieces = []
    write_safetensors(tmp_path / "x.safetensors", tensors, on_bytes=pieces.append)
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    assert all(back[name].dtype == tensors[name].dtype for name in tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert sum(pieces) == sum(tensor.nbytes for tensor in tensors.values())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_bytes_are_those_of_the_library(tmp_path):
    """For one dtype the file is the same byte for byte."""
    tensors = {name: torch.randn(3, index + 1) for index, name in enumerate(["z", "a.1", "a.10", "ä"])}
    write_safetensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_casting_touches_floating_point_alone(tmp_path):
    """Floats are rounded to the nearest half; integers, bytes and flags stay."""
    tensors = mixed_tensors()
    write_safetensors(tmp_path / "x.safetensors", tensors, torch.float16)
    back = load_file(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor.half() if tensor.is_floating_point() else tensor)


def test_casting_from_eight_bits(tmp_path):
    """torch cannot ask such numbers whether they are finite."""
    numbers = torch.tensor([0.5, -448.0, 0.0], dtype=torch.float8_e4m3fn)
    write_safetensors(tmp_path / "a.safetensors", {"a": numbers}, torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], numbers.bfloat16())
    large = torch.full((2,), 57344.0, dtype=torch.float8_e5m2)
    write_safetensors(tmp_path / "a.safetensors", {"a": large}, torch.float16)
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [57344, 57344]


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, name):
    """Is neither missing nor damaged."""
    (tmp_path / name).write_bytes(b"whole")

    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "open", refuse)
    with pytest.raises(OSError, match=f"{name} cannot be read: Permission denied"):
        open_file(tmp_path / name)


def test_a_format_without_a_name_is_refused(tmp_path):
    """Complex numbers have no place in the format."""
    with pytest.raises(ValueError, match="complex64"):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(2, dtype=torch.complex64)})


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_getting_a_tensor_maps_the_file(tmp_path, kind):
    """Two tensors of one file lie in one mapping of it, and none of it is the process's own memory."""
    tensors = {f"t{index}": torch.full((1 << 20,), float(index)) for index in range(8)}
    path = tmp_path / f"x.{kind}"
    save_file(tensors, path) if kind == "safetensors" else torch.save(tensors, path)
    anonymous_memory()  # skips where it cannot be counted
    command = [sys.executable, "-c", MAPPED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    total, growth = map(float, done.stdout.split())
    assert total == 28 * 2**20
    assert growth < 2**23  # of 2**25 bytes


MAPPED = """
import re, sys, torch
from pathlib import Path
from weights_conversion.files import open_file

memory = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
torch.ones(1).sum()
before = memory()
opened = dict(open_file(Path(sys.argv[1])).items())
print(sum(float(tensor.sum()) for tensor in opened.values()), memory() - before)
"""
"""In a process of its own: one that keeps freed memory would put copies there."""


def anonymous_memory():
    """The bytes of memory of this process that belong to no file."""
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is counted in the way of Linux")
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


STREAM = """
import re, sys, torch
from pathlib import Path
from weights_conversion.files import open_file, write_safetensors

source, copy = map(Path, sys.argv[1:])
memory = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
write_safetensors(source, {f"t{i}": torch.full((1 << 20,), float(i)) for i in range(24)})
before, during = memory(), []
write_safetensors(copy, open_file(source), torch.float64, lambda count: during.append(memory()))
print(len(during), max(during) - before)
"""


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    """Casting 24 tensors to 8 MB each takes the memory of one. The allocator is told to give freed memory back."""
    anonymous_memory()  # skips where it cannot be counted
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", STREAM, str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    count, growth = map(int, done.stdout.split())
    assert count == 24
    assert growth < 1.5 * 8 * 2**20


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "header too small"),
        (b"\x10\0\0", "header too small"),
        (b"\xff" * 8 + b"{}", "header too large"),
        (b"these are certainly not weights", "header too large"),
        (b"\x08\0\0\0\0\0\0\0not json", "header"),
    ],
)
def test_a_damaged_safetensors_file(tmp_path, content, reason):
    """One sentence with the file's name and the reason."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.safetensors is not a whole safetensors file: .*{reason}"):
        open_file(path)


@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_a_truncated_safetensors_file(tmp_path, kept):
    """A download that stopped is noticed when the file is opened."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ValueError, match=r"x\.safetensors is not a whole safetensors file"):
        open_file(path)


def test_a_number_format_that_torch_lacks(tmp_path):
    """Six-bit floats: an error with the file's and the tensor's name."""
    header = b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with pytest.raises(ValueError, match=r"x\.safetensors.*'a'|x\.safetensors is not a whole safetensors file"):
        open_file(tmp_path / "x.safetensors")["a"]


class Code:
    """An object whose pickle creates a file when it is read by a careless program."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_is_refused(tmp_path):
    """The code does not run; the error is one sentence with the file's name."""
    torch.save({"a": torch.zeros(2), "b": Code(str(tmp_path / "ran"))}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"x\.bin is refused: it holds Python objects other than tensors") as error:
        open_file(tmp_path / "x.bin")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "old format", "plain pickle"])
def test_a_damaged_bin_file(tmp_path, damage):
    """One sentence with the file's name."""
    path = tmp_path / "x.bin"
    torch.save({"a": torch.randn(1000)}, path, _use_new_zipfile_serialization=damage != "old format")
    contents = {
        "empty": b"",
        "garbage": b"garbage",
        "truncated": path.read_bytes()[:2000],
        "old format": path.read_bytes(),
        "plain pickle": pickle.dumps({"a": Code(str(tmp_path / "ran"))}),
    }
    path.write_bytes(contents[damage])
    with pytest.raises(ValueError, match=r"x\.bin is refused") as error:
        open_file(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], {"a": 1}, {1: torch.zeros(2)}, {"a": torch.zeros(2).to_sparse()}]
)
def test_a_bin_file_with_something_else(tmp_path, content):
    """Only a dictionary of names and dense tensors is taken."""
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"x\.bin"):
        open_file(tmp_path / "x.bin")


def test_files_of_other_kinds(tmp_path):
    """A missing file, a folder, another suffix."""
    (tmp_path / "x.safetensors").mkdir()
    (tmp_path / "x.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):
        open_file(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        open_file(tmp_path / "x.ckpt")


@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index."""
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path / "model.safetensors.index.json"


def test_shards(sharded):
    """The tensors of all shards, by name."""
    tensors = open_weights(sharded)
    assert set(tensors) == {"a", "b"}
    assert tensors["b"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "name",
    [
        "../model-1.safetensors",
        "/etc/model-1.safetensors",
        "deeper/model-1.safetensors",
        "..\\x.bin",
        "..",
        ".",
        "",
        3,
        None,
    ],
)
def test_an_index_that_leaves_its_folder(sharded, name):
    """Only the name of a file beside the index is allowed."""
    (sharded.parent / "deeper").mkdir()
    save_file({"a": torch.zeros(2)}, sharded.parent / "deeper" / "model-1.safetensors")
    sharded.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"index\.json names the shard .* only a file of the same folder"):
        open_weights(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_map(sharded, index):
    """An index must say which shard holds which tensor."""
    sharded.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="weight_map"):
        open_weights(sharded)


def test_a_missing_shard(sharded):
    """Named by the index, absent from the folder."""
    (sharded.parent / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names the shard model-2\.safetensors, which does not exist"):
        open_weights(sharded)


def test_a_shard_that_lacks_a_tensor(sharded):
    """Named by the index, absent from its shard."""
    save_file({"c": torch.ones(2)}, sharded.parent / "model-2.safetensors")
    with pytest.raises(ValueError, match=r"says that model-2\.safetensors holds 'b', which it does not"):
        open_weights(sharded)


def test_a_tensor_in_two_shards(sharded):
    """One name, two places: nobody can say which one counts."""
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, sharded.parent / "model-2.safetensors")
    with pytest.raises(ValueError, match=r"model-2\.safetensors holds 'a', which another shard holds as well"):
        open_weights(sharded)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe{}", b"[" * 100_000])
def test_malformed_json(tmp_path, content):
    """One sentence with the file's name."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(error.value)


def test_which_file_is_taken(tmp_path):
    """Plain before fp16, safetensors before .bin, and a variant only where it is asked for or alone."""
    names = [
        "pytorch_model.fp16.bin",
        "model.safetensors.index.fp16.json",
        "pytorch_model.bin.index.json",
        "model.safetensors",
    ]
    assert find_weights(tmp_path, None) is None
    for name in names:  # each one is preferred to those before it
        (tmp_path / name).touch()
        assert find_weights(tmp_path, None).name == name
    assert find_weights(tmp_path, "fp16").name == "model.safetensors.index.fp16.json"
    assert find_weights(tmp_path, "bf16") is None
