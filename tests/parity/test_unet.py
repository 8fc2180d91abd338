"""The UNet against diffusers' UNet2DConditionModel with the same random weights."""

import pytest
import torch
import torch.nn.functional as F
from parity.oracle import TOLERANCE, assert_parity, pair, relative_error, unet_config

from kolors_ref.models.unet import KeyValue

CONFIGS = {
    "kolors-shaped": unet_config(),
    "two-levels": unet_config(
        (16, 48), (1, 1), (2, 3), layers_per_block=1, text_dim=21, pooled_dim=13, cross_attention_dim=20
    ),
    "gap-at-second-level": unet_config(
        (24, 24, 40), (2, 0, 1), (1, 2, 5), layers_per_block=3, text_dim=24, pooled_dim=30, norm_groups=4
    ),
    "four-levels": unet_config(
        (16, 32, 32, 64), (0, 2, 0, 1), (1, 4, 2, 8), layers_per_block=2, size_embed_dim=6, norm_groups=16
    ),
}
SIZES = [(16, 16), (9, 7), (13, 16)]
DTYPES = list(TOLERANCE)


def natural(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Inputs:
    """Random inputs of batch 3 for a config: different texts and different size conditioning in every row."""

    def __init__(self, config, dtype, size=(9, 7)):
        pooled_dim = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        self.latents = natural(3, 4, *size, seed=1).to(dtype)
        self.text = natural(3, 6, config["encoder_hid_dim"], seed=2).to(dtype)
        self.pooled = natural(3, pooled_dim, seed=3).to(dtype)
        self.sizes = torch.tensor([[72, 56, 0, 0, 72, 56], [1024, 768, 3, 17, 512, 640], [100, 90, 8, 0, 64, 64]])


def official_noise(oracle, inputs, timestep, text=None):
    return oracle(
        inputs.latents,
        timestep,
        encoder_hidden_states=inputs.text if text is None else text,
        added_cond_kwargs={"text_embeds": inputs.pooled, "time_ids": inputs.sizes.to(inputs.latents.dtype)},
    ).sample


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_noise(config, size, dtype):
    """One context serves several timesteps, as in the denoising loop."""
    oracle, ours = pair("unet", config, dtype)
    inputs = Inputs(config, dtype, size)
    context = ours.prepare(inputs.text, inputs.pooled, inputs.sizes)
    for timestep in (1099, 437, 1):
        theirs = official_noise(oracle, inputs, timestep)
        assert_parity(ours(inputs.latents, timestep, context), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_timestep_for_each_sample(dtype):
    config = CONFIGS["kolors-shaped"]
    oracle, ours = pair("unet", config, dtype)
    inputs, timesteps = Inputs(config, dtype), torch.tensor([1099, 3, 512])
    context = ours.prepare(inputs.text, inputs.pooled, inputs.sizes)
    assert_parity(ours(inputs.latents, timesteps, context), official_noise(oracle, inputs, timesteps))


@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor([500.0] * 3)], ids=repr)
def test_kinds_of_timestep(timestep):
    config = CONFIGS["two-levels"]
    oracle, ours = pair("unet", config)
    inputs = Inputs(config, torch.float64)
    context = ours.prepare(inputs.text, inputs.pooled, inputs.sizes)
    assert_parity(ours(inputs.latents, timestep, context), official_noise(oracle, inputs, 500))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_key_bias_stands_for_repeated_keys(config, dtype):
    """ln n on a key is n keys of the same text for the oracle; another n in every row."""
    oracle, ours = pair("unet", config, dtype)
    inputs = Inputs(config, dtype)
    counts = torch.tensor([[5, 1, 1, 1, 1, 3], [1, 1, 7, 1, 1, 1], [2, 2, 2, 2, 2, 2]])
    repeated = torch.stack([text.repeat_interleave(n, dim=0) for text, n in zip(inputs.text, counts, strict=True)])
    assert repeated.shape[1] == 12
    theirs = official_noise(oracle, inputs, 700, repeated)
    assert relative_error(official_noise(oracle, inputs, 700), theirs) > 1e-3  # without the repetition it is another
    context = ours.prepare(inputs.text, inputs.pooled, inputs.sizes, key_bias=counts.to(dtype).log())
    assert_parity(ours(inputs.latents, 700, context), theirs)


@pytest.mark.parametrize("weight", [0.7, "map"])
def test_cross_attention_adds_up_what_it_looks_at(weight):
    """A second KeyValue, with a number or a number for each pixel as its weight, is added before the output."""
    _, ours = pair("unet", CONFIGS["kolors-shaped"])
    attn = ours.cross_attentions()[0]
    dim, heads, pixels = attn.q.in_features, attn.num_heads, 20
    x, text = natural(2, pixels, dim, seed=1).double(), natural(2, 5, attn.k.in_features, seed=2).double()
    key, value = natural(2, 2, heads, 4, dim // heads, seed=3).double()
    if weight == "map":
        weight = natural(2, 1, pixels, 1, seed=4).double()

    q = attn.q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = (proj(text).unflatten(-1, (heads, -1)).transpose(1, 2) for proj in (attn.k, attn.v))
    seen = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
    also_seen = torch.softmax(q @ key.mT / q.shape[-1] ** 0.5, dim=-1) @ value
    expected = F.linear((seen + weight * also_seen).transpose(1, 2).flatten(2), attn.out.weight, attn.out.bias)
    assert relative_error(attn(x, [attn.keys_values(text), KeyValue(key, value, weight=weight)]), expected) < 1e-12


def test_context_add_reaches_every_cross_attention():
    """Looking at the text a second time with weight w is the oracle with (1 + w) times the values."""
    config, weight = CONFIGS["four-levels"], 0.6
    oracle, ours = pair("unet", config)
    inputs = Inputs(config, torch.float64)
    context = ours.prepare(inputs.text, inputs.pooled, inputs.sizes)
    # Ours shares the oracle's tensors: the context has to be made before they change.
    twice = context.add([[layer[0]._replace(weight=weight)] for layer in context.layers])
    assert all(len(layer) == 2 for layer in twice.layers)
    plain = official_noise(oracle, inputs, 300)
    for name, parameter in oracle.named_parameters():
        if name.endswith("attn2.to_v.weight"):
            parameter.mul_(1 + weight)
    theirs = official_noise(oracle, inputs, 300)
    assert relative_error(plain, theirs) > 1e-3
    assert_parity(ours(inputs.latents, 300, twice), theirs)


def test_context_add_wants_one_for_every_cross_attention():
    config = CONFIGS["two-levels"]
    _, ours = pair("unet", config)
    inputs = Inputs(config, torch.float64)
    context = ours.prepare(inputs.text, inputs.pooled, inputs.sizes)
    with pytest.raises(ValueError, match="zip"):
        context.add([[layer[0]] for layer in context.layers[1:]])


@pytest.mark.parametrize("what", ["latents", "text", "pooled", "sizes"])
def test_rows_of_a_batch_are_independent(what):
    """Changing one row's input changes that row alone."""
    config = CONFIGS["kolors-shaped"]
    _, ours = pair("unet", config)
    inputs = Inputs(config, torch.float64)
    before = ours(inputs.latents, 500, ours.prepare(inputs.text, inputs.pooled, inputs.sizes))
    getattr(inputs, what)[1] += 1
    after = ours(inputs.latents, 500, ours.prepare(inputs.text, inputs.pooled, inputs.sizes))
    assert relative_error(after[[0, 2]], before[[0, 2]]) < 1e-12
    assert relative_error(after[1], before[1]) > 1e-3
