"""The initial weights of the UNet: what it would otherwise spend its first few thousand steps on.

None of this is knowledge of the world: the UNet starts as the identity, which is nearly right where there is little
but noise, and with whitened text embeddings, in which the pads, most of every prompt, say nothing yet.
"""

import torch
from torch import Tensor, nn

from ..models.glm import GLMEncoder
from ..models.unet import Attention, TransformerBlock, UNet
from ..text_layout import packed_layout
from ..tokenizer import Tokenizer
from .data import example

CAPTIONS = 1024
"""Captions that the scale of embeddings is measured on."""
FLOOR = 1e-4
"""The share of the greatest variance that is added to all, so that rounding is not amplified."""
VALUE_GAIN, KEY_GAIN = 5.0, 2.0
"""How much larger than usual the cross-attentions' values and keys are: a word is one among many."""
PAD_SCORE = -8.0
"""The attention score of a pad against the mean pixel."""
CARRIED_SCALE = 0.3
"""The scale of the noisy latents that are carried through beside constants of 1, which steady their norm."""


@torch.no_grad()
def first_weights(unet: UNet, tokenizer: Tokenizer, text_encoder: GLMEncoder, seed: int) -> None:
    """Changes the random weights of a new UNet to those that training starts from."""
    words, pads, pooled = sample_embeddings(tokenizer, text_encoder, seed)
    matrix, mean = whitening(words)
    matrix = nn.init.orthogonal_(torch.empty_like(unet.text_proj.weight)) @ matrix
    unet.text_proj.weight.copy_(matrix)
    unet.text_proj.bias.copy_(-matrix @ mean)
    pad = unet.text_proj(pads.mean(0))
    for block in (module for module in unet.modules() if isinstance(module, TransformerBlock)):
        attend_to_words(block.cross_attn, block.norm2, pad)
    matrix, mean = whitening(pooled)
    first, dim = unet.size_embed[0], pooled.shape[1]
    first.weight[:, :dim] = first.weight[:, :dim] @ matrix
    first.bias.sub_(first.weight[:, :dim] @ mean)
    start_as_identity(unet)


def sample_embeddings(tokenizer: Tokenizer, text_encoder: GLMEncoder, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings of the tokens of some captions, (N, D), of a pad of each, and the pooled ones, (CAPTIONS, D)."""
    words, pads, pooled = [], [], []
    for start in range(0, CAPTIONS, 32):
        tokens = tokenizer([example(seed, number).caption for number in range(start, start + 32)])
        text = packed_layout(tokens).encode(text_encoder)
        pooled.append(text.pooled)
        for row, length in zip(text.sequence, tokens.attention_mask.sum(1).tolist(), strict=True):
            words.append(row[-length:])
            pads.append(row[-length - 1])
    return torch.cat(words), torch.stack(pads), torch.cat(pooled)


def whitening(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric matrix (D, D) that whitens rows (N, D) less their mean, and that mean (D,)."""
    mean = rows.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov((rows - mean).T.double()))
    scaled = directions * (variances + FLOOR * variances.max()).rsqrt()
    return (scaled @ directions.T).to(rows.dtype), mean


def attend_to_words(attention: Attention, norm: nn.LayerNorm, pad: Tensor) -> None:
    """Amplifies words and silences a pad (D,): its value is zero, and the mean pixel hardly attends to it.

    The norm before the queries gets a random bias, and the pad's key points against the query of that bias.
    """
    attention.v.weight.mul_(VALUE_GAIN)
    attention.k.weight.mul_(KEY_GAIN)
    norm.bias.normal_()
    direction = pad / pad.square().sum()
    query = (attention.q.weight @ norm.bias).unflatten(0, (attention.num_heads, -1))
    key = PAD_SCORE * query.shape[1] ** 0.5 * query / query.square().sum(1, keepdim=True)
    attention.k.weight.add_(torch.outer(key.flatten() - attention.k.weight @ pad, direction))
    attention.v.weight.sub_(torch.outer(attention.v.weight @ pad, direction))


def start_as_identity(unet: UNet) -> None:
    """Lets the UNet give back its input: x goes through the last skip connection as SiLU(x) - SiLU(-x) = x.

    Four channels of the first level carry x, -x, 1 and -1 for each channel x of the latents; within a group of the
    last norm they have mean 0 and, as x is of unit variance where there is little but noise, a known scale.
    """
    last, channels, x_scale = unet.up[-1].res[-1], unet.config.channels[0], CARRIED_SCALE
    carried = 4 * unet.config.in_channels
    for part in (unet.conv_in, last.skip, last.conv2):
        part.weight[:carried] = 0.0
        part.bias[:carried] = 0.0
    unet.conv_out.weight.zero_()
    unet.conv_out.bias.zero_()
    norm = ((x_scale**2 + 1) / 2) ** 0.5
    for x in range(unet.config.in_channels):
        for i, sign in enumerate((1.0, -1.0)):
            unet.conv_in.weight[4 * x + i, x, 1, 1] = sign * x_scale
            unet.conv_in.bias[4 * x + 2 + i] = sign
            unet.conv_out.weight[x, 4 * x + i, 1, 1] = sign * norm / x_scale
    last.skip.weight[:carried, channels : channels + carried, 0, 0] = torch.eye(carried)
