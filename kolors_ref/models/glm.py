"""ChatGLM3-6B as Kolors' text encoder (ChatGLM, GLM team 2024; Kolors report, section 2.1).

A pre-norm decoder: rotary positions on half of each head, grouped keys and values, SwiGLU. The network does not know
what a pad is: token ids, positions and an additive attention bias say all (see text_layout.py for the two layouts).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import GLMConfig

# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019) with its statistics in float32, as ChatGLM has it."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis of x (..., D)."""
        mean_square = x.float().pow(2).mean(-1, keepdim=True)
        return (self.weight * (x * torch.rsqrt(mean_square + self.eps))).to(x.dtype)


def rotary_angles(position_ids: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of every position's angles, each (B, 1, L, dim / 2) (RoFormer, Su et al. 2021).

    The table is made in float32 and, for a half-precision model, rounded to its dtype: the official weights were
    trained with the rounded table.
    """
    frequencies = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32, device=position_ids.device) / dim)
    angles = position_ids[:, None, :, None].float() * frequencies
    table_dtype = torch.float32 if dtype == torch.float64 else dtype
    return angles.cos().to(table_dtype), angles.sin().to(table_dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates interleaved pairs of the first half of each head; the second half carries no position.

    Args:
        x: queries or keys, (B, H, L, C).
        rotary: cosine and sine, each (B, 1, L, C / 4).
    """
    cos, sin = rotary
    turned, plain = x.chunk(2, dim=-1)
    even, odd = rearrange(turned, "... (c pair) -> pair ... c", pair=2)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return torch.cat([turned.flatten(-2), plain], dim=-1)


class Attention(nn.Module):
    """Self-attention with grouped keys and values (GQA, Ainslie et al. 2023); one fused projection, with a bias."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.widths = [config.num_heads * config.head_dim] + 2 * [config.num_kv_groups * config.head_dim]
        self.qkv = nn.Linear(config.hidden_size, sum(self.widths))
        self.out = nn.Linear(self.widths[0], config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor, query_at: Tensor | None) -> Tensor:
        """See Layer.forward."""
        q, k, v = (rearrange(t, "b l (h c) -> b h l c", c=self.head_dim) for t in self.qkv(x).split(self.widths, -1))
        q, k = rotate(q, rotary), rotate(k, rotary)
        if query_at is not None:
            q = q.take_along_dim(query_at[:, None, :, None], dim=2)
            bias = bias.take_along_dim(query_at[:, None, :, None], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        return self.out(rearrange(y, "b h l c -> b l (h c)"))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): SiLU of the first half times the second."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, L, D) to (B, L, D)."""
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor, query_at: Tensor | None = None) -> Tensor:
        """Computes the layer, only at the query positions if these are given.

        Args:
            x: (B, L, D).
            rotary: cosine and sine of the positions.
            bias: (B, 1, L, L), added to the attention scores.
            query_at: (B, P), the positions to compute; all of them if None.

        Returns:
            (B, P, D), or (B, L, D) for all positions.
        """
        attended = self.attn(self.norm1(x), rotary, bias, query_at)
        x = attended + (x if query_at is None else x.take_along_dim(query_at[..., None], dim=1))
        return x + self.ffn(self.norm2(x))


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


class GLMEncoder(nn.Module):
    """ChatGLM3 used as an encoder, without its final norm and its output head."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, bias: Tensor, pooled_at: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encodes tokens.

        Args:
            input_ids: (B, L).
            position_ids: (B, L).
            bias: (B, L, L), added to the attention scores: -inf where a row's token must not see a column's, 0 where
                it may, ln n where the column's token stands for n equal ones.
            pooled_at: (B, P), the positions whose pooled embedding is wanted.

        Returns:
            The sequence embedding (B, L, D), which is the output of the last layer but one, and the pooled embeddings
            (B, P, D), the output of the last layer at pooled_at.
        """
        x = self.token_embed(input_ids)
        rotary = rotary_angles(position_ids, self.config.head_dim // 2, x.dtype)
        bias = bias[:, None].to(x.dtype)
        for layer in self.layers[:-1]:
            x = layer(x, rotary, bias)
        return x, self.layers[-1](x, rotary, bias, query_at=pooled_at)
