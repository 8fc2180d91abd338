"""CLIP's vision tower, the image encoder of image prompts (Radford et al. 2021; ViT, Dosovitskiy et al. 2021)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import CLIPVisionConfig

# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU (Hendrycks and Gimpel 2016, section 2) with which CLIP was trained."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies it to x, elementwise."""
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2) of every position with every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, L, D) to (B, L, D)."""
        q, k, v = (rearrange(proj(x), "b l (h c) -> b h l c", h=self.heads) for proj in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(seen, "b h l c -> b l (h c)"))


class Block(nn.Module):
    """Pre-norm self-attention and a two-layer MLP, each with a residual connection."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = nn.Sequential(nn.Linear(config.width, config.mlp), QuickGELU(), nn.Linear(config.mlp, config.width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, L, D) to (B, L, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


class CLIPVision(nn.Module):
    """Sees a picture as one class token and a grid of patches: 1 + 24 × 24 = 577 positions for the official sizes.

    Image prompts take the output of the last block but one, as `forward` gives it. CLIP's own embedding of the whole
    picture, a norm and a projection of the class token after the last block, is not needed and left out.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        num_patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        draw = lambda *shape: nn.Parameter(nn.init.normal_(torch.empty(shape), std=config.width**-0.5))
        self.class_token, self.pos_embed = draw(config.width), draw(1 + num_patches, config.width)
        self.norm_pre = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def tokens(self, pixels: Tensor) -> Tensor:
        """Maps pixels (B, 3, S, S) to what the first block sees, (B, L, D): class token, then patches row by row.

        Raises ValueError for another size of picture than the position embeddings are made for.
        """
        size = self.config.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(
                f"CLIP's pixels have the shape {tuple(pixels.shape)}, but must have (B, 3, {size}, {size})."
            )
        patches = rearrange(self.patch_embed(pixels.to(self.class_token.dtype)), "b d h w -> b (h w) d")
        class_token = self.class_token.expand(len(patches), 1, -1)
        return self.norm_pre(torch.cat([class_token, patches], dim=1) + self.pos_embed)

    def hidden_states(self, pixels: Tensor) -> list[Tensor]:
        """Maps pixels (B, 3, S, S) to layers + 1 tensors (B, L, D): the first block's input, then every output."""
        states = [self.tokens(pixels)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def forward(self, pixels: Tensor, layer: int = -2) -> Tensor:
        """Maps pixels (B, 3, S, S), standardised by CLIP's mean and deviation, to `hidden_states(pixels)[layer]`.

        Blocks after that layer are not computed. Raises ValueError for a layer that does not exist.
        """
        depth = layer if layer >= 0 else len(self.blocks) + 1 + layer
        if not 0 <= depth <= len(self.blocks):
            raise ValueError(f"layer {layer} of CLIP does not exist: it has {len(self.blocks)} blocks.")
        x = self.tokens(pixels)
        for block in self.blocks[:depth]:
            x = block(x)
        return x
