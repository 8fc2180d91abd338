"""The sizes of every network and the numbers of the noise schedule; the official Kolors values are the defaults.

A configuration is a frozen dataclass, and networks are built from these alone; what all networks of a kind share, such
as the width of the UNet's feed-forward layers, is in the network's file.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GLMConfig:
    """ChatGLM3-6B as a text encoder (GLM, Du et al. 2022; ChatGLM, GLM team 2024).

    `max_positions` is the length that files say it was trained for: nothing is built from it.
    """

    vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    num_layers: int = 28
    num_heads: int = 32
    head_dim: int = 128
    num_kv_groups: int = 2
    norm_eps: float = 1e-5
    max_positions: int = 32768


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser: SDXL's UNet (Podell et al. 2023, section 2.1) behind a projection of the GLM's embeddings.

    The tuples run over the levels, from full resolution down. `transformer_depth` is the number of transformer blocks
    in each attention of a level, 0 for a level without attention; the middle block has the depth of the last level.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280)
    transformer_depth: tuple[int, ...] = (0, 2, 10)
    num_heads: tuple[int, ...] = (5, 10, 20)
    layers_per_block: int = 2
    text_dim: int = 4096
    cross_attention_dim: int = 2048
    pooled_dim: int = 4096
    size_embed_dim: int = 256
    norm_groups: int = 32
    sample_size: int = 128


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder: SDXL's, a KL autoencoder (Rombach et al. 2022, section 3.1) with 4 latent channels."""

    in_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    scaling_factor: float = 0.13025

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent: 8 for the official autoencoder."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule of training: more steps and a larger final beta than SDXL's (Kolors report, on high
    resolutions)."""

    num_train_timesteps: int = 1100
    beta_start: float = 0.00085
    beta_end: float = 0.014
    beta_schedule: str = "scaled_linear"
    timestep_spacing: str = "leading"
    steps_offset: int = 1


SDXL_SCHEDULE = ScheduleConfig(num_train_timesteps=1000, beta_end=0.012)
"""SDXL's schedule, for comparison: its last timestep has twice the signal of Kolors', so four times the SNR."""


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The image encoder of image prompts: CLIP's ViT-L/14 at 336 pixels (Radford et al. 2021, section 2.4).

    `projection_dim` is the size of CLIP's own embedding of a picture: files carry that projection, but image prompts do
    not use it.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    image_size: int = 336
    patch_size: int = 14
    projection_dim: int = 768
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class IPAdapterConfig:
    """Image prompts: IP-Adapter-Plus (Ye et al. 2023). A perceiver resampler, and keys and values for the UNet.

    `channels` holds the UNet's channels at each of its cross-attentions, in order of execution: down, middle, up.
    """

    image_dim: int = 1024
    width: int = 1280
    depth: int = 4
    heads: int = 20
    head_dim: int = 64
    num_queries: int = 16
    ffn: int = 5120
    output_dim: int = 2048
    channels: tuple[int, ...] = (640,) * 4 + (1280,) * 20 + (1280,) * 10 + (1280,) * 30 + (640,) * 6
