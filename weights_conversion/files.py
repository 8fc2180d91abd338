"""Weights files: found by name, opened lazily and safely, written as a stream.

Reading maps a file into memory and copies nothing; a pickle is read only with `weights_only=True`, so no code in it
ever runs; an index may name only files in its own folder.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of dtypes in a safetensors header."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that weights may have, and that can be computed in."""
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
CHUNK = 1 << 24  # numbers that are cast, written or compared at a time


class Tensors(Mapping[str, Tensor]):
    """Tensors under new names: name -> (another mapping, the name there). Getting one copies nothing."""

    def __init__(self, sources: dict[str, tuple[Mapping[str, Tensor], str]]) -> None:
        self._sources = sources

    def __getitem__(self, name: str) -> Tensor:
        tensors, stored_name = self._sources[name]
        return tensors[stored_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


class SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of one .safetensors file. Raises ValueError where the file is damaged."""

    def __init__(self, path: Path) -> None:
        check_readable(path)
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            check_name(path)
            reason = str(error).removeprefix("Error while deserializing header: ")
            raise ValueError(f"{path} is not a whole safetensors file: {reason}.") from None
        self._names = dict.fromkeys(self._file.keys())
        self._path = path

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, RuntimeError) as error:  # such as data that is not aligned to its dtype
            raise ValueError(
                f"{self._path}: the tensor {name!r} cannot be read: {str(error).splitlines()[0]}."
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_file(path: Path) -> Mapping[str, Tensor]:
    """The tensors of one .safetensors or .bin file, lazily. Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file.")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix != ".bin":
        raise ValueError(f"{path} is neither a .safetensors nor a .bin file.")
    tensors = load_pickle(path)
    if not is_plain(tensors):
        raise ValueError(f"{path} does not hold a plain dictionary of names and dense tensors.")
    return tensors


def load_pickle(path: Path) -> Any:
    """What a .bin file holds, its tensors mapped; no code in it is run. Raises OSError, ValueError."""
    check_readable(path)
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds on a damaged or hostile file, none with a short message
        check_name(path)
        hostile = "Weights only load failed" in str(error)
        reason = "it holds Python objects other than tensors" if hostile else "it is damaged or in a format before 2020"
        raise ValueError(f"{path} is refused: {reason}.") from None


def check_readable(path: Path) -> None:
    """Raises OSError for a file that may not be read, which the libraries call missing or damaged."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}.") from None


def check_name(path: Path) -> None:
    """Raises ValueError for a name that is not UTF-8, with which neither library can open a file."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path} has a name that is not UTF-8 and cannot be opened: rename it.") from None


def is_plain(tensors: Any) -> bool:
    """Whether this is a dictionary of names and dense tensors."""
    return isinstance(tensors, dict) and all(_is_dense(*item) for item in tensors.items())


def _is_dense(name: Any, tensor: Any) -> bool:
    dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
    return isinstance(name, str) and dense and tensor.device.type == "cpu"


def check_numbers(tensor: Tensor, what: str) -> None:
    """Raises ValueError unless every number is a finite float; reads the tensor once and allocates nothing.

    A sum is finite only if all its terms are, and takes no longer than reading them; bounds decide if it overflows.
    """
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{what} is of the format {str(tensor.dtype).removeprefix('torch.')}; only floats are supported."
        )
    if not tensor.sum().isfinite() and not all(bound.isfinite() for bound in tensor.aminmax()):
        raise ValueError(f"{what} holds NaN or infinity in the file; the file is damaged.")


def find_weights(folder: Path, variant: str | None) -> Path | None:
    """The weights file of a network's folder, or the index of its shards; None if there is none.

    A variant such as "fp16" is part of the file names. Without one, plain files come first and fp16 ones second.
    """
    for tag in [f".{variant}"] if variant else ["", ".fp16"]:
        for kind in ("safetensors", "bin"):
            for stem in STEMS:
                for name in (f"{stem}{tag}.{kind}", f"{stem}.{kind}.index{tag}.json", f"{stem}{tag}.{kind}.index.json"):
                    if (folder / name).exists():
                        return folder / name
    return None


def open_weights(path: Path) -> Tensors:
    """All tensors of a weights file, or of the shards that an index names. Raises FileNotFoundError, ValueError."""
    weight_map = _read_index(path) if path.suffix == ".json" else {}
    shards = sorted(set(weight_map.values())) if weight_map else [path.name]
    sources: dict[str, tuple[Mapping[str, Tensor], str]] = {}
    for shard in shards:
        if weight_map and not (path.parent / shard).is_file():
            raise FileNotFoundError(f"{path} names the shard {shard}, which does not exist.")
        tensors = open_file(path.parent / shard)
        for name in tensors:
            if name in sources:
                raise ValueError(f"{path.parent / shard} holds {name!r}, which another shard holds as well.")
            sources[name] = (tensors, name)
        for name, owner in weight_map.items():
            if owner == shard and name not in tensors:
                raise ValueError(f"{path} says that {shard} holds {name!r}, which it does not.")
    return Tensors(sources)


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map that says which shard holds which tensor.")
    for name in weight_map.values():
        if not isinstance(name, str) or not name or "/" in name or "\\" in name or name in (".", ".."):
            raise ValueError(f"{path} names the shard {name!r}, and only a file of the same folder is allowed.")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, and a JSON object is needed.")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes an object as readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def dtype_in_file(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to write a tensor in: floating-point tensors are cast to `dtype`, others are not."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def byte_chunks(tensor: Tensor, dtype: torch.dtype | None = None, name: str = "") -> Iterator[Tensor]:
    """The bytes of a tensor in order, cast to `dtype`, as flat uint8 tensors of at most CHUNK numbers each.

    Raises ValueError, with the tensor's name, where a number would become infinite.
    """
    for piece in tensor.detach().reshape(-1).split(CHUNK):
        cast = piece.to(dtype or tensor.dtype)
        if cast.dtype != piece.dtype and (_is_finite(piece) & ~_is_finite(cast)).any():
            most = f"{torch.finfo(cast.dtype).max:g}, the most of {str(cast.dtype).removeprefix('torch.')}"
            raise ValueError(f"The tensor {name!r} holds numbers beyond {most}: choose another format.")
        yield cast.view(torch.uint8)


def _is_finite(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype in FLOATS else tensor.float()).isfinite()  # torch has no such test for 8 bits


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    on_bytes: Callable[[int], Any] = lambda count: None,
) -> None:
    """Writes a .safetensors file piece by piece, with less than one tensor in memory besides the mapped source.

    Format: eight bytes with the header's length, the header (JSON, padded to a multiple of eight), the data.
    Floating-point tensors are cast to `dtype`; `on_bytes` is told about every piece written. Raises ValueError for a
    tensor of an unknown format and one that `dtype` is too narrow for.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide formats first, as the library does it, so that every tensor stays aligned to its own size.
    order = sorted(tensors, key=lambda name: (-dtype_in_file(tensors[name], dtype).itemsize, name))
    for name in order:
        tensor = tensors[name]
        kind = dtype_in_file(tensor, dtype)
        if kind not in DTYPE_NAMES:
            raise ValueError(f"The tensor {name!r} is of the format {kind}, which cannot be written.")
        end = offset + tensor.numel() * kind.itemsize
        header[name] = {"dtype": DTYPE_NAMES[kind], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            tensor = tensors[name]
            for piece in byte_chunks(tensor, dtype_in_file(tensor, dtype), name):
                file.write(piece.numpy().data)
                on_bytes(piece.numel())
        file.flush()
        os.fsync(file.fileno())
