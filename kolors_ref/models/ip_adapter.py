"""IP-Adapter-Plus: a picture as a prompt (Ye et al. 2023).

A perceiver resampler condenses CLIP's view of the picture into a few image tokens; every cross-attention of the UNet
gets keys and values of its own for them. The attention itself happens in the UNet:
out = attention(q, text) + scale × attention(q, image) (section 3.2, eq. 5 and, with the scale, 8).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import IPAdapterConfig

# ---------------------------------------------------------------------------------------------------------------------
# The resampler
# ---------------------------------------------------------------------------------------------------------------------


class PerceiverAttention(nn.Module):
    """Lets the queries look at the picture and at each other (Flamingo, Alayrac et al. 2022, section 2.1)."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.head_dim
        self.norm_image = nn.LayerNorm(config.width)
        self.norm_queries = nn.LayerNorm(config.width)
        self.q = nn.Linear(config.width, inner, bias=False)
        self.kv = nn.Linear(config.width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)

    def forward(self, image: Tensor, queries: Tensor) -> Tensor:
        """Maps image (B, L, D) and queries (B, T, D) to what the queries saw, (B, T, D)."""
        queries = self.norm_queries(queries)
        seen = torch.cat([self.norm_image(image), queries], dim=1)
        q = rearrange(self.q(queries), "b t (h c) -> b h t c", h=self.heads)
        k, v = rearrange(self.kv(seen), "b l (kv h c) -> kv b h l c", kv=2, h=self.heads)
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t c -> b t (h c)"))


class ResamplerLayer(nn.Module):
    """Perceiver attention and a feed-forward network, each added to the queries."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.attn = PerceiverAttention(config)
        self.ff = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, config.ffn, bias=False),
            nn.GELU(),
            nn.Linear(config.ffn, config.width, bias=False),
        )

    def forward(self, image: Tensor, queries: Tensor) -> Tensor:
        """Maps image (B, L, D) and queries (B, T, D) to new queries (B, T, D)."""
        queries = queries + self.attn(image, queries)
        return queries + self.ff(queries)


class Resampler(nn.Module):
    """Condenses CLIP's 577 positions into 16 image tokens (official sizes), whatever the number of positions."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.queries = nn.Parameter(
            nn.init.normal_(torch.empty(1, config.num_queries, config.width), std=config.width**-0.5)
        )
        self.proj_in = nn.Linear(config.image_dim, config.width)
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.depth))
        self.proj_out = nn.Linear(config.width, config.output_dim)
        self.norm_out = nn.LayerNorm(config.output_dim)

    def forward(self, clip_hidden: Tensor) -> Tensor:
        """Maps CLIP's hidden states (B, L, image_dim) to image tokens (B, T, output_dim)."""
        image = self.proj_in(clip_hidden)
        queries = self.queries.expand(len(image), -1, -1)
        for layer in self.layers:
            queries = layer(image, queries)
        return self.norm_out(self.proj_out(queries))


# ---------------------------------------------------------------------------------------------------------------------
# The adapter
# ---------------------------------------------------------------------------------------------------------------------


class IPAdapter(nn.Module):
    """The resampler, and a pair of projections for each of the UNet's cross-attentions in order of execution."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.resampler = Resampler(config)
        self.to_k = nn.ModuleList(nn.Linear(config.output_dim, c, bias=False) for c in config.channels)
        self.to_v = nn.ModuleList(nn.Linear(config.output_dim, c, bias=False) for c in config.channels)

    def image_tokens(self, clip_hidden: Tensor) -> Tensor:
        """Maps CLIP's second-to-last hidden states (B, 577, 1024) to image tokens (B, 16, 2048) (official sizes)."""
        return self.resampler(clip_hidden.to(self.resampler.queries.dtype))

    def keys_values(self, image_tokens: Tensor, num_heads: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Projects image tokens to a key and a value for every cross-attention of the UNet.

        Args:
            image_tokens: (B, T, output_dim); the tokens of several pictures are concatenated.
            num_heads: the number of heads of every cross-attention, down, middle, up.

        Returns:
            A list over the cross-attentions of (key, value), each (B, heads, T, head_dim).

        Raises:
            ValueError: num_heads does not have one entry for each layer of the adapter.
        """
        if len(num_heads) != len(self.to_k):
            raise ValueError(
                f"the adapter has {len(self.to_k)} layers, but {len(num_heads)} numbers of heads were given."
            )
        pairs = []
        for to_k, to_v, heads in zip(self.to_k, self.to_v, num_heads, strict=True):
            k, v = (rearrange(proj(image_tokens), "b t (h c) -> b h t c", h=heads) for proj in (to_k, to_v))
            pairs.append((k, v))
        return pairs
