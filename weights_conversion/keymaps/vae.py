"""The autoencoder: diffusers' `AutoencoderKL` <-> `kolors_ref.models.vae`."""

from weights_conversion.keymaps.fields import ConfigTable, check_levels
from weights_conversion.keymaps.table import KeyTable, rows

TOP = """
    encoder.conv_in.*                               encoder.conv_in.*
    encoder.down_blocks.{i}.downsamplers.0.conv.*   encoder.down.{i}.downsample.*
    encoder.conv_norm_out.*                         encoder.norm_out.*
    encoder.conv_out.*                              encoder.conv_out.*
    quant_conv.*                                    quant_conv.*
    post_quant_conv.*                               post_quant_conv.*
    decoder.conv_in.*                               decoder.conv_in.*
    decoder.up_blocks.{i}.upsamplers.0.conv.*       decoder.up.{i}.upsample.*
    decoder.conv_norm_out.*                         decoder.norm_out.*
    decoder.conv_out.*                              decoder.conv_out.*
"""

RESNET = """
    norm1.*             norm1.*
    conv1.*             conv1.*
    norm2.*             norm2.*
    conv2.*             conv2.*
    conv_shortcut.*     skip.*
"""

ATTENTION = """
    group_norm.*        norm.*
    to_q.*              q.*
    to_k.*              k.*
    to_v.*              v.*
    to_out.0.*          out.*
"""

OLD_ATTENTION = """
    query.*             q.*
    key.*               k.*
    value.*             v.*
    proj_attn.*         out.*
"""


def _indices(config: dict) -> dict[str, list[tuple[int, ...]]]:
    channels, layers = config["channels"], config["layers_per_block"]
    levels = len(channels)
    indices = {"encoder.down.{i}.downsample": [(i,) for i in range(levels - 1)]}
    indices["decoder.up.{i}.upsample"] = indices["encoder.down.{i}.downsample"]
    for side, widths, count in (("encoder.down", channels, layers), ("decoder.up", channels[::-1], layers + 1)):
        changes = [i for i in range(1, levels) if widths[i] != widths[i - 1]]
        indices[f"{side}.{{i}}.res.{{j}}"] = [(i, j) for i in range(levels) for j in range(count)]
        indices[f"{side}.{{i}}.res.{{j}}.skip"] = [(i, 0) for i in changes]
    for side in ("encoder", "decoder"):
        indices[f"{side}.mid.res.{{j}}"] = [(0,), (1,)]
        indices[f"{side}.mid.res.{{j}}.skip"] = []
    return indices


TABLE = KeyTable(
    rows=rows(TOP)
    + rows(RESNET, "encoder.down_blocks.{i}.resnets.{j}", "encoder.down.{i}.res.{j}")
    + rows(RESNET, "encoder.mid_block.resnets.{j}", "encoder.mid.res.{j}")
    + rows(ATTENTION, "encoder.mid_block.attentions.0", "encoder.mid.attn")
    + rows(RESNET, "decoder.mid_block.resnets.{j}", "decoder.mid.res.{j}")
    + rows(ATTENTION, "decoder.mid_block.attentions.0", "decoder.mid.attn")
    + rows(RESNET, "decoder.up_blocks.{i}.resnets.{j}", "decoder.up.{i}.res.{j}"),
    indices=_indices,
    aliases=rows(OLD_ATTENTION, "encoder.mid_block.attentions.0", "encoder.mid.attn")
    + rows(OLD_ATTENTION, "decoder.mid_block.attentions.0", "decoder.mid.attn"),
)

COPIED = {
    "in_channels": "in_channels",
    "block_out_channels": "channels",
    "layers_per_block": "layers_per_block",
    "latent_channels": "latent_channels",
    "norm_num_groups": "norm_groups",
    "scaling_factor": "scaling_factor",
}

OURS = dict.fromkeys(COPIED.values(), int) | {"channels": tuple, "scaling_factor": float}

DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}

REQUIRED = {
    "act_fn": "silu",
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}

# The threshold of tiling, and a precision that each program chooses for itself.
IGNORED = frozenset({"sample_size", "force_upcast"})


def _to_ours(config: dict, where: str) -> dict:
    for name in ("down_block_types", "up_block_types"):
        check_levels(config, name, len(config["block_out_channels"]), where)
    if config["out_channels"] != config["in_channels"]:
        found, wanted = config["out_channels"], config["in_channels"]
        raise ValueError(f"{where}: out_channels is {found!r}, and only {wanted}, as in_channels, is supported.")
    return {}


def _to_official(ours: dict) -> dict:
    levels = len(ours["channels"])
    return {
        "_class_name": "AutoencoderKL",
        "out_channels": ours["in_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": 1024,
    }


CONFIG = ConfigTable("AutoencoderKL", OURS, DEFAULTS, COPIED, REQUIRED, IGNORED, _to_ours, _to_official)
