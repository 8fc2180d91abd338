"""Pictures: from files, Pillow, numpy and torch to the tensors that the networks take, and back.

Three kinds of tensor are in use: pixels for the autoencoder (N, 3, H, W) in [-1, 1], pixels for CLIP (N, 3, 336, 336)
standardised by channel, and the finished picture in [0, 1]. Nothing here knows a network.
"""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps

Picture = Image.Image | np.ndarray | torch.Tensor
Pictures = Picture | list[Picture]

OUTPUT_TYPES = ("pil", "np", "pt")
"""What finished pictures can be given as: Pillow images, a numpy array, a torch tensor."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of red, green and blue in CLIP's training pictures (Radford et al. 2021, code)."""

ROUNDING = 1e-3
"""How far a float picture may exceed its range before it is taken to be in another."""

MAX_ASPECT = 500
"""The largest ratio of long to short side of a picture that is resized to CLIP's size before the crop."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""The formats that are read, in Pillow's names: others are rare, and EPS would be run as a program."""


def load_image(path: str | os.PathLike) -> Image.Image:
    """Read a picture file: upright (EXIF orientation applied), RGB, transparency laid over white.

    Raises FileNotFoundError for a missing file, and ValueError for one that is damaged, of none of the `FORMATS`, or so
    large that Pillow takes it for a decompression bomb.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture file at {path}.")
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return _to_rgb(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has more pixels than Pillow opens safely ({Image.MAX_IMAGE_PIXELS * 2}).") from error
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        raise ValueError(f"{path} cannot be read as a picture ({error}).") from error


def to_pixels(image: Pictures, height: int | None = None, width: int | None = None, multiple: int = 8) -> torch.Tensor:
    """Turn pictures into the autoencoder's input, a float tensor (N, 3, H, W) in [-1, 1].

    `image` is one of these, or a list of them:
      - a Pillow image of any mode but F: turned upright, transparency laid over white, 16 bits reduced to 8;
      - a numpy array (H, W), (H, W, C) or (N, H, W, C), C 3 or 1, uint8 or float in [0, 1];
      - a torch tensor (C, H, W) or (N, C, H, W), uint8 or float in [0, 1].
    Float pictures that go below 0 are taken to be in [-1, 1] already, all of a list together.

    All pictures are brought to (height, width); a size left out is the first picture's, cut down to a multiple of
    `multiple`. 8-bit pictures are resized with Lanczos filtering, float ones by nearest neighbour, as diffusers does.

    Raises TypeError for an object of another type and ValueError for a picture that is empty, damaged, of a wrong
    shape or not within its range, and for sizes that are not multiples of `multiple`.
    """
    pictures = _pictures(image)
    first_height, first_width = _size(pictures[0])
    height = _check_size("height", height, first_height, multiple)
    width = _check_size("width", width, first_width, multiple)
    return torch.stack([_resized(picture, height, width) for picture in pictures])


def from_pixels(pixels: torch.Tensor, output_type: str = "pil") -> list[Image.Image] | np.ndarray | torch.Tensor:
    """Turn the autoencoder's output (N, 3, H, W) in [-1, 1] into finished pictures; values beyond are clipped.

    `output_type` "pil": a list of RGB images, rounded to the nearest of 256 values; "np": a float32 array
    (N, H, W, 3) in [0, 1]; "pt": a tensor (N, 3, H, W) in [0, 1] of the dtype and on the device of `pixels`.

    Raises ValueError for another `output_type` or shape, and for pixels that are NaN or infinite: those come from an
    overflow, and a black picture would hide it.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f'output_type is {output_type!r}, but must be "pil", "np" or "pt".')
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels have the shape {tuple(pixels.shape)}, but must have (N, 3, H, W).")
    if not torch.isfinite(pixels).all():
        raise ValueError("the picture has NaN or infinite pixels: decode it in float32 or bfloat16 instead of float16.")
    pixels = (pixels * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return pixels
    pixels = rearrange(pixels.detach().float(), "n c h w -> n h w c")
    if output_type == "np":
        return pixels.cpu().numpy()
    return [Image.fromarray(picture) for picture in (pixels * 255).round().to(torch.uint8).cpu().numpy()]


def clip_pixels(images: Pictures, size: int = 336) -> torch.Tensor:
    """Turn pictures into CLIP's input, a float32 tensor (N, 3, size, size), standardised by channel.

    The short side is resized to `size` (bicubic), the centre is cropped, and the result is standardised with CLIP's
    mean and standard deviation (Radford et al. 2021). Accepts and raises what `to_pixels` does; a picture whose long
    side is more than 500 times its short side is refused with a ValueError.
    """
    crops = np.stack([_clip_crop(picture, size) for picture in _pictures(images)])
    scaled = crops.astype(np.float32) / 255
    standardised = (scaled - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(rearrange(standardised, "n h w c -> n c h w").copy())


# ---- one picture at a time: 8-bit ones are Pillow images in RGB, float ones are tensors (3, H, W) in [-1, 1]


def _pictures(image: Pictures) -> list[Image.Image | torch.Tensor]:
    pictures = _split(image)
    if not pictures:
        raise ValueError("there is no picture to work on: the list or batch is empty.")
    floats = [picture for picture in pictures if isinstance(picture, torch.Tensor)]
    low = min((picture.min().item() for picture in floats), default=0.0)
    high = max((picture.max().item() for picture in floats), default=1.0)
    if low < -1 - ROUNDING or high > 1 + ROUNDING:
        raise ValueError(f"a float picture has values from {low:.4g} to {high:.4g}, but must be within [0, 1].")
    if low < -ROUNDING:
        return pictures
    return [2 * picture - 1 if isinstance(picture, torch.Tensor) else picture for picture in pictures]


def _split(image: Pictures) -> list[Image.Image | torch.Tensor]:
    if isinstance(image, list | tuple):
        return [picture for item in image for picture in _split(item)]
    if isinstance(image, Image.Image):
        return [_to_rgb(image)]
    if isinstance(image, np.ndarray):
        if image.dtype not in (np.uint8, np.float16, np.float32, np.float64):
            raise TypeError(f"a picture array is of dtype {image.dtype}, but must be uint8 or float.")
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim not in (3, 4) or image.shape[-1] not in (1, 3):
            raise ValueError(f"a picture array has the shape {image.shape}, but must have (H, W, 3) or (N, H, W, 3).")
        return _split(torch.from_numpy(image.copy()).movedim(-1, -3))
    if isinstance(image, torch.Tensor):
        return _split_tensor(image)
    kind = type(image).__name__
    raise TypeError(f"a picture is of type {kind}, but must be a Pillow image, a numpy array or a torch tensor.")


def _split_tensor(image: torch.Tensor) -> list[Image.Image | torch.Tensor]:
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"a picture tensor is of dtype {image.dtype}, but must be uint8 or float.")
    if image.ndim not in (3, 4) or image.shape[-3] not in (1, 3):
        shape = tuple(image.shape)
        raise ValueError(f"a picture tensor has the shape {shape}, but must have (3, H, W) or (N, 3, H, W).")
    if image.shape[-1] == 0 or image.shape[-2] == 0:
        raise ValueError(f"a picture has no pixels: its height and width are {tuple(image.shape[-2:])}.")
    if not torch.isfinite(image).all():
        raise ValueError("a picture has NaN or infinite values, but must be within [0, 1].")
    batch = image.reshape(-1, *image.shape[-3:]).expand(-1, 3, -1, -1)
    if image.dtype == torch.uint8:
        return [Image.fromarray(picture) for picture in rearrange(batch, "n c h w -> n h w c").cpu().numpy()]
    return list(batch)


def in_8_bits(image: Image.Image) -> Image.Image:
    """A picture of 16 bits of grey in 8, where Pillow itself would clip at 255; any other as it is.

    Raises ValueError for grey values beyond 16 bits.
    """
    if not image.mode.startswith("I"):  # in some formats 16 bits are opened as 32
        return image
    values = np.asarray(image).astype(np.float64) / 257
    if values.min() < 0 or values.max() > 255:
        raise ValueError("a picture has grey values beyond 16 bits: convert it to RGB first.")
    return Image.fromarray(values.round().astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Upright, over white, 8 bits a channel; a copy even where there is nothing to do."""
    if image.width == 0 or image.height == 0:
        raise ValueError(f"a picture has no pixels: its height and width are {(image.height, image.width)}.")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # an opened file whose pixels are read only here, see `load_image`
        raise ValueError(f"a picture cannot be read from its file ({error}).") from error
    if image.mode == "F":
        raise ValueError("a Pillow image of floats (mode F) has no known range: convert it to RGB first.")
    image = in_8_bits(image)
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"a picture of Pillow's mode {image.mode!r} is not understood: convert it to RGB.") from error


def _size(picture: Image.Image | torch.Tensor) -> tuple[int, int]:
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    return picture.shape[-2], picture.shape[-1]


def _check_size(name: str, asked: int | None, own: int, multiple: int) -> int:
    if asked is None:
        if own < multiple:
            raise ValueError(f"a picture's {name} is {own} pixels, but must be at least {multiple}.")
        return own - own % multiple
    if asked <= 0 or asked % multiple:
        raise ValueError(f"{name} is {asked}, but must be a positive multiple of {multiple}.")
    return asked


def _resized(picture: Image.Image | torch.Tensor, height: int, width: int) -> torch.Tensor:
    if isinstance(picture, torch.Tensor):
        return F.interpolate(picture[None], size=(height, width))[0]
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)
    return rearrange(2 * pixels - 1, "h w c -> c h w")


def _clip_crop(picture: Image.Image | torch.Tensor, size: int) -> np.ndarray:
    """The middle of a picture whose short side was resized to `size`: (size, size, 3) in 0 ... 255."""
    if isinstance(picture, torch.Tensor):
        picture = from_pixels(picture[None])[0]
    short, long = sorted(picture.size)
    if long > MAX_ASPECT * short:
        raise ValueError(f"a picture of {picture.height} x {picture.width} pixels is too narrow for CLIP.")
    scaled = int(size * long / short)  # rounded down, as CLIP's preprocessing does
    width, height = (size, scaled) if picture.width <= picture.height else (scaled, size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))
