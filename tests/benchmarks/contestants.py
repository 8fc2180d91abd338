"""How each contestant loads what a job needs: a function gives the call to time, which takes the picture's side.

Neither contestant imports the other's library, which would count in the memory that its process takes.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .jobs import PROMPT, Job

Call = Callable[[int], Tensor]
Mark = Callable[[str], None]
TIMESTEP = 501
GUIDANCE = 5.0

# ---------------------------------------------------------------------------------------------------------------------
# Inputs: the same for all, in whatever format they compute
# ---------------------------------------------------------------------------------------------------------------------


def noise(*shape: int, seed: int) -> Tensor:
    """Unit noise, rounded to bfloat16, so that a float32 run gets the same numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def adapter_folder(folder: Path) -> Path:
    """Where the IP-Adapter of a checkpoint's folder is written: beside it."""
    return folder.with_name(f"{folder.name}-ip-adapter")


def reference_picture() -> Image.Image:
    """A picture to be shown to the IP-Adapter: coloured noise of low frequency."""
    values = noise(7, 5, 3, seed=5).float().sigmoid().mul(255).byte().numpy()
    return Image.fromarray(values).resize((384, 512), Image.Resampling.BICUBIC)


def pad_to_official(sequence: Tensor, length: int = 256) -> Tensor:
    """Repeats every prompt's pad, the first of its keys, up to the official number of keys."""
    return torch.cat([sequence[:, :1].expand(-1, length - sequence.shape[1], -1), sequence], dim=1)


def packed(folder: Path):
    """Our layout of the empty negative prompt and the prompt."""
    from kolors_ref.text_layout import packed_layout
    from kolors_ref.tokenizer import Tokenizer

    return packed_layout(Tokenizer(find_tokenizer(folder))(["", PROMPT]))


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer of a checkpoint of any layout."""
    from weights_conversion import open_checkpoint

    return open_checkpoint(folder).tokenizer


def unet_inputs(folder: Path, side: int, job: Job) -> dict[str, Tensor]:
    """What a guided step gets, with noise in the place of embeddings; every pad of a prompt is the same."""
    config = json.loads((folder / "unet" / "config.json").read_text())
    layout, dtype = packed(folder), getattr(torch, job.dtype)
    sequence = noise(layout.input_ids.shape[1], config["encoder_hid_dim"], seed=1)[layout.rows]
    pooled_dim = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    inputs = {
        "latents": noise(1, 4, side // 8, side // 8, seed=2).repeat(2, 1, 1, 1).to(dtype),
        "packed": sequence.to(dtype),
        "sequence": pad_to_official(sequence).to(dtype),
        "key_bias": layout.key_bias.float(),
        "pooled": noise(2, pooled_dim, seed=3).to(dtype),
        "sizes": torch.tensor([[side, side, 0, 0, side, side]] * 2, dtype=dtype),
        "timestep": torch.tensor(TIMESTEP),
    }
    return {name: tensor.to(job.device) for name, tensor in inputs.items()}


def text_result(sequence: Tensor, pooled: Tensor) -> Tensor:
    """Sequence and pooled embeddings in one tensor (2, 257, D), the empty prompt first."""
    return torch.cat([sequence, pooled[:, None]], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Ours
# ---------------------------------------------------------------------------------------------------------------------


def load_ours(folder: Path, name: str, job: Job) -> nn.Module:
    """One of our networks, as our pipeline loads it."""
    from kolors_ref.loading import load_network
    from weights_conversion import open_checkpoint

    return load_network(open_checkpoint(folder).networks[name], getattr(torch, job.dtype), job.device)


def our_text(folder: Path, job: Job) -> Call:
    """Both prompts in one pass, no pad twice."""
    from kolors_ref.text_layout import packed_layout
    from kolors_ref.tokenizer import Tokenizer

    encoder, tokenizer = load_ours(folder, "text_encoder", job), Tokenizer(find_tokenizer(folder))

    def call(side: int) -> Tensor:
        text = packed_layout(tokenizer(["", PROMPT])).encode(encoder)
        return text_result(pad_to_official(text.sequence), text.pooled)

    return call


def our_adapter(folder: Path, unet: nn.Module):
    """Our IP-Adapter."""
    from kolors_ref.image_prompts import load_adapter

    where = adapter_folder(folder)
    return load_adapter(where / "ip_adapter.safetensors", where / "image_encoder", unet, [])


def our_image_layers(adapter, unet: nn.Module, embeds: Tensor) -> list:
    """What an encoded reference picture adds to the context."""
    from kolors_ref.image_prompts import image_layers
    from kolors_ref.request import Request

    return image_layers([adapter], Request(PROMPT, guidance_scale=GUIDANCE, ip_adapter_embeds=[embeds]), unet, 8, 8, 8)


def our_image(folder: Path, job: Job) -> Call:
    """CLIP's view of nothing and of the reference picture, and the whole UNet's keys and values of it."""
    unet = load_ours(folder, "unet", job)
    adapter = our_adapter(folder, unet)

    def call(side: int) -> Tensor:
        embeds = adapter.encode([reference_picture()])
        our_image_layers(adapter, unet, embeds)
        return embeds

    return call


def our_unet(folder: Path, job: Job) -> Call:
    """A guided step; what does not depend on the timestep is prepared before, once for each side."""
    from kolors_ref.loading import compile_blocks

    unet = load_ours(folder, "unet", job)
    if job.compiled:
        compile_blocks(unet)
    adapter = our_adapter(folder, unet) if job.ip_adapter else None

    @cache
    def prepare(side: int):
        inputs = unet_inputs(folder, side, job)
        context = unet.prepare(inputs["packed"], inputs["pooled"], inputs["sizes"], inputs["key_bias"])
        if adapter is not None:
            context = context.add(our_image_layers(adapter, unet, adapter.encode([reference_picture()])))
        return inputs, context

    def call(side: int) -> Tensor:
        inputs, context = prepare(side)
        return unet(inputs["latents"], inputs["timestep"], context)

    return call


def our_vae(folder: Path, job: Job) -> Call:
    """The decoder, as our pipeline runs it: for fp16 in fp32 on a CPU, and elsewhere only where fp16 overflows."""
    from kolors_ref.decoding import without_overflow
    from kolors_ref.models.vae import VAE

    in_float32 = job.dtype == "float16" and job.device == "cpu"
    vae = load_ours(folder, "vae", replace(job, dtype="float32") if in_float32 else job)
    return lambda side: without_overflow(vae, [noise(1, 4, side // 8, side // 8, seed=4)], VAE.decode)[0]


def our_picture(folder: Path, job: Job, mark: Mark) -> Callable[[], Tensor]:
    """A whole picture by our pipeline; marks the loaded pipeline and the first step."""
    from kolors_ref import KolorsPipeline

    how = {"compile": job.compiled} if job.offload == "none" else {"offload": job.offload}
    pipe = KolorsPipeline.from_pretrained(folder, dtype=getattr(torch, job.dtype), device=job.device, **how)
    image = None
    if job.ip_adapter:
        where, image = adapter_folder(folder), reference_picture()
        pipe.load_ip_adapter(where / "ip_adapter.safetensors", image_encoder=where / "image_encoder")
    mark("ready")

    def call() -> Tensor:
        seed = torch.Generator().manual_seed(0)
        sizes = {"height": job.side, "width": job.side, "num_inference_steps": job.steps}
        steps = pipe.denoise(PROMPT, guidance_scale=GUIDANCE, generator=seed, ip_adapter_image=image, **sizes)
        for step in steps:
            mark("first step")
            latents = step.latents
        return torch.from_numpy(pipe.decode(latents, "np"))

    return call


class InFloat32(nn.Module):
    """Computes a layer in float32 whatever its weights are in: all of the text encoder would be 25 GB."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs) -> Tensor:
        """See the layer."""
        return copy.deepcopy(self.layer).float()(*args, **kwargs)


def exact_text(folder: Path, job: Job) -> Call:
    """Ours in the official layout, with all pads, in float32 one layer at a time."""
    from kolors_ref.text_layout import padded_layout
    from kolors_ref.tokenizer import Tokenizer
    from weights_conversion import open_checkpoint

    stored = next(iter(open_checkpoint(folder).networks["text_encoder"].tensors.values())).dtype
    encoder = load_ours(folder, "text_encoder", replace(job, dtype=str(stored).removeprefix("torch.")))
    encoder.token_embed = nn.Sequential(encoder.token_embed)
    encoder.token_embed.register_forward_hook(lambda module, inputs, output: output.float())
    encoder.layers = nn.ModuleList(InFloat32(layer) for layer in encoder.layers)
    layout = padded_layout(Tokenizer(find_tokenizer(folder))(["", PROMPT]))
    inputs = [x.to(job.device) for x in (layout.input_ids, layout.position_ids, layout.bias, layout.pooled_at)]

    def call(side: int) -> Tensor:
        sequence, pooled = encoder(*inputs)
        return text_result(sequence, pooled[:, 0])

    return call


# ---------------------------------------------------------------------------------------------------------------------
# diffusers
# ---------------------------------------------------------------------------------------------------------------------


def load_diffusers(folder: Path, job: Job, *left_out: str):
    """diffusers' pipeline as its documentation loads it, without the parts left out; or made ready for its best."""
    from diffusers import KolorsPipeline

    half = not list((folder / "unet").glob("diffusion_pytorch_model.safetensors"))
    variant = {"variant": "fp16"} if half and list((folder / "unet").glob("*.fp16.safetensors")) else {}
    parts = dict.fromkeys(left_out)
    pipe = KolorsPipeline.from_pretrained(folder, torch_dtype=getattr(torch, job.dtype), **variant, **parts)
    if job.ip_adapter:
        files = {"weight_name": "ip_adapter.safetensors", "image_encoder_folder": "image_encoder"}
        pipe.load_ip_adapter(str(adapter_folder(folder)), subfolder="", **files)
    if job.contestant == "best":
        for name in {"unet", "vae"} - set(left_out):
            getattr(pipe, name).to(memory_format=torch.channels_last)  # before offloading takes the weights away
    if job.offload == "model":
        pipe.enable_model_cpu_offload(device=job.device)
    elif job.offload == "stream":
        pipe.enable_sequential_cpu_offload(device=job.device)
    else:
        pipe.to(job.device)
    if job.contestant == "best":
        if job.compiled and "unet" not in left_out:
            pipe.unet.compile()
        if job.compiled and "vae" not in left_out:
            pipe.vae.decoder.compile()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def their_text(folder: Path, job: Job) -> Call:
    """One pass for the prompt, one for the negative prompt."""
    pipe = load_diffusers(folder, job, "unet", "vae")

    def call(side: int) -> Tensor:
        positive, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPT, negative_prompt="")
        return text_result(torch.cat([negative, positive]), torch.cat([negative_pooled, pooled]))

    return call


def their_image(folder: Path, job: Job) -> Call:
    """CLIP's view of the reference picture and of nothing; what follows it diffusers computes in every step."""
    pipe = load_diffusers(folder, job, "text_encoder", "tokenizer", "vae")
    device = torch.device(job.device)
    return lambda side: pipe.prepare_ip_adapter_image_embeds([reference_picture()], None, device, 1, True)[0]


def their_unet(folder: Path, job: Job) -> Call:
    """A guided step, called as the pipeline calls it."""
    pipe = load_diffusers(folder, job, "text_encoder", "tokenizer", "vae")
    device = torch.device(job.device)

    @cache
    def prepare(side: int):
        inputs = unet_inputs(folder, side, job)
        added = {"text_embeds": inputs["pooled"], "time_ids": inputs["sizes"]}
        if job.ip_adapter:
            images = pipe.prepare_ip_adapter_image_embeds([reference_picture()], None, device, 1, True)
            added["image_embeds"] = images
        return inputs, added

    def call(side: int) -> Tensor:
        inputs, added = prepare(side)
        text = inputs["sequence"]
        arguments = {"encoder_hidden_states": text, "added_cond_kwargs": added, "return_dict": False}
        return pipe.unet(inputs["latents"], inputs["timestep"], **arguments)[0]

    return call


def their_vae(folder: Path, job: Job) -> Call:
    """The decoder, called as the pipeline calls it: where fp16 would overflow, in fp32."""
    pipe = load_diffusers(folder, job, "text_encoder", "tokenizer", "unet")
    if job.dtype == "float16" and pipe.vae.config.force_upcast:
        pipe.vae.float()
    kind, scale = pipe.vae.dtype, pipe.vae.config.scaling_factor

    def call(side: int) -> Tensor:
        latents = noise(1, 4, side // 8, side // 8, seed=4).to(job.device, kind)
        return pipe.vae.decode(latents / scale, return_dict=False)[0]

    return call


def their_picture(folder: Path, job: Job, mark: Mark) -> Callable[[], Tensor]:
    """A whole picture by diffusers' pipeline; marks the loaded pipeline and the first step."""
    pipe = load_diffusers(folder, job)
    mark("ready")

    def after_step(pipe, index: int, timestep: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        mark("first step")
        return values

    def call() -> Tensor:
        images = pipe(
            PROMPT,
            negative_prompt="",
            height=job.side,
            width=job.side,
            num_inference_steps=job.steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(0),
            ip_adapter_image=reference_picture() if job.ip_adapter else None,
            callback_on_step_end=after_step,
            output_type="np",
        ).images
        return torch.from_numpy(images)

    return call


STAGES: dict[str, tuple[Callable[[Path, Job], Call], Callable[[Path, Job], Call]]] = {
    "text": (our_text, their_text),
    "image": (our_image, their_image),
    "unet": (our_unet, their_unet),
    "vae": (our_vae, their_vae),
}
"""What loads a stage: ours, diffusers'."""


def load_stage(folder: Path, job: Job) -> Call:
    """Loads a stage; gives the call to time."""
    if job.contestant == "float32" and job.part == "text":
        return exact_text(folder, job)
    return STAGES[job.part][job.contestant != "ours"](folder, job)


def load_picture(folder: Path, job: Job, mark: Mark) -> Callable[[], Tensor]:
    """Loads a pipeline, marking when it is ready; gives the call for a picture, which marks its steps."""
    return (our_picture if job.contestant == "ours" else their_picture)(folder, job, mark)
