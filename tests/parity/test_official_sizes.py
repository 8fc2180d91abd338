"""Our networks at their default sizes are the official ones: the same tensors, name for name and shape for shape."""

from dataclasses import asdict

import pytest
import torch
from parity.oracle import ORACLES, OURS, glm_config, unet_config, vae_config

from weights_conversion.keymaps import KEYMAPS

OFFICIAL = {
    "text_encoder": glm_config(28, 4096, 13696, num_heads=32, head_dim=128, groups=2) | {"seq_length": 32768},
    "unet": unet_config(
        (320, 640, 1280),
        (0, 2, 10),
        (5, 10, 20),
        layers_per_block=2,
        text_dim=4096,
        pooled_dim=4096,
        cross_attention_dim=2048,
        size_embed_dim=256,
        norm_groups=32,
    )
    | {"sample_size": 128},
    "vae": vae_config((128, 256, 512, 512), 2, latent_channels=4, norm_groups=32, scaling_factor=0.13025),
}
NUM_TENSORS = {"text_encoder": 200, "unet": 1682, "vae": 248}
NUM_PARAMETERS = {"text_encoder": 6_243_584_032, "unet": 2_579_458_820, "vae": 83_653_863}


@pytest.mark.parametrize("name", OFFICIAL)
def test_default_config_is_official(name):
    _, config_class = OURS[name]
    assert KEYMAPS[name].CONFIG.to_ours(OFFICIAL[name], "the test's config") == asdict(config_class())


@pytest.mark.parametrize("name", OFFICIAL)
def test_default_network_has_the_official_tensors(name):
    table = KEYMAPS[name].TABLE
    model, config_class = OURS[name]
    with torch.device("meta"):
        official = ORACLES[name](OFFICIAL[name]).state_dict()
        ours = model(config_class()).state_dict()
    assert len(official) == NUM_TENSORS[name]
    assert sum(tensor.numel() for tensor in official.values()) == NUM_PARAMETERS[name]
    renamed = {table.to_ours(key): tuple(tensor.shape) for key, tensor in official.items()}
    assert len(renamed) == len(official)
    assert all(table.to_official(table.to_ours(key)) == key for key in official)
    used = {key: shape for key, shape in renamed.items() if key not in table.unused}
    assert used == {key: tuple(tensor.shape) for key, tensor in ours.items()}
