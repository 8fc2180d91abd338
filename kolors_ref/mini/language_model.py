"""Stage two of training: the text encoder as a causal language model of captions (GLM, Du et al. 2022).

Each text says the same thing three times: in other words, in another order, perhaps in the other language. The first
caption helps to predict the others, so it pays to know which colour belonged to which shape; single captions do not
ask for that.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GLMConfig
from ..models.glm import Attention, GLMEncoder, RMSNorm, rotary_angles, rotate
from ..tokenizer import Tokenizer
from .captions import LANGUAGES, word
from .claims import Claim, choose_claim, shuffled
from .data import example
from .scenes import generator, pick, sample_scene

IGNORED = -100
"""The target of a position that counts nothing."""
TELLINGS = 3
"""Captions in a text."""
RELATION_SHARE = 0.5
"""The share of texts that are made to say how things stand to each other, which is the hardest to learn of a text."""
DENSE_SHARE = 0.15
"""The share of dense ones among all other texts: being long, they take more of the time."""
SHARPNESS = 8.0
"""The size of the query and key biases that make a head attend some tokens back: larger is sharper."""


class LanguageModel(nn.Module):
    """The text encoder with the two parts that it leaves out: the final norm and the output head."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.encoder = GLMEncoder(config)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        # A token stays the larger part of its own embedding; what the layers know of the others comes on top.
        nn.init.normal_(self.encoder.token_embed.weight)
        for layer in self.encoder.layers:
            for last in (layer.attn.out, layer.ffn.down):
                nn.init.normal_(last.weight, std=0.006)
        look_back(self.encoder.layers[0].attn, config)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross-entropy of the next token, in nats, the mean over texts of the mean over their tokens.

        Args:
            ids: (B, L), padded on the right.
            targets: (B, L), the token after each, or IGNORED.
        """
        batch, length = ids.shape
        positions = torch.arange(length, device=ids.device).expand(batch, length)
        bias = torch.full((length, length), float("-inf"), device=ids.device).triu(1).expand(batch, length, length)
        _, hidden = self.encoder(ids, positions, bias, pooled_at=positions)
        logits = self.lm_head(self.final_norm(hidden))
        losses = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        return (losses.sum(1) / (targets != IGNORED).sum(1)).mean()

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices of the layers, for Muon: neither the token embeddings nor the output head."""
        return [parameter for parameter in self.encoder.layers.parameters() if parameter.ndim > 1]

    def checkpoint(self) -> dict[str, Tensor]:
        """The tensors as a checkpoint's text encoder has them, those that the encoder does not use included."""
        rotary = self.encoder.config.head_dim // 2
        return {
            **self.encoder.state_dict(),
            "final_norm.weight": self.final_norm.weight,
            "lm_head.weight": self.lm_head.weight,
            "rope.inv_freq": 1.0 / 10000 ** (torch.arange(0, rotary, 2, dtype=torch.float32) / rotary),
        }


@torch.no_grad()
def look_back(attention: Attention, config: GLMConfig) -> None:
    """Initialises head h to attend h + 1 tokens back, so that a noun knows its adjectives from the start.

    Equal query and key biases, rotated by their positions (RoFormer, Su et al. 2021), score a key by its distance
    alone; a query bias rotated back beforehand prefers the key that far back. Left to itself, the language model
    remembers which colours there were, and finds the last thing's by elimination.
    """
    attention.qkv.bias.zero_()
    queries, keys, _ = attention.qkv.bias.split(attention.widths)
    bias = torch.zeros(1, 1, 1, config.head_dim)
    bias[..., 0:6:2] = SHARPNESS  # the three pairs that turn fastest
    keys.copy_(bias.flatten().repeat(config.num_kv_groups))
    back = -1 - torch.arange(config.num_heads)[None]
    turned = rotate(bias.expand(-1, -1, config.num_heads, -1), rotary_angles(back, config.head_dim // 2, bias.dtype))
    queries.copy_(turned.flatten())
    values = attention.qkv.weight[-attention.widths[-1] :]
    values.mul_(2.0)
    nn.init.normal_(attention.out.weight, std=0.12)


def caption_batches(tokenizer: Tokenizer, seed: int) -> Callable[[range], tuple[Tensor, Tensor]]:
    """Returns the function that makes a batch of token ids and targets from the numbers of its examples."""
    end, prefix = tokenizer.special_ids["eop"], len(tokenizer.prefix)

    def text(number: int) -> list[int]:
        rng = generator(seed + 4, number)
        if rng.random() < RELATION_SHARE:
            claim = claim_with_relations(rng)
        else:
            claim = choose_claim(example(seed, number).scene, rng, rng.random() < DENSE_SHARE)
        captions = (word(shuffled(claim, rng), rng, pick(rng, LANGUAGES)) for _ in range(TELLINGS))
        return [token for caption in captions for token in (*tokenizer.encode(caption)[prefix:], end)]

    def batch(numbers: range) -> tuple[Tensor, Tensor]:
        rows = [[*tokenizer.prefix, *text(number)] for number in numbers]
        length = max(map(len, rows)) - 1
        start = prefix - 1  # nothing to learn in the prefix
        ids = [row[:-1] + [end] * (length + 1 - len(row)) for row in rows]
        targets = [[IGNORED] * start + row[start + 1 :] + [IGNORED] * (length + 1 - len(row)) for row in rows]
        return torch.tensor(ids), torch.tensor(targets)

    return batch


def claim_with_relations(rng: np.random.Generator) -> Claim:
    """Draws scenes until one is spoken of by how its things stand to each other."""
    while True:
        claim = choose_claim(sample_scene(rng), rng)
        if claim.relations:
            return claim


def bag_of_words(model: LanguageModel) -> LanguageModel:
    """Silences every layer, so that a token's embedding knows neither its neighbours nor its place.

    The embeddings are random, of unit scale: distinct is all that words need to be.
    """
    with torch.no_grad():
        model.encoder.token_embed.weight.mul_(1 / model.encoder.token_embed.weight.std())
        for layer in model.encoder.layers:
            layer.attn.out.weight.zero_()
            layer.ffn.down.weight.zero_()
    return model
