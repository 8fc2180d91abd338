"""Pictures in and out: against diffusers' VaeImageProcessor and transformers' CLIP processor, and what is refused."""

import io
import warnings

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import EpsImagePlugin, Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from kolors_ref.images import clip_pixels, from_pixels, load_image, to_pixels
from kolors_ref.picture_file import read_parameters

ORACLE = VaeImageProcessor(vae_scale_factor=8)
SIZES = [(64, 48), (45, 77), (8, 8), (31, 200)]


def noise(height, width, channels=3, seed=0):
    """A random picture (H, W, C) of 8 bits, smooth enough that resizing does not wash it out."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4 + 2, width // 4 + 2, channels), dtype=np.uint8)
    return np.kron(coarse, np.ones((4, 4, 1), dtype=np.uint8))[:height, :width]


def rgb(height=40, width=56, seed=0):
    return Image.fromarray(noise(height, width, seed=seed))


# ---- to the autoencoder


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("target", [(None, None), (64, 64), (None, 128), (24, None)])
def test_pillow_images_as_the_oracle_resizes_them(shape, target):
    image = rgb(*shape)
    assert torch.equal(to_pixels(image, *target), ORACLE.preprocess(image, *target))


@pytest.mark.parametrize("target", [(None, None), (64, 24)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_arrays_and_tensors_as_the_oracle_resizes_them(target, dtype):
    array = np.stack([noise(45, 77, seed=seed) for seed in range(2)]).astype(dtype) / 255
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    expected = ORACLE.preprocess(array, *target)
    assert expected.dtype == tensor.dtype
    assert torch.equal(to_pixels(array, *target), expected)
    assert torch.equal(to_pixels(tensor, *target), expected)
    assert torch.equal(to_pixels(list(tensor), *target), expected)
    assert torch.equal(to_pixels(tensor[0], *target), expected[:1])


def test_float_pictures_below_zero_are_taken_as_they_are():
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    pixels[1] = pixels[1].abs()  # bright: only the whole batch tells its range
    with pytest.warns(FutureWarning):
        expected = ORACLE.preprocess(pixels)
    assert torch.equal(expected, pixels)
    assert torch.equal(to_pixels(pixels), pixels)
    assert torch.equal(to_pixels(list(pixels)), pixels)


def test_every_form_of_a_picture_gives_the_same_pixels():
    array = noise(40, 56)
    expected = to_pixels(Image.fromarray(array))
    assert expected.dtype == torch.float32
    assert expected.min() >= -1
    assert expected.max() <= 1
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = [
        array,
        array[None],
        [array],
        tensor,
        tensor[None],
        array / np.float32(255),
        tensor / 255,
        array[::-1][::-1],
    ]
    assert all(torch.equal(to_pixels(form), expected) for form in forms)
    assert torch.equal(to_pixels([Image.fromarray(array), array]), expected.expand(2, -1, -1, -1))


def test_a_list_of_sizes_is_brought_to_the_first():
    first, second = rgb(45, 77), rgb(64, 64, seed=1)
    pixels = to_pixels([first, second])
    assert pixels.shape == (2, 3, 40, 72)
    assert torch.equal(pixels, ORACLE.preprocess([first, second]))


def test_exif_orientation_is_applied(tmp_path):
    array = noise(40, 56)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    expected = to_pixels(np.rot90(array, k=-1))
    assert torch.equal(to_pixels(Image.open(tmp_path / "turned.png")), expected)
    assert torch.equal(to_pixels(load_image(tmp_path / "turned.png")), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_transparency_is_laid_over_white(mode):
    colour = Image.new("RGBA", (16, 8), (10, 100, 200, 0))
    colour.paste((10, 100, 200, 255), (0, 0, 8, 8))
    pixels = to_pixels(colour.convert("LA").convert(mode) if "LA" in mode else colour.convert(mode))
    opaque = to_pixels(colour.convert("RGB").convert("L") if mode in ("LA", "PA") else colour.convert("RGB"))
    if mode != "PA":  # a palette keeps one alpha for each entry
        assert torch.equal(pixels[..., :8], opaque[..., :8])
    assert (pixels[..., 8:] == 1).all()


def test_half_transparency_is_mixed_with_white():
    image = Image.new("RGBA", (8, 8), (100, 0, 255, 128))
    expected = torch.tensor([round(v * 128 / 255 + 127) for v in (100, 0, 255)]) / 127.5 - 1
    assert torch.allclose(to_pixels(image)[0, :, 0, 0], expected, atol=1e-6)


def test_palette_with_a_transparent_entry(tmp_path):
    image = Image.new("P", (16, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (8, 0, 16, 8))
    image.save(tmp_path / "palette.png", transparency=1)
    pixels = to_pixels(load_image(tmp_path / "palette.png"))[0, :, 0]
    assert pixels[:, 0].tolist() == [1, -1, -1]
    assert pixels[:, 15].tolist() == [1, 1, 1]


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "HSV", "P"])
def test_other_modes_are_converted(mode):
    image = rgb().convert(mode)
    assert torch.equal(to_pixels(image), to_pixels(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_become_eight(mode, tmp_path):
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    image = Image.fromarray(values)
    image = image.convert("I") if mode == "I" else image
    assert image.mode == mode
    expected = torch.from_numpy((values / 257).round() / 127.5 - 1).float()
    assert torch.allclose(to_pixels(image)[0], expected.expand(3, -1, -1), atol=1e-6)
    image.save(tmp_path / "deep.tif")
    assert torch.equal(to_pixels(load_image(tmp_path / "deep.tif")), to_pixels(image))


def test_grey_arrays_fill_three_channels():
    grey = noise(16, 24, channels=1)[..., 0]
    for array in (grey, grey / np.float32(255)):
        assert torch.equal(to_pixels(array), to_pixels(Image.fromarray(grey)))


def test_the_callers_picture_is_not_changed():
    image, array, tensor = rgb(), noise(16, 16) / 255, torch.rand(3, 16, 16)
    before = image.tobytes(), array.copy(), tensor.clone()
    to_pixels(image).zero_(), to_pixels(array).zero_(), to_pixels(tensor * 2 - 1).zero_(), to_pixels(tensor).zero_()
    assert image.tobytes() == before[0]
    assert np.array_equal(array, before[1])
    assert torch.equal(tensor, before[2])


REFUSED = {
    "no list element": ([], ValueError, "empty"),
    "no batch element": (torch.zeros(0, 3, 8, 8), ValueError, "empty"),
    "no pixels": (Image.new("RGB", (0, 8)), ValueError, "no pixels"),
    "no pixels in an array": (np.zeros((8, 0, 3), np.uint8), ValueError, "no pixels"),
    "NaN": (torch.full((3, 8, 8), float("nan")), ValueError, "NaN"),
    "NaN in an array": (np.full((8, 8, 3), np.nan), ValueError, "NaN"),
    "range of 8 bits in floats": (np.full((8, 8, 3), 255.0), ValueError, "255"),
    "below -1": (torch.full((3, 8, 8), -2.0), ValueError, "-2"),
    "channels last in a tensor": (torch.zeros(8, 8, 3), ValueError, r"\(8, 8, 3\)"),
    "channels first in an array": (np.zeros((3, 8, 8)), ValueError, r"\(3, 8, 8\)"),
    "latents": (torch.zeros(1, 4, 8, 8), ValueError, r"\(1, 4, 8, 8\)"),
    "integers": (np.zeros((8, 8, 3), np.int64), TypeError, "int64"),
    "integer tensor": (torch.zeros(3, 8, 8, dtype=torch.int32), TypeError, "int32"),
    "a path": ("cat.png", TypeError, "str"),
    "nothing": (None, TypeError, "NoneType"),
    "None in a list": ([rgb(), None], TypeError, "NoneType"),
    "float image": (Image.new("F", (8, 8)), ValueError, "mode F"),
    "beyond 16 bits": (Image.fromarray(np.full((8, 8), 70000, np.int32)), ValueError, "16 bits"),
    "odd mode": (Image.new("La", (8, 8)), ValueError, "La"),
    "too small": (rgb(7, 20), ValueError, "height is 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case):
    image, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words) as caught:
        to_pixels(image)
    assert one_sentence(caught)


@pytest.mark.parametrize(("height", "width", "name"), [(60, 64, "height"), (64, 0, "width"), (64, -8, "width")])
def test_wrong_sizes_are_refused(height, width, name):
    with pytest.raises(ValueError, match=f"{name} is .* multiple of 8"):
        to_pixels(rgb(), height, width)


def one_sentence(caught):
    text = str(caught.value)
    return "\n" not in text and text.endswith(".") and ". " not in text


# ---- from files


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif", "avif", "tga", "ppm"])
def test_files_are_read(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    rgb(30, 50).save(path)
    image = load_image(str(path))
    assert (image.mode, image.size) == ("RGB", (50, 30))


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(FileNotFoundError, match="no picture file") as caught:
            load_image(path)
        assert one_sentence(caught)


@pytest.mark.parametrize("damage", ["text", "empty", "truncated"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_damaged_files(tmp_path, kind, damage):
    data = io.BytesIO()
    rgb(64, 64).save(data, kind)
    content = {"text": b"not a picture", "empty": b"", "truncated": data.getvalue()[: len(data.getvalue()) // 2]}
    path = tmp_path / "damaged"
    path.write_bytes(content[damage])
    with pytest.raises(ValueError, match="cannot be read as a picture") as caught:
        load_image(path)
    assert str(path) in str(caught.value)
    if damage == "truncated" and kind in ("PNG", "JPEG"):  # opened, and damaged only where the pixels are read
        with pytest.raises(ValueError, match="cannot be read"):
            to_pixels(Image.open(path))


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_damaged_orientation(tmp_path, suffix):
    """Pillow reads it late, and raises struct.error."""
    path = tmp_path / f"damaged.{suffix}"
    rgb(8, 8).save(path, exif=b"Exif\0\0II*\0")
    for read in (load_image, lambda path: to_pixels(Image.open(path))):
        with pytest.raises(ValueError, match="cannot be read"):
            read(path)


def test_a_picture_is_not_run_as_a_program(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    calls = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: calls.append(arguments))
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    for read in (load_image, read_parameters):
        with pytest.raises(ValueError, match="cannot be read as a picture"):
            read(tmp_path / "a.png")
    assert not calls


def test_a_decompression_bomb(tmp_path, monkeypatch):
    rgb(64, 64).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="more pixels than"):
        load_image(tmp_path / "bomb.png")


# ---- from the autoencoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_finished_pictures_are_the_oracles(dtype):
    pixels = (torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0)) * 0.7).to(dtype)
    assert torch.equal(from_pixels(pixels, "pt"), ORACLE.postprocess(pixels, "pt"))
    assert np.array_equal(from_pixels(pixels, "np"), ORACLE.postprocess(pixels, "np"))
    pairs = zip(from_pixels(pixels), ORACLE.postprocess(pixels, "pil"), strict=True)
    assert all(ours.mode == "RGB" and ours.tobytes() == theirs.tobytes() for ours, theirs in pairs)


def test_rounding_is_the_oracles_at_every_half():
    halves = torch.arange(0, 510, dtype=torch.float32) / 255 - 1  # every value of 8 bits and every middle between two
    pixels = halves.expand(1, 3, 2, -1)
    assert from_pixels(pixels)[0].tobytes() == ORACLE.postprocess(pixels, "pil")[0].tobytes()


def test_a_picture_survives_the_way_there_and_back():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.merge("RGB", [Image.fromarray(values)] * 3)
    assert from_pixels(to_pixels(image))[0].tobytes() == image.tobytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_an_overflow_is_not_a_black_picture(value, output_type):
    pixels = torch.zeros(2, 3, 8, 8)
    pixels[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinite") as caught:
        from_pixels(pixels, output_type)
    assert one_sentence(caught)


def test_wrong_output_type_and_shape():
    with pytest.raises(ValueError, match="output_type is 'latent'"):
        from_pixels(torch.zeros(1, 3, 8, 8), "latent")
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\)"):
        from_pixels(torch.zeros(1, 4, 8, 8))


# ---- to CLIP


def clip_oracle(images, size=336):
    return CLIPImageProcessorPil(size=size, crop_size=size)(images, return_tensors="pt").pixel_values


@pytest.mark.parametrize(
    "shape", [(336, 336), (337, 335), (500, 400), (211, 613), (1, 1), (5, 3), (336, 337), (1000, 336), (17, 100)]
)
@pytest.mark.parametrize("size", [336, 224])
def test_clip_pixels_are_the_oracles(shape, size):
    image = rgb(*shape)
    assert torch.equal(clip_pixels(image, size), clip_oracle(image, size))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_clip_pixels_of_every_mode(mode):
    image = Image.fromarray(noise(90, 61, channels=4)) if "A" in mode else rgb(90, 61)
    image = image.convert(mode)
    assert torch.equal(clip_pixels(image), clip_oracle(image))


def test_clip_pixels_of_a_batch_and_of_arrays():
    images = [rgb(50, 70), rgb(80, 30, seed=1)]
    pixels = clip_pixels(images)
    assert pixels.shape == (2, 3, 336, 336)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, clip_oracle(images))
    array = np.asarray(images[0])
    for form in (array, array / np.float32(255), torch.from_numpy(array / np.float32(255)).permute(2, 0, 1)):
        assert torch.equal(clip_pixels(form), pixels[:1])


def test_clip_refuses_a_thread():
    with pytest.raises(ValueError, match="too narrow"):
        clip_pixels(Image.new("RGB", (1, 60000)))


def test_nothing_is_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array = noise(16, 16)
        array.setflags(write=False)
        assert to_pixels([array, rgb()]).shape == (2, 3, 16, 16)
        assert clip_pixels(array).shape == (1, 3, 336, 336)
