"""PNG files that remember their parameters: written whole or not at all, read back or refused in one sentence."""

import errno
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from kolors_ref.picture_file import KEY, check_png, check_writable, read_parameters, save_picture

PICTURE = Image.fromarray(np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3))


def png_with(path, text, key=KEY):
    """A picture with this text in its parameters' place."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(key, text)
    PICTURE.save(path, pnginfo=info)
    return path


def expect_one_sentence(error, function, *arguments, mentions=""):
    with pytest.raises(error) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert mentions in message


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"prompt": ["一只猫, 4K 🐈"], "steps": 25, "guidance_scale": 6.5, "sampler": None, "index": 0},
        {"prompt": ['tab\t, line\n, quote" and \\ and \x00']},
        {"model": "name-that-is-not-utf-8-\udcff"},
        {"prompt": ["word " * 20_000]},
    ],
)
def test_parameters_come_back(tmp_path, parameters):
    """With the picture bit for bit."""
    path = tmp_path / "图.png"
    save_picture(PICTURE, path, parameters)
    assert read_parameters(path) == parameters
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(PICTURE))
    assert os.listdir(tmp_path) == [path.name]


def test_the_text_is_readable_elsewhere(tmp_path):
    """Any reader of PNG text shows the prompt as it was typed."""
    save_picture(PICTURE, tmp_path / "a.png", {"prompt": ["一只猫"]})
    with Image.open(tmp_path / "a.png") as image:
        assert "一只猫" in image.text[KEY]


def test_a_picture_is_replaced(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"an older file")
    save_picture(PICTURE, path, {"seed": 1})
    assert read_parameters(path) == {"seed": 1}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_an_interrupted_writing_leaves_the_old_file(tmp_path, monkeypatch, error):
    """Half of the file has reached the disk when it is full, or when the user gives up."""
    path = tmp_path / "a.png"
    path.write_bytes(b"an older file")

    def half(image, target, **options):
        target.write_bytes(b"\x89PNG half of a picture")
        raise error

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(type(error)) as caught:
        save_picture(PICTURE, path, {})
    if isinstance(error, OSError):
        assert str(caught.value) == f"{path} cannot be written: No space left on device"
    assert path.read_bytes() == b"an older file"
    assert os.listdir(tmp_path) == ["a.png"]


def test_check_writable_leaves_nothing(tmp_path):
    check_png(tmp_path / "A.PNG")
    check_writable(tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    expect_one_sentence(ValueError, check_png, tmp_path / "a.jpg", mentions="must end in .png")
    expect_one_sentence(ValueError, check_png, tmp_path / ".png", mentions="must end in .png")
    expect_one_sentence(IsADirectoryError, check_writable, tmp_path / "folder.png", mentions="is a folder")
    expect_one_sentence(FileNotFoundError, check_writable, tmp_path / "no" / "a.png", mentions="does not exist")
    expect_one_sentence(OSError, check_writable, tmp_path / "file" / "a.png", mentions="does not exist")
    expect_one_sentence(OSError, check_writable, tmp_path / ("a" * 300 + ".png"), mentions="too long")
    if os.path.isdir("/proc/self"):
        expect_one_sentence(OSError, check_writable, type(tmp_path)("/proc/a.png"), mentions="cannot be written")

    def refuse(path, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "touch", refuse)
    expect_one_sentence(OSError, check_writable, tmp_path / "a.png", mentions="Permission denied")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


# ---------------------------------------------------------------------------------------------------------------------
# Files that cannot be repeated
# ---------------------------------------------------------------------------------------------------------------------


def test_a_missing_picture(tmp_path):
    expect_one_sentence(FileNotFoundError, read_parameters, tmp_path / "a.png", mentions="there is no picture")
    expect_one_sentence(FileNotFoundError, read_parameters, tmp_path, mentions="there is no picture")


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\x00" * 4096])
def test_files_that_are_no_picture(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    expect_one_sentence(ValueError, read_parameters, tmp_path / "a.png", mentions="a.png")


def test_pictures_of_other_programs(tmp_path):
    PICTURE.save(tmp_path / "plain.png")
    PICTURE.save(tmp_path / "plain.jpg")
    png_with(tmp_path / "other.png", "{}", key="parameters")
    for name in ("plain.png", "other.png"):
        expect_one_sentence(ValueError, read_parameters, tmp_path / name, mentions="holds no parameters")
    expect_one_sentence(ValueError, read_parameters, tmp_path / "plain.jpg", mentions="plain.jpg cannot be read")


@pytest.mark.parametrize(
    "text",
    ["", "{", "not json", "[1, 2]", "3", "null", '"text"', "[" * 100_000, '{"prompt": ' * 50_000],
    ids=lambda text: text[:8],
)
def test_parameters_that_are_no_object(tmp_path, text):
    expect_one_sentence(ValueError, read_parameters, png_with(tmp_path / "a.png", text), mentions="a.png")


@pytest.mark.parametrize("error", [RuntimeError("broken"), EOFError("no more"), IndexError("index"), KeyError("a")])
def test_what_readers_raise(tmp_path, monkeypatch, error):
    """IndexError comes of an iCCP chunk without a method, for instance."""

    def fail(image):
        raise error

    PICTURE.save(tmp_path / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    expect_one_sentence(ValueError, read_parameters, tmp_path / "a.png", mentions="a.png cannot be read")


def test_damaged_pictures(tmp_path):
    """Wherever a file is cut off or a byte is changed: the parameters as they were, or one sentence."""
    save_picture(PICTURE, tmp_path / "a.png", {"prompt": ["a cat"], "seed": 3})
    whole, path = (tmp_path / "a.png").read_bytes(), tmp_path / "b.png"
    cut = [whole[:length] for length in range(0, len(whole) - 12, 3)]
    flipped = [whole[:i] + bytes([whole[i] ^ 0x41]) + whole[i + 1 :] for i in range(0, len(whole), 3)]
    outcomes = []
    for content in cut + flipped:
        path.write_bytes(content)
        try:
            outcomes.append(read_parameters(path))
        except ValueError as error:
            outcomes.append(str(error))
    sentences = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert all(outcome == {"prompt": ["a cat"], "seed": 3} for outcome in outcomes if not isinstance(outcome, str))
    assert all(str(path) in sentence and "\n" not in sentence for sentence in sentences)
    assert len(sentences) > len(cut) / 2


def test_a_decompression_bomb(tmp_path):
    """A few bytes that claim to be 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    text = KEY.encode() + b"\0\0\0\0\0" + json.dumps({"seed": 1}).encode()
    body = chunk(b"IHDR", header) + chunk(b"iTXt", text) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    expect_one_sentence(ValueError, read_parameters, tmp_path / "a.png", mentions="a.png")
