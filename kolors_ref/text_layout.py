"""How tokens are laid out for the text encoder: the official padded layout, and one without repeated pads.

Every pad of a prompt has the same id, the same position and the same (all-visible) attention row, so all of them stay
equal through every layer. n equal keys weigh as much as one key with ln n added to its score: computing one pad instead
of n is exact in real arithmetic, and otherwise as precise as the dtype in which ln n is added: in bf16 the weight of
the pads can be off by 1.6 %. Only ids, positions and bias differ between the two layouts; the encoder is the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .models.glm import GLMEncoder
from .tokenizer import TokenBatch

KEY_MULTIPLE = 16
"""What the number of keys is rounded up to: attention takes a third less time over 32 keys than over 28 (CPU, fp32)."""


MOST_TOKENS = 2048
"""The most tokens in one packed row: attention grows with their square, and soon takes longer than all else."""


@dataclass(frozen=True)
class TextEmbeddings:
    """What the UNet is conditioned on, for N prompts.

    Attributes:
        sequence: (N, L, D), one embedding per key of the cross-attention.
        pooled: (N, D).
        key_bias: (N, L), added to the cross-attention scores; None stands for zeros (the official layout). In the
            encoder's dtype, but float32 at least.
    """

    sequence: Tensor
    pooled: Tensor
    key_bias: Tensor | None = None

    def __getitem__(self, rows: Tensor | slice | list[int]) -> "TextEmbeddings":
        """Selects or repeats prompts."""
        key_bias = None if self.key_bias is None else self.key_bias[rows]
        return TextEmbeddings(self.sequence[rows], self.pooled[rows], key_bias)

    def trimmed(self) -> "TextEmbeddings":
        """Drops the leading keys that no prompt sees, with which `concatenate` padded."""
        if self.key_bias is None:
            return self
        first = int(self.key_bias.isfinite().any(0).int().argmax())
        return TextEmbeddings(self.sequence[:, first:].contiguous(), self.pooled, self.key_bias[:, first:].contiguous())

    def to(self, *args: torch.device | torch.dtype) -> "TextEmbeddings":
        """Moves the embeddings to a device or casts them; the key bias keeps its dtype."""
        key_bias = None if self.key_bias is None else self.key_bias.to(self.sequence.to(*args).device)
        return TextEmbeddings(self.sequence.to(*args), self.pooled.to(*args), key_bias)


def concatenate(parts: Sequence[TextEmbeddings]) -> TextEmbeddings:
    """Joins embeddings of several groups of prompts; where some have fewer keys, masked keys are put in front."""
    length = max(part.sequence.shape[1] for part in parts)
    if all(part.key_bias is None and part.sequence.shape[1] == length for part in parts):
        key_bias = None
    else:
        biases = [
            part.pooled.new_zeros(part.sequence.shape[:2]).float() if part.key_bias is None else part.key_bias
            for part in parts
        ]
        key_bias = torch.cat([F.pad(bias, (length - bias.shape[1], 0), value=-math.inf) for bias in biases])
    return TextEmbeddings(
        torch.cat([F.pad(part.sequence, (0, 0, length - part.sequence.shape[1], 0)) for part in parts]),
        torch.cat([part.pooled for part in parts]),
        key_bias,
    )


@dataclass(frozen=True)
class TextLayout:
    """The encoder's input for N prompts, and where each prompt's embeddings stand in its output.

    Attributes:
        input_ids, position_ids: (B, T).
        bias: (B, T, T) float64, added to the attention scores.
        pooled_at: (B, N / B), the last token of each prompt.
        rows: (N, L), indices into the B * T positions of the output: each prompt's embeddings, pads first.
        key_bias: (N, L) float64 or None, for the UNet's cross-attention.
    """

    input_ids: Tensor
    position_ids: Tensor
    bias: Tensor
    pooled_at: Tensor
    rows: Tensor
    key_bias: Tensor | None

    def encode(self, encoder: GLMEncoder) -> TextEmbeddings:
        """Runs the encoder on this layout, on the encoder's device."""
        device, dtype = encoder.token_embed.weight.device, encoder.token_embed.weight.dtype
        bias = self.bias.to(dtype)  # before it moves: not every device has float64
        inputs = (self.input_ids, self.position_ids, bias, self.pooled_at)
        sequence, pooled = encoder(*(tensor.to(device) for tensor in inputs))
        key_dtype = torch.promote_types(dtype, torch.float32)
        key_bias = None if self.key_bias is None else self.key_bias.to(key_dtype).to(device)
        return TextEmbeddings(sequence.flatten(0, 1)[self.rows.to(device)], pooled.flatten(0, 1), key_bias)


def padded_layout(tokens: TokenBatch) -> TextLayout:
    """Lays prompts out as the official pipeline does: one row per prompt, with all its pads.

    A token sees the tokens before it and no pad; a pad sees everything, later tokens and other pads included.
    """
    num_prompts, length = tokens.input_ids.shape
    real = tokens.attention_mask.bool()
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (causal & real[:, None, :]) | ~real[:, :, None]
    return TextLayout(
        input_ids=tokens.input_ids,
        position_ids=tokens.position_ids,
        bias=torch.zeros(visible.shape, dtype=torch.float64).masked_fill_(~visible, -math.inf),
        pooled_at=torch.full((num_prompts, 1), length - 1),
        rows=torch.arange(num_prompts * length).view(num_prompts, length),
        key_bias=None,
    )


def packed_layout(tokens: TokenBatch) -> TextLayout:
    """Lays all prompts in ONE row, one after the other, each with its n pads as a single token of weight n.

    There should not be many more than `MOST_TOKENS`; see `TokenBatch.split`.

    The cross-attention needs the same number of keys L for every prompt. A prompt of fewer tokens is filled up with p
    copies of its pad, each of weight n / p; this also serves to round L up.
    """
    lengths = tokens.attention_mask.sum(1).tolist()
    pads = [tokens.input_ids.shape[1] - length for length in lengths]
    kept = [length + min(n, 1) for length, n in zip(lengths, pads, strict=True)]
    total, max_length = sum(kept), tokens.input_ids.shape[1]
    num_keys = min(math.ceil(max(kept) / KEY_MULTIPLE) * KEY_MULTIPLE, max_length)

    bias = torch.full((1, total, total), -math.inf, dtype=torch.float64)
    rows = torch.empty(len(kept), num_keys, dtype=torch.long)
    key_bias = torch.zeros(len(kept), num_keys, dtype=torch.float64)
    ends: list[int] = []
    for i, (length, n, start) in enumerate(zip(lengths, pads, [sum(kept[:i]) for i in range(len(kept))], strict=True)):
        end = start + kept[i]
        first = end - length
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        bias[0, first:end, first:end] = torch.zeros(length, length).masked_fill_(~causal, -math.inf)
        copies = num_keys - length
        if n:
            bias[0, start, start:end] = 0.0
            bias[0, start, start] = math.log(n)
            key_bias[i, :copies] = math.log(n / copies)
        rows[i] = torch.cat([torch.full((copies,), start), torch.arange(first, end)])
        ends.append(end - 1)
    keep = torch.cat([torch.arange(max_length - k, max_length) for k in kept])
    prompt = torch.repeat_interleave(torch.arange(len(kept)), torch.tensor(kept))
    return TextLayout(
        input_ids=tokens.input_ids[prompt, keep][None],
        position_ids=tokens.position_ids[prompt, keep][None],
        bias=bias,
        pooled_at=torch.tensor(ends)[None],
        rows=rows,
        key_bias=key_bias,
    )
