"""The arithmetic of a picture, ours and diffusers', counted by torch on meta tensors.

    python -m tests.benchmarks.flops [--size full|small] [--sides 512,1024] [--steps 25] [--ip-adapter]

Nothing is computed, so the official sizes need neither weights nor time. Matrix products, convolutions and
attention are counted, a multiply-add as two; other additions, norms and activations are not.
"""

import argparse
import sys
from collections.abc import Callable
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.kolors import text_encoder as official_glm
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import CLIPVisionModelWithProjection

from kolors_ref.config import CLIPVisionConfig, GLMConfig, IPAdapterConfig, UNetConfig, VAEConfig
from kolors_ref.models.clip import CLIPVision
from kolors_ref.models.glm import GLMEncoder
from kolors_ref.models.ip_adapter import IPAdapter
from kolors_ref.models.unet import KeyValue, UNet
from kolors_ref.models.vae import VAE
from kolors_ref.text_layout import packed_layout
from kolors_ref.tokenizer import MAX_LENGTH, TokenBatch

from .checkpoint import ADAPTERS, SIZES, adapter_tensors, clip_config, official_configs

NUM_TOKENS = (2, 25)
"""Tokens of "" and of the prompt, the prefix included."""

Kinds = dict[str, int]
"""Floating-point operations by kind: "linear", "convolution", "attention"."""

Stages = dict[str, Kinds]
"""Of one picture: "text", "image" (with an IP-Adapter), "prepare" (ours: once a picture), "step", "decode"."""

KIND_OF = {
    "mm": "linear",
    "addmm": "linear",
    "convolution": "convolution",
    "bmm": "attention",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
}


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *args, out_shape=None, **kwargs) -> int:
    """Counts an attention kernel that torch's counter does not know and would count as nothing."""
    return sdpa_flop_count(query, key, value)


@torch.no_grad()
def count(call: Callable[[], object]) -> Kinds:
    """Counts what a call computes. Raises KeyError for an operation whose kind is not listed in KIND_OF."""
    unknown = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        call()
    kinds = dict.fromkeys(("linear", "convolution", "attention"), 0)
    for operation, flops in counter.get_flop_counts()["Global"].items():
        kinds[KIND_OF[str(operation).removeprefix("aten.")]] += flops
    return kinds


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory."""
    return torch.zeros(shape, dtype=dtype, device="meta")


def on_meta(build: Callable[..., nn.Module], *args: object) -> nn.Module:
    """Builds a network without memory."""
    with torch.device("meta"):
        return folding(build(*args).eval())


def folding(network: nn.Module) -> nn.Module:
    """Makes the weights alone require gradients: torch then folds linear layers to mm, and bmm is left to attention."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.endswith("weight"))
    return network


def ours(configs: dict, side: int, adapter: IPAdapterConfig | None = None, clip: CLIPVisionConfig | None = None):
    """Counts our stages for a guided picture of side x side pixels."""
    glm: GLMConfig = configs["text_encoder"]
    config: UNetConfig = configs["unet"]
    vae: VAEConfig = configs["vae"]
    encoder, unet = on_meta(GLMEncoder, glm), on_meta(UNet, config)
    mask = torch.stack([(torch.arange(MAX_LENGTH) >= MAX_LENGTH - tokens).long() for tokens in NUM_TOKENS])
    layout = packed_layout(TokenBatch(mask, mask, mask))
    text = layout.encode(encoder)
    prepare = lambda: unet.prepare(text.sequence, text.pooled, zeros(2, 6), text.key_bias)
    context = prepare()
    stages = {"text": count(lambda: layout.encode(encoder))}
    if adapter is not None:
        tower, heads = on_meta(CLIPVision, clip), [attention.num_heads for attention in unet.cross_attentions()]
        projections = on_meta(IPAdapter, adapter)
        pixels = zeros(2, 3, clip.image_size, clip.image_size)
        image = lambda: projections.keys_values(projections.image_tokens(tower(pixels)), heads)
        stages["image"] = count(image)
        context = context.add([[KeyValue(*pair, weight=1.0)] for pair in image()])
    side //= vae.downscale
    return stages | {
        "prepare": count(prepare),
        "step": count(lambda: unet(zeros(2, config.in_channels, side, side), 500, context)),
        "decode": count(lambda: on_meta(VAE, vae).decode(zeros(1, vae.latent_channels, side, side))),
    }


def diffusers(configs: dict, side: int, adapter: IPAdapterConfig | None = None, clip: CLIPVisionConfig | None = None):
    """Counts the same stages as diffusers' pipeline runs them: every prompt by itself, with all its pads."""
    official = official_configs(configs)
    glm_config = official_glm.ChatGLMConfig(**official["text_encoder"])
    encoder = on_meta(lambda: official_glm.ChatGLMModel(glm_config, device="meta"))
    unet = on_meta(lambda: UNet2DConditionModel.from_config(official["unet"]))
    vae = on_meta(lambda: AutoencoderKL.from_config(official["vae"]))
    ids, unseen = zeros(1, MAX_LENGTH, dtype=torch.long), zeros(1, 1, MAX_LENGTH, MAX_LENGTH, dtype=torch.bool)
    # The mask is given, because making it asks for values, which tensors without memory do not have.
    encode = lambda: encoder(ids, position_ids=ids, full_attention_mask=unseen, output_hidden_states=True)
    # Rotary positions are TorchScript, which cannot run under the counter, and no operation that is counted.
    with patch.object(official_glm, "apply_rotary_pos_emb", lambda x, angles: x.clone()):
        stages = {"text": {kind: 2 * flops for kind, flops in count(encode).items()}}
    width = configs["text_encoder"].hidden_size
    added = {"text_embeds": zeros(2, width), "time_ids": zeros(2, 6)}
    if adapter is not None:
        tower = on_meta(CLIPVisionModelWithProjection, clip_config(clip))
        pixels = zeros(1, 3, clip.image_size, clip.image_size)
        one = count(lambda: tower(pixels, output_hidden_states=True))
        stages["image"] = {kind: 2 * flops for kind, flops in one.items()}
        parts = {"image_proj": {}, "ip_adapter": {}}
        for name, shape in adapter_tensors(adapter, configs["unet"]).shapes.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = zeros(*shape)
        unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=True)
        folding(unet)
        positions = 1 + (clip.image_size // clip.patch_size) ** 2
        added["image_embeds"] = [zeros(2, 1, positions, clip.width)]
    side //= configs["vae"].downscale
    step = lambda: unet(
        zeros(2, configs["unet"].in_channels, side, side),
        zeros(),
        encoder_hidden_states=zeros(2, MAX_LENGTH, width),
        added_cond_kwargs=added,
        return_dict=False,
    )
    latents = zeros(1, configs["vae"].latent_channels, side, side)
    decode = lambda: vae.decode(latents, return_dict=False)
    return stages | {"step": count(step), "decode": count(decode)}


def both(size: str, side: int, ip_adapter: bool = False) -> dict[str, Stages]:
    """Counts "ours" and "diffusers" for a size of the networks ("small" or "full") and a side of the picture."""
    with_adapter = ADAPTERS[size] if ip_adapter else ()
    return {contestant.__name__: contestant(SIZES[size], side, *with_adapter) for contestant in (ours, diffusers)}


def total(stages: Stages, steps: int) -> int:
    """The operations of a whole picture."""
    return sum((steps if stage == "step" else 1) * sum(kinds.values()) for stage, kinds in stages.items())


def table(size: str, sides: list[int], steps: int, ip_adapter: bool) -> str:
    """Where the operations of a picture go, in Markdown, in units of 10^12 (10^6 for small networks)."""
    unit = 1e12 if size == "full" else 1e6
    rows = [["side", "whose", "text", "image", "prepare", f"{steps} × step", "(a step: linear", "convolution"]]
    rows[0] += ["attention)", "decode", "whole picture", "ours is less by"]
    rows += [["--:", "---"] + ["--:"] * 10]
    for side in sides:
        stages = both(size, side, ip_adapter)
        for whose, own in stages.items():
            number = lambda stage, times=1, own=own: f"{times * sum(own.get(stage, {}).values()) / unit:.3f}"
            cells = [str(side), whose, number("text"), number("image"), number("prepare"), number("step", steps)]
            cells += [f"{flops / unit:.3f}" for flops in own["step"].values()]
            less = 1 - total(own, steps) / total(stages["diffusers"], steps)
            rows.append([*cells, number("decode"), f"{total(own, steps) / unit:.2f}", f"{less:.1%}" if less else ""])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.flops", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="full", help="of the networks")
    parser.add_argument("--sides", default="512,1024", help="of the picture, comma-separated multiples of 32")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--ip-adapter", action="store_true", help="with one reference picture")
    args = parser.parse_args(arguments)
    sides = args.sides.split(",")
    if not all(side.isdecimal() and int(side) > 0 and int(side) % 32 == 0 for side in sides):
        parser.error(f"--sides is {args.sides}; multiples of 32 are needed")
    print(table(args.size, [int(side) for side in sides], args.steps, args.ip_adapter))
    return 0


if __name__ == "__main__":
    sys.exit(main())
