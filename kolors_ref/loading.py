"""Files to the parts of a pipeline: networks built without memory, then given the tensors mapped from the files."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from weights_conversion import open_checkpoint
from weights_conversion.checkpoint import Checkpoint, Network

from .config import GLMConfig, UNetConfig, VAEConfig
from .models.glm import GLMEncoder
from .models.unet import UNet
from .models.vae import VAE
from .sampling import NoiseSchedule, Sampler, read_scheduler_config
from .tokenizer import Tokenizer

NETWORKS = {"text_encoder": (GLMEncoder, GLMConfig), "unet": (UNet, UNetConfig), "vae": (VAE, VAEConfig)}


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


def load_parts(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    unet: str | Path | None = None,
) -> Parts:
    """Loads a checkpoint of any layout; see `KolorsPipeline.from_pretrained` for the arguments and errors."""
    checkpoint = open_checkpoint(find_folder(path, variant), variant)
    networks = dict(checkpoint.networks)
    check_complete(checkpoint)
    if unet is not None:
        networks["unet"] = over_base(open_checkpoint(unet), networks["unet"])
    device = check_device(device)
    dtype = dtype or default_dtype(networks["unet"], device)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}; it must be float16, bfloat16, float32 or float64")
    # The decoder's activations overflow in fp16, so the autoencoder is held in fp32 then.
    vae_dtype = torch.float32 if dtype == torch.float16 else dtype
    config, sampler = read_scheduler_config(checkpoint.scheduler)
    return Parts(
        tokenizer=Tokenizer(checkpoint.tokenizer),
        text_encoder=load_network(networks["text_encoder"], dtype, device),
        unet=load_network(networks["unet"], dtype, device),
        vae=load_network(networks["vae"], vae_dtype, device).to(memory_format=torch.channels_last),
        schedule=NoiseSchedule(config),
        sampler=sampler,
        zero_empty_negative=checkpoint.force_zeros_for_empty_prompt,
    )


def load_network(network: Network, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Builds a network and gives it its tensors, in place in the mapped file where type and device allow it.

    Raises:
        ValueError: a tensor has the wrong shape, or holds NaN or infinity.
    """
    module_class, config_class = NETWORKS[network.name]
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in network.config.items()}
    with torch.device("meta"):
        module = module_class(config_class(**config))
    state = {}
    for name, parameter in module.state_dict().items():
        tensor = network.tensors[name]
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"the {network.name}'s tensor {name} has shape {tuple(tensor.shape)} in the file, "
                f"but its config asks for {tuple(parameter.shape)}"
            )
        check_numbers(tensor, f"the {network.name}'s tensor {name}")
        state[name] = tensor.to(device=device, dtype=dtype)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def check_numbers(tensor: Tensor, what: str) -> None:
    """Raises ValueError unless every number is finite; reads the tensor once and allocates nothing."""
    if not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):
        raise ValueError(f"{what} holds NaN or infinity in the file; the checkpoint is damaged")


def check_complete(checkpoint: Checkpoint) -> None:
    """Raises ValueError if a checkpoint lacks what a pipeline needs."""
    if checkpoint.layout == "unet-file":
        raise ValueError(f"{checkpoint.path} holds a UNet alone; give it as unet= beside a whole checkpoint")
    found = set(checkpoint.networks) | {name for name in ("scheduler", "tokenizer") if getattr(checkpoint, name)}
    if missing := [name for name in (*NETWORKS, "scheduler", "tokenizer") if name not in found]:
        raise ValueError(f"the checkpoint {checkpoint.path} has no {missing[0]}; a picture needs it")


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
    """The checkpoint's own type; bfloat16 for fp16 on a CPU, where fp16 arithmetic is slow."""
    dtype = unet.tensors["conv_in.weight"].dtype
    return torch.bfloat16 if dtype == torch.float16 and device.type == "cpu" else dtype


def check_device(device: torch.device | str) -> torch.device:
    """Raises ValueError for a device that does not exist here."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {str(device)!r} cannot be used here; 'cpu' always can") from error


def find_folder(path: str | Path, variant: str | None) -> Path:
    """Gives the folder of a checkpoint, fetching it from the hub if it is the id of a repository there.

    Raises:
        FileNotFoundError: there is no such folder, and it is no id or the `hub` extra is not installed.
    """
    if Path(path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return Path(path)
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(
            f"there is no folder {path}; to fetch a hub repository of that name, install kolors-ref[hub]"
        ) from None
    suffix = f"*.{variant}.safetensors" if variant else "*.safetensors"
    patterns = ["*.json", suffix, "*.bin", "*.model"]
    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # the library raises its own and its transport's kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(f"there is no folder {path}, and the hub did not give it: {reason}") from error
