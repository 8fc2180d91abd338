"""The autoencoder against diffusers' AutoencoderKL with the same random weights."""

import pytest
import torch
from parity.oracle import TOLERANCE, assert_parity, pair, relative_error, vae_config

CONFIGS = {
    "kolors-shaped": vae_config((8, 16, 24, 24), 2),
    "two-levels": vae_config((12, 20), 1, norm_groups=2, scaling_factor=0.3),
    "three-levels": vae_config((16, 8, 32), 3, latent_channels=6, norm_groups=8, scaling_factor=1.7),
    "one-level": vae_config((16,), 1, latent_channels=3, norm_groups=16, scaling_factor=0.18215),
}
SIZES = [(64, 48), (24, 88)]
ODD_SIZES = [(37, 51), (50, 31)]  # pixels that no latent divides, and latents of odd sides
DTYPES = list(TOLERANCE)


def natural(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES + ODD_SIZES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_encode(config, size, dtype):
    """Mean, deviation, mode and a sample, in the UNet's scale."""
    oracle, ours = pair("vae", config, dtype)
    pixels = natural(2, 3, *size, seed=1).tanh().to(dtype)
    scale = config["scaling_factor"]
    theirs = oracle.encode(pixels).latent_dist
    posterior = ours.encode(pixels)
    assert_parity(posterior.mean, scale * theirs.mean)
    assert_parity(posterior.mode(), scale * theirs.mode())
    assert_parity(posterior.std, scale * theirs.std)
    noise = natural(*theirs.mean.shape, seed=5).to(dtype)
    sample = theirs.sample(generator=torch.Generator().manual_seed(7))
    drawn = torch.randn(theirs.mean.shape, generator=torch.Generator().manual_seed(7), dtype=dtype)
    assert_parity(posterior.sample(drawn), scale * sample)
    assert_parity(posterior.sample(noise), scale * (theirs.mean + theirs.std * noise))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(8, 6), (7, 5), (3, 11)], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_decode(config, size, dtype):
    oracle, ours = pair("vae", config, dtype)
    latents = config["scaling_factor"] * natural(2, config["latent_channels"], *size, seed=1).to(dtype)
    theirs = oracle.decode(latents / config["scaling_factor"]).sample
    assert_parity(ours.decode(latents), theirs)


def test_extreme_variance_is_clamped():
    """Logarithmic variances beyond [-30, 20] count as the bounds."""
    config = CONFIGS["two-levels"]
    oracle, ours = pair("vae", config)
    bias = oracle.quant_conv.bias  # shared with ours
    bias[config["latent_channels"] :] += torch.tensor([90.0, -90.0, 0.0, 0.0])
    pixels = natural(1, 3, 16, 12, seed=1).double()
    theirs = oracle.encode(pixels).latent_dist.std * config["scaling_factor"]
    std = ours.encode(pixels).std
    for channel in range(4):
        assert relative_error(std[:, channel], theirs[:, channel]) < 1e-10
    assert std[:, 0].unique().numel() == 1
    assert std[:, 1].unique().numel() == 1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_downscale_is_that_of_the_network(config):
    _, ours = pair("vae", config)
    latents = ours.encode(natural(1, 3, 32, 16, seed=1).double()).mean
    assert (32 // latents.shape[2], 16 // latents.shape[3]) == (ours.config.downscale,) * 2
    assert ours.decode(latents).shape == (1, 3, 32, 16)
