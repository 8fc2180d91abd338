"""ChatGLM3 as the text encoder, in both layouts, against diffusers' ChatGLMModel with the same random weights."""

import pytest
import torch
import torch.nn.functional as F
from parity.oracle import TOLERANCE, assert_parity, glm_config, pair, relative_error

from kolors_ref.text_layout import packed_layout, padded_layout
from kolors_ref.tokenizer import TokenBatch

VOCAB = 160
CONFIGS = {
    "one-group": glm_config(4, 36, 50, num_heads=3, head_dim=12, groups=1, vocab_size=VOCAB),
    "two-groups": glm_config(3, 32, 72, num_heads=4, head_dim=8, groups=2, vocab_size=VOCAB),
    "four-groups": glm_config(2, 52, 33, num_heads=8, head_dim=4, groups=4, vocab_size=VOCAB),
    "one-layer": glm_config(1, 30, 44, num_heads=2, head_dim=16, groups=2, vocab_size=VOCAB),
    "large-epsilon": glm_config(2, 24, 40, num_heads=4, head_dim=16, groups=4, eps=0.3, vocab_size=VOCAB),
}
LENGTHS = {
    "mixed": (24, 2, 15, 23, 7),  # full, the prefix alone, and between
    "equal": (9, 9),
    "no-pads": (24, 24),
    "alone": (11,),
}
DTYPES = list(TOLERANCE)
LAYOUTS = [padded_layout, packed_layout]


def token_batch(lengths, max_length=24, seed=0):
    """Random prompts of these lengths, padded on the left as the tokenizer does it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (len(lengths), max_length), generator=generator)
    place = torch.arange(max_length) - max_length + torch.tensor(lengths)[:, None]
    mask = (place >= 0).long()
    return TokenBatch(ids * mask, mask, place * mask)


def official_embeddings(oracle, tokens):
    """The sequence (B, L, D) and pooled (B, D) embeddings as diffusers' pipeline takes them."""
    states = oracle(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        position_ids=tokens.position_ids,
        output_hidden_states=True,
    ).hidden_states
    return states[-2].transpose(0, 1), states[-1][-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_padded_layout_is_official(config, lengths, dtype):
    oracle, ours = pair("text_encoder", config, dtype)
    tokens = token_batch(lengths)
    sequence, pooled = official_embeddings(oracle, tokens)
    text = padded_layout(tokens).encode(ours)
    assert text.key_bias is None
    assert_parity(text.sequence, sequence)
    assert_parity(text.pooled, pooled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_packed_layout_is_official(config, lengths, dtype):
    """The pooled embeddings, every token's embedding, and the pad's wherever the official sequence has a pad."""
    oracle, ours = pair("text_encoder", config, dtype)
    tokens = token_batch(lengths)
    sequence, pooled = official_embeddings(oracle, tokens)
    text = packed_layout(tokens).encode(ours)
    assert_parity(text.pooled, pooled)
    for i, length in enumerate(lengths):
        assert_parity(text.sequence[i, -length:], sequence[i, -length:])
        fill = text.sequence[i, :-length]
        if len(fill):
            assert_parity(fill, sequence[i, : len(fill)])


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_key_bias_counts_the_pads(lengths):
    """Behind the key bias stand as many keys as the official sequence has."""
    layout = packed_layout(token_batch(lengths))
    torch.testing.assert_close(layout.key_bias.exp().sum(1), torch.full((len(lengths),), 24.0, dtype=torch.float64))
    for bias, length in zip(layout.key_bias, lengths, strict=True):
        assert bias[-length:].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_cross_attention_over_packed_keys_is_the_official_one(lengths, dtype):
    """A cross-attention with the key bias sees in the packed sequence what it sees in the official one."""
    config = CONFIGS["two-groups"]
    oracle, ours = pair("text_encoder", config, dtype)
    tokens = token_batch(lengths)
    official, _ = official_embeddings(oracle, tokens)
    text = packed_layout(tokens).encode(ours)
    generator = torch.Generator().manual_seed(1)
    width = config["hidden_size"]
    query = torch.randn(len(lengths), 10, width, generator=generator).to(dtype)
    to_k, to_v = (torch.randn(2, width, width, generator=generator) / width**0.5).to(dtype)

    theirs = F.scaled_dot_product_attention(query, official @ to_k, official @ to_v)
    bias = text.key_bias[:, None, :]
    seen = F.scaled_dot_product_attention(query, text.sequence @ to_k, text.sequence @ to_v, attn_mask=bias)
    assert_parity(seen, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_do_not_see_each_other(layout):
    _, ours = pair("text_encoder", CONFIGS["two-groups"])
    together = layout(token_batch((24, 2, 15))).encode(ours)
    changed = token_batch((24, 2, 15))
    changed.input_ids[1, -1] += 1
    changed = layout(changed).encode(ours)
    assert torch.equal(together.sequence[[0, 2]], changed.sequence[[0, 2]])
    assert torch.equal(together.pooled[[0, 2]], changed.pooled[[0, 2]])
    assert relative_error(changed.pooled[1], together.pooled[1]) > 1e-3


def test_pads_see_the_whole_prompt_and_weigh_in():
    """What makes the layouts worth testing: pads depend on the last token, and their number matters."""
    _, ours = pair("text_encoder", CONFIGS["two-groups"])
    tokens, changed = token_batch((9,)), token_batch((9,))
    changed.input_ids[0, -1] = (changed.input_ids[0, -1] + 1) % VOCAB
    a, b = (padded_layout(t).encode(ours).sequence[0, 0] for t in (tokens, changed))
    assert relative_error(a, b) > 1e-3
    short = TokenBatch(tokens.input_ids[:, 10:], tokens.attention_mask[:, 10:], tokens.position_ids[:, 10:])
    c = packed_layout(short).encode(ours).sequence[0, 0]
    assert relative_error(a, c) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_last_layer_runs_for_the_last_tokens_alone(layout):
    _, ours = pair("text_encoder", CONFIGS["two-groups"])
    positions = []
    ours.layers[-1].ffn.register_forward_hook(lambda module, args, output: positions.append(args[0].shape[:2].numel()))
    layout(token_batch((24, 2, 15, 23, 7))).encode(ours)
    assert positions == [5]


def test_packed_layout_is_short():
    layout = packed_layout(token_batch((9, 2), max_length=256))
    assert layout.input_ids.shape == (1, 13)  # the tokens, and one pad for each prompt
    assert layout.rows.shape == (2, 16)


def test_rotary_table_is_rounded_in_half_precision():
    """In bf16 ours is as close to the oracle in bf16 as rounding allows, and both are far from float32."""
    oracle, ours = pair("text_encoder", CONFIGS["two-groups"], torch.bfloat16)
    tokens = token_batch((300, 200), max_length=300)
    theirs, _ = official_embeddings(oracle, tokens)
    text = padded_layout(tokens).encode(ours)
    exact, _ = official_embeddings(oracle.float(), tokens)
    rounding = relative_error(theirs, exact)
    assert 1e-3 < rounding < 5e-2
    assert relative_error(text.sequence, theirs) < rounding / 2  # 0 where no product is taken in another order
