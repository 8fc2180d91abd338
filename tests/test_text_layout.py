"""The two layouts of tokens for the text encoder, without the encoder, and the embeddings' small methods."""

import math

import pytest
import torch

from kolors_ref.text_layout import KEY_MULTIPLE, TextEmbeddings, packed_layout, padded_layout
from kolors_ref.tokenizer import TokenBatch

INF = math.inf


def token_batch(rows, max_length):
    """Tokens from lists of ids, padded on the left with 0."""
    pads = [max_length - len(row) for row in rows]
    return TokenBatch(
        torch.tensor([[0] * n + row for n, row in zip(pads, rows, strict=True)]),
        torch.tensor([[0] * n + [1] * len(row) for n, row in zip(pads, rows, strict=True)]),
        torch.tensor([[0] * n + list(range(len(row))) for n, row in zip(pads, rows, strict=True)]),
    )


@pytest.fixture
def tokens():
    """A prompt with two pads, one with three, one with none."""
    return token_batch([[11, 12, 13], [21, 22], [31, 32, 33, 34, 35]], 5)


def test_padded_layout(tokens):
    layout = padded_layout(tokens)
    assert torch.equal(layout.input_ids, tokens.input_ids)
    assert torch.equal(layout.position_ids, tokens.position_ids)
    assert layout.bias[0].tolist() == [
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [-INF, -INF, 0, -INF, -INF],
        [-INF, -INF, 0, 0, -INF],
        [-INF, -INF, 0, 0, 0],
    ]
    assert torch.equal(layout.bias[2].isinf(), torch.ones(5, 5).triu(1).bool())
    assert layout.pooled_at.tolist() == [[4], [4], [4]]
    assert layout.rows.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    assert layout.key_bias is None


def test_packed_layout(tokens):
    layout = packed_layout(tokens)
    assert layout.input_ids.tolist() == [[0, 11, 12, 13, 0, 21, 22, 31, 32, 33, 34, 35]]
    assert layout.position_ids.tolist() == [[0, 0, 1, 2, 0, 0, 1, 0, 1, 2, 3, 4]]
    assert layout.pooled_at.tolist() == [[3, 6, 11]]
    assert layout.rows.tolist() == [[0, 0, 1, 2, 3], [4, 4, 4, 5, 6], [7, 8, 9, 10, 11]]
    assert layout.key_bias.tolist() == [[0.0] * 5] * 3  # two pads in two copies, three in three: each counts once


def test_packed_bias(tokens):
    """A pad counts n times for itself, sees its own prompt, and is seen by itself alone."""
    bias = packed_layout(tokens).bias[0]
    expected = torch.full((12, 12), -INF, dtype=torch.float64)
    for start, end in ((1, 4), (5, 7), (7, 12)):
        for i in range(start, end):
            expected[i, start : i + 1] = 0
    expected[0, 0:4] = torch.tensor([math.log(2), 0, 0, 0], dtype=torch.float64)
    expected[4, 4:7] = torch.tensor([math.log(3), 0, 0], dtype=torch.float64)
    assert torch.equal(bias, expected)


def test_packed_key_bias_of_fewer_copies_than_pads():
    layout = packed_layout(token_batch([[11, 12, 13], [21, 22]], 256))
    assert KEY_MULTIPLE == 16
    assert layout.rows.tolist() == [[*[0] * 13, 1, 2, 3], [*[4] * 14, 5, 6]]
    rows = [[math.log(253 / 13)] * 13 + [0] * 3, [math.log(254 / 14)] * 14 + [0] * 2]
    torch.testing.assert_close(layout.key_bias, torch.tensor(rows, dtype=torch.float64), rtol=1e-15, atol=0)


def test_number_of_keys_is_rounded_up_but_not_beyond_the_prompt():
    assert packed_layout(token_batch([[11] * 16], 256)).rows.shape == (1, 32)
    assert packed_layout(token_batch([[11] * 15], 256)).rows.shape == (1, 16)
    assert packed_layout(token_batch([[11] * 5], 10)).rows.shape == (1, 10)


def test_splitting(tokens):
    """Rows as they were, in order; a prompt longer than a part may be has one of its own."""
    for most, sizes in ((1, [1, 1, 1]), (4, [1, 1, 1]), (5, [2, 1]), (6, [2, 1]), (7, [2, 1]), (10, [3])):
        parts = tokens.split(most)
        assert [len(part.input_ids) for part in parts] == sizes
        for field in ("input_ids", "attention_mask", "position_ids"):
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(tokens, field))


def test_packed_layout_without_pads():
    layout = packed_layout(token_batch([[11, 12], [21, 22]], 2))
    assert layout.input_ids.tolist() == [[11, 12, 21, 22]]
    assert layout.rows.tolist() == [[0, 1], [2, 3]]
    assert layout.key_bias.eq(0).all()


@pytest.mark.parametrize("layout", [padded_layout, packed_layout])
def test_every_row_sees_something(layout, tokens):
    """A row of -inf alone would make the softmax NaN."""
    assert layout(tokens).bias.isfinite().any(-1).all()


class Embedder(torch.nn.Module):
    """A stand-in for the encoder: a token's embedding is its id and its position."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.token_embed = torch.nn.Embedding(1, 1, dtype=dtype)

    def forward(self, input_ids, position_ids, bias, pooled_at):
        assert bias.dtype == self.token_embed.weight.dtype
        sequence = torch.stack([input_ids, position_ids], dim=-1).to(bias.dtype)
        return sequence, -sequence.take_along_dim(pooled_at[..., None], dim=1)


def test_embeddings_stand_where_the_prompts_are(tokens):
    text = packed_layout(tokens).encode(Embedder())
    assert text.sequence[0].tolist() == [[0, 0], [0, 0], [11, 0], [12, 1], [13, 2]]
    assert text.sequence[1].tolist() == [[0, 0], [0, 0], [0, 0], [21, 0], [22, 1]]
    assert text.pooled.tolist() == [[-13, -2], [-22, -1], [-35, -4]]
    official = padded_layout(tokens).encode(Embedder())
    assert torch.equal(text.sequence, official.sequence)
    assert torch.equal(text.pooled, official.pooled)


@pytest.mark.parametrize(
    ("dtype", "key_dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_number_formats(dtype, key_dtype, tokens):
    """The key bias is never rounded to half precision."""
    text = packed_layout(tokens).encode(Embedder(dtype))
    assert (text.sequence.dtype, text.pooled.dtype, text.key_bias.dtype) == (dtype, dtype, key_dtype)
    cast = text.to(torch.float16)
    assert (cast.sequence.dtype, cast.pooled.dtype, cast.key_bias.dtype) == (torch.float16, torch.float16, key_dtype)


def test_selecting_and_repeating_prompts(tokens):
    text = packed_layout(tokens).encode(Embedder())
    twice = text[[1, 1, 0]]
    assert torch.equal(twice.sequence, text.sequence[[1, 1, 0]])
    assert torch.equal(twice.pooled, text.pooled[[1, 1, 0]])
    assert torch.equal(twice.key_bias, text.key_bias[[1, 1, 0]])
    assert text[1:].pooled.shape == (2, 2)
    assert TextEmbeddings(text.sequence, text.pooled)[:1].key_bias is None
