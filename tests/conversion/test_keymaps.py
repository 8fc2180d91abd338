"""Every official name is mapped, none twice, none left; and the tables list exactly the names a network has."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

from weights_conversion.keymaps import KEYMAPS
from weights_conversion.keymaps.table import KeyTable, rows

OFFICIAL_GLM = {
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "seq_length": 32768,
    "add_qkv_bias": True,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "original_rope": True,
}
OFFICIAL_UNET = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 5632,
    "use_linear_projection": True,
    "sample_size": 128,
}
OFFICIAL_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
}
SMALL_UNET = OFFICIAL_UNET | {
    "block_out_channels": [32, 32, 64, 96],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": [3, 1, 1, 2],
    "attention_head_dim": 4,
}
SMALL_VAE = OFFICIAL_VAE | {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 3,
}
NETWORKS = [
    ("text_encoder", OFFICIAL_GLM, 200),
    ("unet", OFFICIAL_UNET, 1682),
    ("unet", SMALL_UNET, None),
    ("vae", OFFICIAL_VAE, 248),
    ("vae", SMALL_VAE, None),
]


def oracle_names(name, config):
    """The names in the state dict of the official network, built without memory."""
    with torch.device("meta"):
        if name == "text_encoder":
            network = ChatGLMModel(ChatGLMConfig(**config), empty_init=False)
        else:
            network = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[name](**config)
    return list(network.state_dict())


@pytest.mark.parametrize(("name", "config", "count"), NETWORKS)
def test_every_official_name_is_mapped_once_and_back(name, config, count):
    """Official names -> distinct names of ours -> the same official names; and the table predicts all of them."""
    table, translation = KEYMAPS[name].TABLE, KEYMAPS[name].CONFIG
    official = oracle_names(name, config)
    ours = [table.to_ours(key) for key in official]
    assert None not in ours
    assert len(set(ours)) == len(official)
    assert count in (len(official), None)
    assert [table.to_official(key) for key in ours] == official
    assert table.names(translation.to_ours(config, "config.json")) == set(ours)


@pytest.mark.parametrize(("name", "config", "count"), NETWORKS)
def test_a_name_fits_one_row_only(name, config, count):
    """So the order of the table's rows does not matter."""
    table = KEYMAPS[name].TABLE
    rows = [KeyTable([row], table.indices, prefix=table.prefix) for row in table.rows]
    for official in oracle_names(name, config):
        assert len([row for row in rows if row.to_ours(official)]) <= 1, official  # none where only an alias fits
        assert len([row for row in rows if row.to_official(table.to_ours(official))]) == 1, official


@pytest.mark.parametrize(
    ("name", "official", "ours"),
    [
        ("unet", "time_embedding.linear_2.bias", "time_embed.2.bias"),
        ("unet", "down_blocks.1.downsamplers.0.conv.weight", "down.1.downsample.weight"),
        ("unet", "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj.weight", "mid.attn.0.blocks.9.ff.0.weight"),
        (
            "unet",
            "up_blocks.0.attentions.2.transformer_blocks.11.attn2.to_out.0.bias",
            "up.0.attn.2.blocks.11.cross_attn.out.bias",
        ),
        ("vae", "decoder.mid_block.attentions.0.to_out.0.weight", "decoder.mid.attn.out.weight"),
        ("vae", "encoder.down_blocks.3.resnets.1.conv_shortcut.weight", "encoder.down.3.res.1.skip.weight"),
        ("text_encoder", "encoder.layers.27.self_attention.query_key_value.bias", "layers.27.attn.qkv.bias"),
        ("text_encoder", "rotary_pos_emb.inv_freq", "rope.inv_freq"),
    ],
)
def test_examples(name, official, ours):
    """A few names in full, in both directions."""
    assert KEYMAPS[name].TABLE.to_ours(official) == ours
    assert KEYMAPS[name].TABLE.to_official(ours) == official


def test_other_spellings_are_understood_but_not_written():
    """The old names of the VAE's attention, and the prefix of the whole language model."""
    vae, glm = KEYMAPS["vae"].TABLE, KEYMAPS["text_encoder"].TABLE
    assert vae.to_ours("encoder.mid_block.attentions.0.proj_attn.bias") == "encoder.mid.attn.out.bias"
    assert vae.to_official("encoder.mid.attn.out.bias") == "encoder.mid_block.attentions.0.to_out.0.bias"
    assert glm.to_ours("transformer.encoder.layers.0.mlp.dense_4h_to_h.weight") == "layers.0.ffn.down.weight"
    assert glm.to_official("layers.0.ffn.down.weight") == "encoder.layers.0.mlp.dense_4h_to_h.weight"


@pytest.mark.parametrize(
    "key",
    [
        "conv_in.scale",
        "conv_in.weight.more",
        "xconv_in.weight",
        "down_blocks.01.resnets.0.conv1.weight",
        "down_blocks.x.resnets.0.conv1.weight",
        "down_blocks.0.downsamplers.1.conv.weight",
        "up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_q.bias",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.weight",
        "",
    ],
)
def test_unknown_names_are_not_mapped(key):
    """None for a name that is not in the table."""
    assert KEYMAPS["unet"].TABLE.to_ours(key) is None


def test_unused_names_of_the_text_encoder():
    """The loader can tell what the encoder does without."""
    table = KEYMAPS["text_encoder"].TABLE
    assert table.unused == {"final_norm.weight", "lm_head.weight", "rope.inv_freq"}
    assert all(table.to_official(name) for name in table.unused)


def test_the_longest_prefix_says_which_numbers_there_are():
    """`skip` exists in one layer of two, though the layers are counted by a shorter prefix."""
    table = KeyTable(
        rows("conv.* conv.*\nshortcut.weight skip.weight", "resnets.{i}", "res.{i}"),
        indices=lambda config: {"res.{i}": [(0,), (1,)], "res.{i}.skip": [(1,)]},
    )
    expected = {"res.0.conv.weight", "res.0.conv.bias", "res.1.conv.weight", "res.1.conv.bias", "res.1.skip.weight"}
    assert table.names({}) == expected
