"""From files to the parts of a pipeline: networks built on the meta device, then given tensors mapped from files."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weights_conversion import open_checkpoint
from weights_conversion.checkpoint import Checkpoint, Network
from weights_conversion.files import FLOATS, check_numbers

from .allocator import keep_freed_memory
from .config import GLMConfig, UNetConfig, VAEConfig
from .hub import fetch
from .models.glm import GLMEncoder
from .models.unet import TransformerBlock, UNet
from .models.vae import VAE, memory_format
from .offload import Carrier, let_rest, make_carrier, make_way
from .precision import fast_dtype
from .sampling import NoiseSchedule, Sampler, read_scheduler_config
from .sampling.guidance import GUIDANCE_SCALE
from .tokenizer import Tokenizer
from .unfilled import unfilled

NETWORKS = {"text_encoder": (GLMEncoder, GLMConfig), "unet": (UNet, UNetConfig), "vae": (VAE, VAEConfig)}
MOST_KINDS = 64
"""Compiled graphs of the transformer block to keep; each kind of call, such as another batch size, needs two."""
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says how many bytes of memory a container may use: cgroups v2, then v1."""
EMBEDDED = "mini"
"""What the embedded miniature is called; a folder of that name is "./mini"."""
WEIGHTS = Path(__file__).parent / "mini" / "weights"


@dataclass(frozen=True)
class Parts:
    """What a pipeline is made of, as a checkpoint gives it."""

    tokenizer: Tokenizer
    text_encoder: GLMEncoder
    unet: UNet
    vae: VAE
    schedule: NoiseSchedule
    sampler: Sampler
    zero_empty_negative: bool
    guidance_scale: float
    offload: str


def load_parts(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    unet: str | Path | None = None,
    offload: str | None = None,
    compile: bool = False,
) -> Parts:
    """Loads a checkpoint of any layout; see `KolorsPipeline.from_pretrained` for the arguments and errors."""
    checkpoint = open_checkpoint(find_folder(path, variant), variant)
    networks = dict(checkpoint.networks)
    check_complete(checkpoint)
    if unet is not None:
        networks["unet"] = over_base(open_checkpoint(unet), networks["unet"])
    tokenizer = Tokenizer(checkpoint.tokenizer)
    check_fit(tokenizer, *(networks[name].config for name in NETWORKS))
    device = check_device(device)
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(map(str, FLOATS))}")
    dtype = dtype or default_dtype(networks["unet"], device)
    if offload is None:
        offload = "none" if compile else default_offload(networks, dtype, device)
    carrier = make_carrier(offload, device)
    if compile and carrier is not None:
        raise ValueError(
            f"compile=True needs the weights to stay on the device; it does not go with offload={offload!r}"
        )
    # A CPU is no faster in fp16, in which the autoencoder's activations may overflow; elsewhere see decoding.py.
    vae_dtype = torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype
    config, sampler = read_scheduler_config(checkpoint.scheduler)
    denoiser = load_network(networks["unet"], dtype, device, carrier)
    if compile:
        compile_blocks(denoiser)
    vae = load_network(networks["vae"], vae_dtype, device)
    if carrier is not None:
        make_way(vae.encoder, carrier)
        make_way(vae.decoder, carrier)
    return Parts(
        tokenizer=tokenizer,
        text_encoder=load_network(networks["text_encoder"], dtype, device, carrier),
        unet=denoiser,
        vae=vae,
        schedule=NoiseSchedule(config),
        sampler=sampler,
        zero_empty_negative=checkpoint.force_zeros_for_empty_prompt,
        guidance_scale=GUIDANCE_SCALE if checkpoint.guidance_scale is None else checkpoint.guidance_scale,
        offload=offload,
    )


def load_network(
    network: Network, dtype: torch.dtype, device: torch.device | str, carrier: Carrier | None = None
) -> nn.Module:
    """Builds a network and gives it its tensors, in place in the mapped file where type and device allow it.

    Only convolution weights are copied, to be laid out channels-last: 0.7 GB of the official UNet in bf16. With a
    carrier all weights stay in the file until they are used, and are checked then.

    Raises:
        ValueError: a tensor has the wrong shape or format, or holds NaN or infinity, or the config fits no network.
    """
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    module_class, config_class = NETWORKS[network.name]
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in network.config.items()}
    try:
        with unfilled():
            module = module_class(config_class(**config))
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the {network.name} cannot be built with the sizes in its config: {reason}") from error
    state = {}
    for name, parameter in module.state_dict().items():
        tensor = network.tensors[name]
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"the {network.name}'s tensor {name} has shape {tuple(tensor.shape)} in the file, "
                f"but its config asks for {tuple(parameter.shape)}"
            )
        state[name] = tensor
    check = lambda name, tensor: check_numbers(tensor, f"the {network.name}'s tensor {name}")
    if carrier is not None:
        let_rest(module, state, dtype, device, carrier, check)
    else:
        for name, tensor in state.items():
            check(name, tensor)
            state[name] = tensor.to(device=device, dtype=dtype)
        module.load_state_dict(state, assign=True)
        layout = memory_format(module.quant_conv.weight) if isinstance(module, VAE) else torch.channels_last
        module.to(memory_format=layout)
    return module.eval().requires_grad_(False)


def compile_blocks(unet: UNet) -> None:
    """Has torch compile the transformer blocks when they are first called; blocks of one size share compiled code."""
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # a LoRA comes as hooks, and perhaps later
    limit = torch._dynamo.config.recompile_limit  # beyond 8 kinds of call nothing more would be compiled
    torch._dynamo.config.recompile_limit = max(limit, MOST_KINDS)
    for module in unet.modules():
        if isinstance(module, TransformerBlock):
            module.compile()


def check_complete(checkpoint: Checkpoint) -> None:
    """Raises ValueError if a checkpoint lacks what a pipeline needs."""
    if checkpoint.layout == "unet-file":
        raise ValueError(f"{checkpoint.path} holds a UNet alone; give it as unet= beside a whole checkpoint")
    found = set(checkpoint.networks) | {name for name in ("scheduler", "tokenizer") if getattr(checkpoint, name)}
    if missing := [name for name in (*NETWORKS, "scheduler", "tokenizer") if name not in found]:
        raise ValueError(f"the checkpoint {checkpoint.path} has no {missing[0]}; a picture needs it")


def check_fit(tokenizer: Tokenizer, glm: dict[str, Any], unet: dict[str, Any], vae: dict[str, Any]) -> None:
    """Raises ValueError unless the parts, each given by its config, are made for each other."""
    if tokenizer.vocab_size > glm["vocab_size"]:
        size = f"{tokenizer.vocab_size} ids, but the text encoder's vocabulary has {glm['vocab_size']}"
        raise ValueError(f"the tokenizer has {size}; it belongs to another model")
    for field, wanted, whose in (
        ("text_dim", glm["hidden_size"], "text encoder"),
        ("pooled_dim", glm["hidden_size"], "text encoder"),
        ("in_channels", vae["latent_channels"], "vae"),
        ("out_channels", vae["latent_channels"], "vae"),
    ):
        if unet[field] != wanted:
            raise ValueError(f"the unet's {field} is {unet[field]}, but the {whose} of this checkpoint needs {wanted}")
    for channels, heads, depth in zip(unet["channels"], unet["num_heads"], unet["transformer_depth"], strict=True):
        if depth and (heads == 0 or channels % heads):
            raise ValueError(f"the unet's num_heads is {heads} for {channels} channels; it must divide them")
    if glm["num_heads"] % glm["num_kv_groups"]:
        groups = f"{glm['num_kv_groups']} for {glm['num_heads']} heads"
        raise ValueError(f"the text encoder's num_kv_groups is {groups}; it must divide them")


def over_base(checkpoint: Checkpoint, base: Network) -> Network:
    """Takes the UNet of a checkpoint, or of a single file, in place of the base checkpoint's."""
    if "unet" not in checkpoint.networks:
        raise ValueError(f"{checkpoint.path} holds no UNet")
    network = checkpoint.networks["unet"]
    config = network.config or base.config
    if missing := sorted(set(base.tensors) - set(network.tensors)):
        raise ValueError(f"{checkpoint.path} is not a whole UNet: {len(missing)} tensors are missing, as {missing[0]}")
    if extra := sorted(set(network.tensors) - set(base.tensors)):
        raise ValueError(f"{checkpoint.path} is a UNet of other sizes: the base has no tensor {extra[0]}")
    return Network("unet", config, network.official_config or base.official_config, network.tensors)


def default_dtype(unet: Network, device: torch.device) -> torch.dtype:
    """The checkpoint's own dtype; for half precision on a CPU, the one that is fast there."""
    dtype = unet.tensors["conv_in.weight"].dtype
    return fast_dtype(device) if dtype.itemsize == 2 and device.type == "cpu" else dtype


def default_offload(networks: Mapping[str, Network], dtype: torch.dtype, device: torch.device) -> str:
    """ "stream" where weights that have to be cast would take more than half of a CPU's memory, else "none"."""
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return "none"
    tensors = [tensor for name in ("text_encoder", "unet") for tensor in networks[name].tensors.values()]
    cast = sum(tensor.numel() * dtype.itemsize for tensor in tensors if tensor.dtype != dtype)
    return "stream" if cast > memory_allowed() / 2 else "none"


def memory_allowed() -> int:
    """Bytes of the machine's memory, or the container's limit if that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shares = [path.read_text().strip() for path in CONTAINER_LIMITS if path.is_file()]
    return min([memory, *(int(share) for share in shares if share.isdecimal())])


def check_device(device: torch.device | str) -> torch.device:
    """Raises ValueError for a device that does not exist here."""
    try:
        found = torch.empty(0, device=device)
        found.tolist()  # a device without data, such as meta, cannot do that
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"the device {str(device)!r} cannot be used here; 'cpu' always can") from error
    return found.device


def find_folder(path: str | Path, variant: str | None) -> Path:
    """Returns the folder of a checkpoint: "mini" is the embedded one, and the id of a hub repository is fetched.

    Raises:
        FileNotFoundError: a repository could not be fetched, or the `hub` extra is not installed.
    """
    if str(path) == EMBEDDED:
        return WEIGHTS
    if Path(path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return Path(path)
    return fetch(str(path), variant)
