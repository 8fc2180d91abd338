"""CLIP's vision tower against transformers' CLIPVisionModelWithProjection, with the same random weights."""

from copy import deepcopy
from dataclasses import asdict

import pytest
import torch
from parity.oracle import randomise, relative_error
from transformers import CLIPVisionConfig as OracleConfig
from transformers import CLIPVisionModelWithProjection

from kolors_ref.config import CLIPVisionConfig
from kolors_ref.models.clip import CLIPVision
from kolors_ref.precision import fast_dtype
from weights_conversion.keymaps.clip import CONFIG, TABLE

CONFIGS = [
    CLIPVisionConfig(width=48, layers=3, heads=4, mlp=80, image_size=42, patch_size=14, projection_dim=20),
    CLIPVisionConfig(width=64, layers=4, heads=2, mlp=256, image_size=32, patch_size=8, projection_dim=64),
    CLIPVisionConfig(
        width=40, layers=1, heads=5, mlp=24, image_size=30, patch_size=10, projection_dim=7, norm_eps=3e-2
    ),
]


def our_names(state):
    """Renames an official state dict by the key table."""
    return {TABLE.to_ours(name): tensor for name, tensor in state.items()}


def oracle_config(config):
    return OracleConfig(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp,
        image_size=config.image_size,
        patch_size=config.patch_size,
        projection_dim=config.projection_dim,
        layer_norm_eps=config.norm_eps,
    )


def pair(config, dtype=torch.float64, seed=0):
    """The oracle and ours, with the same weights."""
    oracle = randomise(CLIPVisionModelWithProjection(oracle_config(config)), seed).to(dtype)
    oracle.set_attn_implementation("sdpa")  # eager attention takes its softmax in float32, whatever the dtype
    with torch.device("meta"):
        ours = CLIPVision(config)
    state = our_names(oracle.state_dict())
    ours.load_state_dict({name: state[name] for name in state.keys() - TABLE.unused}, assign=True)
    return oracle, ours.eval()


def picture(config, dtype=torch.float64, batch=2):
    shape = (batch, 3, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@torch.no_grad()
def test_every_hidden_state(config, dtype, tolerance):
    oracle, ours = pair(config, dtype)
    pixels = picture(config, dtype)
    expected = oracle(pixels, output_hidden_states=True)
    states = ours.hidden_states(pixels)
    assert len(states) == len(expected.hidden_states) == config.layers + 1
    assert states[0].shape == (2, 1 + (config.image_size // config.patch_size) ** 2, config.width)
    assert max(map(relative_error, states, expected.hidden_states)) < tolerance
    assert relative_error(ours(pixels), expected.hidden_states[-2]) < tolerance


@torch.no_grad()
def test_the_picture_of_zeros():
    """The unconditional branch of image prompts: CLIP of an all-zero tensor, not a zero embedding."""
    oracle, ours = pair(CONFIGS[0])
    pixels = torch.zeros_like(picture(CONFIGS[0]))
    hidden = ours(pixels)
    assert hidden.abs().min() > 0
    assert relative_error(hidden, oracle(pixels, output_hidden_states=True).hidden_states[-2]) < 1e-10


@torch.no_grad()
def test_no_more_layers_than_needed():
    config = CONFIGS[1]
    _, ours = pair(config)
    pixels = picture(config)
    states = ours.hidden_states(pixels)
    ran = []
    for i, block in enumerate(ours.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    for layer in range(-config.layers - 1, config.layers + 1):
        ran.clear()
        assert torch.equal(ours(pixels, layer), states[layer])
        assert ran == list(range(layer % (config.layers + 1)))


@pytest.mark.parametrize("layer", [5, -6])
def test_a_layer_that_does_not_exist(layer):
    ours = CLIPVision(CONFIGS[1])
    with pytest.raises(ValueError, match=f"layer {layer} .* 4 blocks"):
        ours(picture(CONFIGS[1], torch.float32), layer)


@pytest.mark.parametrize("shape", [(1, 3, 32, 24), (3, 32, 32), (1, 1, 32, 32), (1, 3, 40, 40)])
def test_pixels_of_a_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"must have \(B, 3, 32, 32\)"):
        CLIPVision(CONFIGS[1])(torch.zeros(shape))


@pytest.mark.parametrize("config", [*CONFIGS, CLIPVisionConfig()])
def test_every_official_key_is_mapped_once(config):
    """In both directions, with the same shapes; at the official size too."""
    with torch.device("meta"):
        oracle, ours = CLIPVisionModelWithProjection(oracle_config(config)), CLIPVision(config)
    official = oracle.state_dict()
    state = our_names(official)
    assert len(state) == len(official)
    assert set(state) == TABLE.names(asdict(config)) == set(ours.state_dict()) | TABLE.unused
    assert {TABLE.to_official(name) for name in state} == set(official)
    assert all(state[name].shape == tensor.shape for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("config", [*CONFIGS, CLIPVisionConfig()])
def test_the_config_is_translated_both_ways(config):
    official = oracle_config(config).to_dict()
    assert CLIPVisionConfig(**CONFIG.to_ours(official, "config.json")) == config
    assert OracleConfig(**CONFIG.to_official(asdict(config))).to_dict() == official | {
        "architectures": ["CLIPVisionModelWithProjection"]
    }


@pytest.fixture(scope="module")
@torch.no_grad()
def full_size():
    """The whole official tower, the oracle's and ours in fp32, a picture, and what the oracle makes of it."""
    oracle, ours = pair(CLIPVisionConfig(), torch.float32)
    pixels = picture(CLIPVisionConfig(), torch.float32, batch=1)
    return oracle, ours, pixels, oracle(pixels, output_hidden_states=True).hidden_states[-2]


@torch.no_grad()
def test_full_size(full_size):
    _, ours, pixels, exact = full_size
    assert exact.shape == (1, 577, 1024)
    assert relative_error(ours(pixels), exact) < 1e-5


@pytest.mark.skipif(
    fast_dtype(torch.device("cpu")) != torch.bfloat16, reason="this CPU takes minutes for so many products in bf16"
)
@torch.no_grad()
def test_full_size_in_bfloat16(full_size):
    """Ours in bf16 is as near to fp32 as the oracle in bf16."""
    oracle, ours, pixels, exact = full_size
    states = deepcopy(oracle).bfloat16()(pixels, output_hidden_states=True).hidden_states
    theirs = relative_error(states[-2].float(), exact)
    half = relative_error(deepcopy(ours).bfloat16()(pixels).float(), exact)
    assert 1e-4 < half < 1.1 * theirs


def test_gradients_reach_every_parameter():
    ours = randomise(CLIPVision(CONFIGS[0])).requires_grad_()
    ours(picture(CONFIGS[0], torch.float32), layer=-1).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in ours.parameters())
