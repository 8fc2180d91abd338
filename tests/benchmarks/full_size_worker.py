"""One measurement of full_size.py, made in a process of its own so that its memory is its own.

A run loads its network and gives back what to time; `measure` does the rest.
"""

import copy
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

PROMPT = "雪山脚下的湖边，一只戴红围巾的狐狸坐在木船上，清晨，薄雾，油画"
TIMESTEP = 501
WARM_UP = 20.0
"""Seconds: a first call that takes less is a warm-up and not counted."""


@dataclass(frozen=True)
class Job:
    """What to measure. `run` is one of RUNS: `text_packed`, `unet_diffusers`, ..."""

    run: str
    dtype: str
    size: int | None = None

    @property
    def key(self) -> str:
        """Its name in the results."""
        return "-".join([self.run, self.dtype] + ([str(self.size)] if self.size else []))


@dataclass(frozen=True)
class Loaded:
    """A network in memory and the call to time."""

    network: nn.Module
    call: Callable[[], Tensor]

    def weight_bytes(self) -> int:
        """Bytes of the network's tensors as they are in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.network.parameters())


class PeakMemory:
    """Watches this process's resident memory: anonymous, mapped from files, and both together (Linux)."""

    def __enter__(self) -> "PeakMemory":
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
        self.peaks = {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()
        self.sample()

    def watch(self) -> None:
        """Samples every 10 ms; the kernel itself keeps the peak of the sum, VmHWM."""
        while not self.done.wait(0.01):
            self.sample()

    def sample(self) -> None:
        """Raises the peaks to the present values, in bytes."""
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in self.peaks:
                self.peaks[name] = max(self.peaks[name], int(value.split()[0]) * 1024)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs: the same for both libraries, in whatever format they compute
# ---------------------------------------------------------------------------------------------------------------------


def noise(*shape: int, seed: int) -> Tensor:
    """Unit noise, rounded to bfloat16, so that a float32 run gets the same numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def pad_to_official(sequence: Tensor, length: int = 256) -> Tensor:
    """Repeats every prompt's pad, the first of its keys, up to the official number of keys."""
    return torch.cat([sequence[:, :1].expand(-1, length - sequence.shape[1], -1), sequence], dim=1)


def prompt_layouts(folder: Path):
    """Our two layouts of the empty negative prompt and the prompt: padded, packed."""
    from kolors_ref.text_layout import packed_layout, padded_layout
    from kolors_ref.tokenizer import Tokenizer

    tokens = Tokenizer(folder / "tokenizer" / "tokenizer.model")(["", PROMPT])
    return padded_layout(tokens), packed_layout(tokens)


def unet_inputs(folder: Path, size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a guided step gets, with noise in the place of embeddings; every pad of a prompt is the same."""
    config = json.loads((folder / "unet" / "config.json").read_text())
    dim = config["encoder_hid_dim"]
    _, packed = prompt_layouts(folder)
    sequence = noise(packed.input_ids.shape[1], dim, seed=1)[packed.rows]
    pooled_dim = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {
        "latents": noise(1, 4, size // 8, size // 8, seed=2).repeat(2, 1, 1, 1).to(dtype),
        "packed": sequence.to(dtype),
        "sequence": pad_to_official(sequence).to(dtype),
        "key_bias": packed.key_bias.float(),
        "pooled": noise(2, pooled_dim, seed=3).to(dtype),
        "sizes": torch.tensor([[size, size, 0, 0, size, size]] * 2, dtype=dtype),
    }


def vae_latents(size: int, dtype: torch.dtype) -> Tensor:
    """Latents of one picture, in the UNet's scale."""
    return noise(1, 4, size // 8, size // 8, seed=4).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def load_ours(folder: Path, name: str, dtype: torch.dtype) -> nn.Module:
    """Our network, as our pipeline loads it on a CPU."""
    from kolors_ref.loading import load_network
    from weights_conversion import open_checkpoint

    return load_network(open_checkpoint(folder).networks[name], dtype, "cpu")


def text_result(sequence: Tensor, pooled: Tensor) -> Tensor:
    """Sequence and pooled embeddings in one tensor (2, 257, D)."""
    return torch.cat([sequence, pooled[:, None]], dim=1)


def text_ours(folder: Path, dtype: torch.dtype, size: None, packed: bool) -> Loaded:
    """Ours: packed, no pad twice, as our pipeline encodes; or all 256 positions of both prompts."""
    encoder = load_ours(folder, "text_encoder", dtype)
    layout = prompt_layouts(folder)[packed]

    def call():
        embeddings = layout.encode(encoder)
        return text_result(pad_to_official(embeddings.sequence), embeddings.pooled)

    return Loaded(encoder, call)


class InFloat32(nn.Module):
    """A layer that is cast for the time of its call alone."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        """Computes the layer in float32."""
        result = copy.deepcopy(self.layer).float()(*args, **kwargs)
        return result.float()


def text_reference(folder: Path, dtype: torch.dtype, size: None) -> Loaded:
    """Ours, padded, in float32 one layer at a time: all of it would be 25 GB."""
    encoder, (padded, _) = load_ours(folder, "text_encoder", torch.bfloat16), prompt_layouts(folder)
    encoder.token_embed = nn.Sequential(encoder.token_embed)
    encoder.token_embed.register_forward_hook(lambda module, inputs, output: output.float())
    encoder.layers = nn.ModuleList(InFloat32(layer) for layer in encoder.layers)

    def call():
        sequence, pooled = encoder(padded.input_ids, padded.position_ids, padded.bias, padded.pooled_at)
        return text_result(sequence, pooled[:, 0])

    return Loaded(encoder, call)


def text_diffusers(folder: Path, dtype: torch.dtype, size: None) -> Loaded:
    """diffusers' pipeline with its text encoder alone: one pass for the prompt, one for the negative prompt."""
    from diffusers import KolorsPipeline

    pipe = KolorsPipeline.from_pretrained(folder, unet=None, vae=None, torch_dtype=dtype)

    def call():
        positive, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPT, negative_prompt="")
        return text_result(torch.cat([negative, positive]), torch.cat([negative_pooled, pooled]))

    return Loaded(pipe.text_encoder, call)


def unet_ours(folder: Path, dtype: torch.dtype, size: int, packed: bool) -> Loaded:
    """Ours, keys and values prepared once: packed, no pad twice, as our pipeline runs it; or all 256 keys."""
    inputs = unet_inputs(folder, size, dtype)
    unet = load_ours(folder, "unet", dtype)
    text, key_bias = (inputs["packed"], inputs["key_bias"]) if packed else (inputs["sequence"], None)
    context = unet.prepare(text, inputs["pooled"], inputs["sizes"], key_bias)
    return Loaded(unet, lambda: unet(inputs["latents"], torch.tensor(TIMESTEP), context))


def unet_diffusers(folder: Path, dtype: torch.dtype, size: int) -> Loaded:
    """diffusers' UNet, called as its pipeline calls it."""
    from diffusers import UNet2DConditionModel

    inputs = unet_inputs(folder, size, dtype)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype)
    added = {"text_embeds": inputs["pooled"], "time_ids": inputs["sizes"]}
    step = lambda: unet(
        inputs["latents"],
        torch.tensor(TIMESTEP),
        encoder_hidden_states=inputs["sequence"],
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return Loaded(unet, step)


def vae_ours(folder: Path, dtype: torch.dtype, size: int) -> Loaded:
    """Ours, in the memory format that our pipeline gives it."""
    from kolors_ref.models.vae import memory_format

    vae = load_ours(folder, "vae", dtype)
    vae = vae.to(memory_format=memory_format(vae.quant_conv.weight))
    latents = vae_latents(size, dtype)
    return Loaded(vae, lambda: vae.decode(latents))


def vae_diffusers(folder: Path, dtype: torch.dtype, size: int) -> Loaded:
    """diffusers' decoder, as its pipeline calls it."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype)
    latents = vae_latents(size, dtype)
    return Loaded(vae, lambda: vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0])


RUNS: dict[str, Callable[..., Loaded]] = {
    "text_packed": partial(text_ours, packed=True),
    "text_padded": partial(text_ours, packed=False),
    "text_reference": text_reference,
    "text_diffusers": text_diffusers,
    "unet_packed": partial(unet_ours, packed=True),
    "unet_padded": partial(unet_ours, packed=False),
    "unet_diffusers": unet_diffusers,
    "vae_ours": vae_ours,
    "vae_diffusers": vae_diffusers,
}

# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def timed(call: Callable[[], Tensor], steps: int) -> tuple[list[tuple[float, float]], Tensor]:
    """Calls until `steps` calls are counted; gives seconds and processor seconds of each, and the last result."""
    counted: list[tuple[float, float]] = []
    first = True
    while len(counted) < steps:
        start, cpu_start = time.perf_counter(), time.process_time()
        output = call()
        taken, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        if not first or taken >= WARM_UP:
            counted.append((taken, cpu))
        first = False
    return counted, output


@torch.no_grad()
def measure(job: Job, folder: Path, steps: int) -> tuple[dict, Tensor]:
    """Runs a job; gives its figures (seconds, bytes) and its output."""
    with PeakMemory() as loading:
        start = time.perf_counter()
        loaded = RUNS[job.run](folder, getattr(torch, job.dtype), job.size)
        load_seconds = time.perf_counter() - start
    with PeakMemory() as running:
        counted, output = timed(loaded.call, steps)
    figures = {
        **asdict(job),
        "load_seconds": load_seconds,
        "seconds": median(seconds for seconds, _ in counted),
        "cpu_seconds": median(cpu for _, cpu in counted),
        "counted": len(counted),
        "weights": loaded.weight_bytes(),
        # While tensors are cast, pages of the file pass through memory; the system drops them where it is short.
        "needed": max(loading.peaks["RssAnon"], running.peaks["VmHWM"]),
        "resident": max(loading.peaks["VmHWM"], running.peaks["VmHWM"]),
        "anonymous": max(loading.peaks["RssAnon"], running.peaks["RssAnon"]),
        "mapped": max(loading.peaks["RssFile"], running.peaks["RssFile"]),
        "output_std": output.float().std().item(),
    }
    return figures, output


if __name__ == "__main__":
    job, folder, steps, output_file = sys.argv[1:]
    figures, output = measure(Job(**json.loads(job)), Path(folder), int(steps))
    torch.save(output.clone(), output_file)
    print(json.dumps(figures))
