"""From prompts to token ids: ChatGLM3's SentencePiece pieces behind a two-token prefix, padded on the left."""

from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

MAX_LENGTH = 256
"""Tokens a prompt is padded to: the length Kolors was trained with (Kolors report, section 2.1)."""

SPECIAL_TOKENS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
"""ChatGLM3's special tokens, in the order of their ids, which follow those of the SentencePiece model."""


@dataclass(frozen=True)
class TokenBatch:
    """Prompts as tokens, padded on the left: three integer tensors of shape (B, L).

    attention_mask is 1 for a token and 0 for a pad. position_ids count the tokens from 0; every pad has position 0.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor

    def split(self, most: int) -> list["TokenBatch"]:
        """Splits the batch into runs of as many prompts as have at most `most` tokens together, and of one at least."""
        starts, held = [], 0
        for row, length in enumerate(self.attention_mask.sum(1).tolist()):
            if row == 0 or held + length > most:
                starts.append(row)
                held = 0
            held += length
        parts = [slice(*ends) for ends in pairwise([*starts, None])]
        return [TokenBatch(self.input_ids[p], self.attention_mask[p], self.position_ids[p]) for p in parts]


class Tokenizer:
    """ChatGLM3's tokenizer over a SentencePiece model file.

    A prompt is `[gMASK] sop` and its pieces. The text of a special token inside a prompt is treated as ordinary text.

    Args:
        model_file: the checkpoint's tokenizer.model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a SentencePiece model.
    """

    def __init__(self, model_file: str | Path) -> None:
        self.model_file = Path(model_file)
        if not self.model_file.is_file():
            raise FileNotFoundError(f"there is no tokenizer model at {self.model_file}; expected a SentencePiece file")
        try:
            self.model = sentencepiece.SentencePieceProcessor()
            self.model.LoadFromSerializedProto(self.model_file.read_bytes())
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{self.model_file} is not a SentencePiece model") from error
        first = self.model.vocab_size()
        self.special_ids = {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.prefix = [self.special_ids["[gMASK]"], self.special_ids["sop"]]
        self.pad_id = self.model.unk_id()
        self.vocab_size = first + len(SPECIAL_TOKENS)

    def encode(self, prompt: str) -> list[int]:
        """Returns the ids of one prompt, prefix included, neither padded nor truncated.

        Raises:
            ValueError: the prompt is not valid Unicode.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a prompt must be valid Unicode text, but character {error.start} is not") from None
        return self.prefix + self.model.encode(prompt)

    def __call__(self, prompts: str | list[str], max_length: int = MAX_LENGTH) -> TokenBatch:
        """Tokenizes prompts, pads them on the left and cuts off what is beyond max_length.

        Args:
            prompts: one prompt or a list of B prompts.
            max_length: L, the number of tokens of every row, the two of the prefix included.

        Raises:
            TypeError: a prompt is not a string, or max_length is not an integer.
            ValueError: max_length leaves no room for the prefix, the list is empty, or a prompt is not valid Unicode.
        """
        prompts = list(prompts) if isinstance(prompts, list | tuple) else [prompts]
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TypeError(f"a prompt must be a string, not {type(prompt).__name__}")
        if isinstance(max_length, bool) or not isinstance(max_length, Integral):
            raise TypeError(f"max_length must be an integer, not {type(max_length).__name__}")
        if max_length < len(self.prefix):
            raise ValueError(f"max_length is {max_length}; it must be at least {len(self.prefix)}, the prefix's length")
        if not prompts:
            raise ValueError("the list of prompts is empty; give at least one prompt")
        rows = [self.encode(prompt)[:max_length] for prompt in prompts]
        pads = [max_length - len(row) for row in rows]
        return TokenBatch(
            input_ids=torch.tensor([[self.pad_id] * n + row for n, row in zip(pads, rows, strict=True)]),
            attention_mask=torch.tensor([[0] * n + [1] * len(row) for n, row in zip(pads, rows, strict=True)]),
            position_ids=torch.tensor([[0] * n + list(range(len(row))) for n, row in zip(pads, rows, strict=True)]),
        )
