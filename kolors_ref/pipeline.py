"""From text to pictures: the one place where tokenizer, networks, sampler and guidance meet."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import lora
from .arguments import as_prompts, check_finite, check_latents, check_output_type, check_side, free_name
from .decoding import decode_tiled, without_overflow
from .denoising import Denoising
from .image_prompts import Adapter, encode_pictures, image_layers, load_adapter
from .images import Pictures, from_pixels, to_pixels
from .loading import load_parts
from .models.glm import GLMEncoder
from .models.unet import Context, KeyValue, UNet, select
from .models.vae import VAE, Posterior
from .request import Request
from .sampling import NoiseSchedule, Plan, Sampler, get_sampler
from .sampling.guidance import GUIDANCE_SCALE
from .sampling.noise import draw_noise
from .text_layout import MOST_TOKENS, TextEmbeddings, concatenate, packed_layout, padded_layout
from .tokenizer import MAX_LENGTH, Tokenizer

Output = list[Image.Image] | np.ndarray | Tensor
BLACK = 1 / 255 - 1
"""The brightest pixel that becomes black when it is rounded to one of 256 values."""


def computes_separately(weight: Tensor) -> bool:
    """Whether a network with such weights computes every picture or prompt of a call separately.

    It does in fp32 and fp64, the dtypes for comparing numbers: rounding then does not depend on what else is in the
    call. Batching is faster.
    """
    return weight.dtype in (torch.float32, torch.float64)


def mean_and_std(vae: VAE, pixels: Tensor) -> Tensor:
    """Encodes pictures (B, 3, H, W) to what latents are sampled with, (2, B, 4, H/8, W/8)."""
    posterior = vae.encode(pixels)
    return torch.stack((posterior.mean, posterior.std))


class KolorsPipeline:
    """Kolors: prompts in Chinese or English to pictures (Kolors report, Kuaishou 2024).

    Attributes:
        tokenizer, text_encoder, unet, vae: the parts.
        schedule: the noise schedule of training.
        sampler: used if a call names none: the one that the checkpoint's scheduler_config.json asks for.
        zero_empty_negative: whether negative_prompt=None stands for embeddings of zeros instead of for "".
        guidance_scale: of classifier-free guidance if a call gives none: the checkpoint's.
        offload: where the text encoder and the UNet are; see `from_pretrained`.
        ip_adapters: the IP-Adapters loaded, by name, in order of loading.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        text_encoder: GLMEncoder,
        unet: UNet,
        vae: VAE,
        schedule: NoiseSchedule,
        sampler: Sampler,
        zero_empty_negative: bool = False,
        guidance_scale: float = GUIDANCE_SCALE,
        offload: str = "none",
    ) -> None:
        self.tokenizer, self.text_encoder, self.unet, self.vae = tokenizer, text_encoder, unet, vae
        self.schedule, self.sampler, self.zero_empty_negative = schedule, sampler, zero_empty_negative
        self.guidance_scale, self.offload = guidance_scale, offload
        self.ip_adapters: dict[str, Adapter] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        variant: str | None = None,
        unet: str | Path | None = None,
        offload: str | None = None,
        compile: bool = False,
    ) -> "KolorsPipeline":
        """Loads a checkpoint; on a CPU, weights already of the wanted dtype stay in the memory-mapped file.

        Args:
            path: a folder in the layout of Kolors-diffusers, of the Kolors team or of this project; "mini", the
                embedded miniature; or, with the `hub` extra, the id of a hub repository.
            dtype: the dtype to compute in; by default the checkpoint's, but a half-precision one becomes, on a CPU,
                bfloat16 if there are instructions for it, else float32.
            device: "cpu", "cuda", ...
            variant: such as "fp16", to choose among the files of a folder that holds several.
            unet: a checkpoint or single file whose UNet replaces the folder's.
            offload: where the text encoder and the UNet are. "none": on the device. "model": in the file, and on the
                device one at a time, while it works. "stream": in the file, and on the device block by block, for
                machines whose memory holds neither; on CUDA up to 3.5 GB of the UNet stay while it works. Gradients
                need "none". The pictures are the same; the autoencoder and the networks of image prompts are always on
                the device. Weights of another dtype are cast every time. By default "none", but on a CPU "stream" if
                the weights to cast would take more than half of the memory, unless `compile` is on.
            compile: whether torch compiles the UNet's transformer blocks while the first picture is made, so that later
                ones are faster; not with offload, and on a CPU a C++ compiler is needed. A LoRA that is not fused has
                the blocks recompiled, once for each rank in them.

        Raises:
            FileNotFoundError, NotADirectoryError, OSError: a file or folder is missing, no checkpoint, or unreadable.
            ValueError: something in a file is damaged, does not fit, or asks for what is not supported; a damaged
                weight that is offloaded is found at its first use.
        """
        return cls(**vars(load_parts(path, dtype, device, variant, unet, offload, compile)))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the UNet computes in."""
        return self.unet.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.conv_in.weight.device

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent."""
        return self.vae.config.downscale

    @torch.no_grad()
    def encode_prompt(self, prompts: str | Sequence[str], max_sequence_length: int = MAX_LENGTH) -> TextEmbeddings:
        """Encodes N prompts in the official layout: sequence (N, max_sequence_length, D) with all pads, pooled (N, D).

        Raises TypeError and ValueError for what is no prompt.
        """
        return padded_layout(self.tokenizer(prompts, max_sequence_length)).encode(self.text_encoder)

    @torch.no_grad()
    def encode_packed(self, prompts: str | Sequence[str], max_sequence_length: int = MAX_LENGTH) -> TextEmbeddings:
        """Encodes N prompts in as few passes as is efficient, each distinct prompt once, without repeating its pads.

        Equal to `encode_prompt` in real arithmetic; see text_layout.py. In fp32 and fp64 each prompt has its own pass.
        Raises TypeError and ValueError for what is no prompt.
        """
        prompts = as_prompts("prompts", prompts)
        distinct = list(dict.fromkeys(prompts))
        most = 1 if computes_separately(self.text_encoder.token_embed.weight) else MOST_TOKENS
        passes = self.tokenizer(distinct, max_sequence_length).split(most)
        embeds = concatenate([packed_layout(tokens).encode(self.text_encoder) for tokens in passes])
        return embeds[[distinct.index(prompt) for prompt in prompts]]

    def load_ip_adapter(
        self, path: str | Path, image_encoder: str | Path | None = None, name: str | None = None
    ) -> None:
        """Loads an IP-Adapter-Plus for image prompts, beside those loaded already; the other networks stay as they are.

        Args:
            path: the official file, .bin or .safetensors.
            image_encoder: its folder; if None that of the adapter loaded last, or else `image_encoder` beside the file.
            name: what to call it, for `unload_ip_adapter`; if None the file's name without its suffix, numbered if that
                is in use.

        Raises:
            FileNotFoundError: a file or folder is missing.
            ValueError: a file is damaged or made for another model, or the name is in use.
        """
        if name is None:
            name = free_name(Path(path).stem, self.ip_adapters)
        if name in self.ip_adapters:
            raise ValueError(f"an IP-Adapter named {name!r} is loaded already; unload it or choose another name")
        self.ip_adapters[name] = load_adapter(path, image_encoder, self.unet, list(self.ip_adapters.values()))

    def unload_ip_adapter(self, name: str | None = None) -> None:
        """Unloads an IP-Adapter, or all of them if name is None; raises ValueError for a name that is not loaded."""
        if name is not None and name not in self.ip_adapters:
            loaded = ", ".join(map(repr, self.ip_adapters)) or "none"
            raise ValueError(f"there is no IP-Adapter named {name!r}; loaded: {loaded}")
        self.ip_adapters = {} if name is None else {k: v for k, v in self.ip_adapters.items() if k != name}

    @torch.no_grad()
    def encode_image(self, ip_adapter_image: Pictures | Sequence[Pictures | None]) -> list[Tensor | None]:
        """Encodes reference pictures, to be given as ip_adapter_embeds once or several times.

        Args:
            ip_adapter_image: as in `Request`.

        Returns:
            For each IP-Adapter loaded (2, N, 577, 1024), CLIP's output for "no picture", then that for its N pictures;
            None for an adapter without pictures.

        Raises:
            TypeError, ValueError: a picture cannot be used, or no IP-Adapter is loaded.
            FloatingPointError: CLIP gave NaN or infinity.
        """
        return encode_pictures(list(self.ip_adapters.values()), ip_adapter_image)

    def load_lora(self, path: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """Loads a LoRA onto the UNet and text encoder and returns its name; arguments and errors are `lora.load`'s."""
        return lora.load(self._adaptable, path, scale, name)

    def unload_lora(self, name: str | None = None) -> None:
        """Unloads a LoRA, or all of them if name is None; raises ValueError for a name that is not loaded."""
        lora.unload(self._adaptable, name)

    def fuse_lora(self) -> None:
        """Fuses all LoRAs into the weights, for speed; `unfuse_lora` restores these bit for bit.

        Raises ValueError if no LoRA is loaded, or the weights are offloaded.
        """
        if self.offload != "none":
            raise ValueError(f"a LoRA cannot be fused with offload={self.offload!r}; it works without being fused")
        lora.fuse(*self._adaptable.values())

    def unfuse_lora(self) -> None:
        """Restores the weights that `fuse_lora` changed; the LoRAs stay loaded."""
        lora.unfuse(*self._adaptable.values())

    @property
    def _adaptable(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def __call__(self, *args: Any, output_type: str = "pil", tiled_decoding: bool = False, **kwargs: Any) -> Output:
        """Makes pictures: runs the denoising loop to its end and decodes.

        Args:
            args, kwargs: the fields of `Request`: prompt, negative_prompt, height, width, ...
            output_type: "pil", a list of images; "np", (N, H, W, 3) in [0, 1]; "pt", (N, 3, H, W) in [0, 1]; "latent",
                (N, 4, H/8, W/8).
            tiled_decoding: see `decode`.

        Raises:
            ValueError, TypeError: an argument is wrong.
            FloatingPointError: a stage gave NaN or infinity, or the decoder an all-black picture.
        """
        check_output_type(output_type)
        denoising = self.denoise(*args, **kwargs)
        latents = denoising.latents
        for step in denoising:
            latents = step.latents
        return self.decode(latents, output_type, tiled_decoding)

    @torch.no_grad()
    def denoise(self, *args: Any, **kwargs: Any) -> Denoising:
        """Encodes the conditions and draws the noise; the loop runs when the result is iterated over.

        Set up weights, LoRAs and IP-Adapters before this.

        Args:
            args, kwargs: the fields of `Request`: prompt, negative_prompt, height, width, ...

        Raises:
            ValueError, TypeError: an argument is wrong.
            FloatingPointError: text, a reference picture or the picture to start from gave NaN or infinity.
        """
        request = Request(*args, **kwargs)
        if request.guidance_scale is None:
            request = replace(request, guidance_scale=self.guidance_scale)
        sampler, plan = self._plan(request)
        image = None if request.image is None else to_pixels(request.image, request.height, request.width, self.factor)
        height, width = self._size(request)
        # Without height and width, a picture to start from is conditioned on the native size, not on its own.
        sizes = torch.stack(request.sizes(height, width))[0 if request.guided else 1 :]
        if image is not None:
            height = check_side("height", image.shape[-2], self.factor)
            width = check_side("width", image.shape[-1], self.factor)
        sizes = sizes.repeat_interleave(request.num_prompts, dim=0).to(self.device)
        adapters = list(self.ip_adapters.values())
        images = image_layers(adapters, request, self.unet, height, width, self.factor)
        text = self._embed(request)

        shape = (request.num_images, self.unet.config.in_channels, height // self.factor, width // self.factor)
        if image is not None:
            latents, plan = self._start_from_image(image, request, sampler, plan, shape)
        elif request.latents is not None:
            latents = check_latents(request.latents, shape).to(self.device) * plan.initial_scale
        else:
            latents = draw_noise(shape, request.generator, self.device, self.dtype) * plan.initial_scale

        # Only after encoding a picture, which needs the memory that the UNet takes if its weights visit the device.
        contexts = self._contexts(text, sizes, images, request)
        noise_dtype = torch.promote_types(self.dtype, torch.float32)
        draw = lambda: draw_noise(shape, request.generator, self.device, noise_dtype)
        return Denoising(
            self.unet, contexts, sampler, plan, latents, request.guidance_scale, request.guidance_interval, draw
        )

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil", tiled: bool = False) -> Output:
        """Decodes latents, one picture at a time.

        Args:
            latents: (N, 4, H/8, W/8).
            output_type: see `__call__`, also for errors.
            tiled: whether to decode pictures of more than 1024 pixels along a side in overlapping tiles, an
                approximation that needs only the memory of 1024 x 1024 pixels.
        """
        check_output_type(output_type)
        if output_type == "latent":
            return latents
        if not isinstance(latents, Tensor):
            raise TypeError(f"latents must be a tensor, not {type(latents).__name__}")
        channels = self.vae.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; the VAE decodes (N, {channels}, H/8, W/8)")
        decode = decode_tiled if tiled else VAE.decode
        pixels = torch.cat(without_overflow(self.vae, latents.split(1), decode))
        check_finite(pixels, "decoding (the VAE)")
        if (pixels <= BLACK).flatten(1).all(1).any():
            raise FloatingPointError(
                "decoding (the VAE) gave an all-black picture; try another dtype or prompt, "
                'or output_type="latent" for what it was decoded from'
            )
        return from_pixels(pixels, output_type)

    def _plan(self, request: Request) -> tuple[Sampler, Plan]:
        sampler = self.sampler if request.sampler is None else get_sampler(request.sampler)
        if request.timesteps is None and request.sigmas is None:
            return sampler, sampler.plan(self.schedule, request.num_inference_steps)
        return sampler, sampler.plan(self.schedule, timesteps=request.timesteps, sigmas=request.sigmas)

    def _size(self, request: Request) -> tuple[int, int]:
        native = self.unet.config.sample_size * self.factor
        height = check_side("height", native if request.height is None else request.height, self.factor)
        return height, check_side("width", native if request.width is None else request.width, self.factor)

    def _embed(self, request: Request) -> TextEmbeddings:
        """Returns the embeddings of the negative prompts (if guided), then of the prompts; all texts in one pass."""
        prompts, negatives, count = request.prompts, request.negative_prompts, request.num_prompts
        texts = prompts or []
        zeros = negatives is None and request.negative_prompt_embeds is None and self.zero_empty_negative
        if request.guided and request.negative_prompt_embeds is None and not zeros:
            texts = (negatives or [""] * count) + texts
        if texts:
            encoded = self.encode_packed(texts, request.max_sequence_length)
            check_finite(encoded.sequence, "text encoding (the GLM)")
            check_finite(encoded.pooled, "text encoding (the GLM)")
        positive = encoded[-count:] if request.prompt_embeds is None else self._given(request.prompt_embeds)
        if not request.guided:
            return positive
        if request.negative_prompt_embeds is not None:
            negative = self._given(request.negative_prompt_embeds)
        elif zeros:
            negative = replace(positive, sequence=positive.sequence * 0, pooled=positive.pooled * 0)
        else:
            negative = encoded[:count]
        return concatenate([negative, positive])

    def _given(self, embeds: TextEmbeddings) -> TextEmbeddings:
        """Moves a caller's embeddings to the UNet's device and dtype; ValueError for those of another text encoder."""
        sizes = embeds.sequence.shape[2], embeds.pooled.shape[1]
        needed = self.unet.config.text_dim, self.unet.config.pooled_dim
        if sizes != needed:
            raise ValueError(
                f"prompt_embeds or negative_prompt_embeds are {sizes[0]} wide, and {sizes[1]} where they are pooled, "
                f"but this UNet takes {needed[0]} and {needed[1]}"
            )
        return embeds.to(self.device, self.dtype)

    def _contexts(
        self, text: TextEmbeddings, sizes: Tensor, images: Sequence[Sequence[KeyValue]], request: Request
    ) -> list[Context]:
        """Prepares every prompt once for all of its pictures: one context for them all, or one for each picture."""
        prepare = lambda text, sizes: self.unet.prepare(text.sequence, text.pooled, sizes, text.key_bias)
        per_prompt = request.num_images_per_prompt
        if not computes_separately(self.unet.conv_in.weight):
            return [prepare(text, sizes).repeat(per_prompt).add(images)]
        # Rows are copied and trimmed, since how a matrix product is rounded depends on the memory layout.
        rows_of = lambda i, count: [i, count + i] if request.guided else [i]
        prompts = [rows_of(i, request.num_prompts) for i in range(request.num_prompts)]
        pictures = [rows_of(i, request.num_images) for i in range(request.num_images)]
        contexts = [prepare(text[rows].trimmed(), sizes[rows]) for rows in prompts]
        return [contexts[i // per_prompt].add(select(images, rows)) for i, rows in enumerate(pictures)]

    def _start_from_image(
        self, image: Tensor, request: Request, sampler: Sampler, plan: Plan, shape: tuple[int, ...]
    ) -> tuple[Tensor, Plan | None]:
        """Encodes pixels (M, 3, H, W) and noises them to where the strength enters the plan; no plan if nowhere."""
        starts = request.starts(len(image))
        # One draw for each picture given, or for each picture to make if each has a generator of its own.
        own_generators = isinstance(request.generator, list | tuple) and len(request.generator) > 1
        rows = starts if own_generators else list(range(len(image)))
        weight = self.vae.quant_conv.weight
        # The official pipeline encodes, and draws this noise, in fp32. On a CPU noise drawn in bf16 is the same.
        dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        noise = draw_noise((len(rows), *shape[1:]), request.generator, weight.device, dtype)
        mean, std = torch.cat(without_overflow(self.vae, image.split(1), mean_and_std), dim=1)
        latents = Posterior(mean[rows], std[rows]).sample(noise)
        check_finite(latents, "encoding the picture (the VAE)")
        latents = latents if own_generators else latents[starts]
        latents = latents.to(device=self.device, dtype=self.dtype)
        begin = plan.num_steps - min(int(plan.num_steps * request.strength), plan.num_steps)
        if begin == plan.num_steps:
            return latents, None
        plan = plan.from_step(begin)
        return sampler.add_noise(latents, draw_noise(shape, request.generator, self.device, self.dtype), plan), plan
