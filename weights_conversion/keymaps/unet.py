"""The denoiser: diffusers' `UNet2DConditionModel`, in the shape SDXL gave it <-> `kolors_ref.models.unet`."""

from weights_conversion.keymaps.fields import ConfigTable, check_levels, read
from weights_conversion.keymaps.table import KeyTable, rows

TOP = """
    conv_in.*                               conv_in.*
    time_embedding.linear_1.*               time_embed.0.*
    time_embedding.linear_2.*               time_embed.2.*
    add_embedding.linear_1.*                size_embed.0.*
    add_embedding.linear_2.*                size_embed.2.*
    encoder_hid_proj.*                      text_proj.*
    down_blocks.{i}.downsamplers.0.conv.*   down.{i}.downsample.*
    up_blocks.{i}.upsamplers.0.conv.*       up.{i}.upsample.*
    conv_norm_out.*                         norm_out.*
    conv_out.*                              conv_out.*
"""

RESNET = """
    norm1.*             norm1.*
    conv1.*             conv1.*
    time_emb_proj.*     time_proj.*
    norm2.*             norm2.*
    conv2.*             conv2.*
    conv_shortcut.*     skip.*
"""

ATTENTION = """
    norm.*                                      norm.*
    proj_in.*                                   proj_in.*
    transformer_blocks.{k}.norm1.*              blocks.{k}.norm1.*
    transformer_blocks.{k}.attn1.to_q.weight    blocks.{k}.self_attn.q.weight
    transformer_blocks.{k}.attn1.to_k.weight    blocks.{k}.self_attn.k.weight
    transformer_blocks.{k}.attn1.to_v.weight    blocks.{k}.self_attn.v.weight
    transformer_blocks.{k}.attn1.to_out.0.*     blocks.{k}.self_attn.out.*
    transformer_blocks.{k}.norm2.*              blocks.{k}.norm2.*
    transformer_blocks.{k}.attn2.to_q.weight    blocks.{k}.cross_attn.q.weight
    transformer_blocks.{k}.attn2.to_k.weight    blocks.{k}.cross_attn.k.weight
    transformer_blocks.{k}.attn2.to_v.weight    blocks.{k}.cross_attn.v.weight
    transformer_blocks.{k}.attn2.to_out.0.*     blocks.{k}.cross_attn.out.*
    transformer_blocks.{k}.norm3.*              blocks.{k}.norm3.*
    transformer_blocks.{k}.ff.net.0.proj.*      blocks.{k}.ff.0.*
    transformer_blocks.{k}.ff.net.2.*           blocks.{k}.ff.2.*
    proj_out.*                                  proj_out.*
"""


def _indices(config: dict) -> dict[str, list[tuple[int, ...]]]:
    channels, depth, layers = config["channels"], config["transformer_depth"], config["layers_per_block"]
    levels = len(channels)
    indices = {
        "mid.res.{j}": [(0,), (1,)],
        "mid.res.{j}.skip": [],
        "mid.attn.{j}": [(0,)],
        "mid.attn.{j}.blocks.{k}": [(0, k) for k in range(depth[-1])],
        "down.{i}.res.{j}.skip": [(i, 0) for i in range(1, levels) if channels[i] != channels[i - 1]],
        "down.{i}.downsample": [(i,) for i in range(levels - 1)],
        "up.{i}.upsample": [(i,) for i in range(levels - 1)],
    }
    # An up level has one layer more: it takes the outputs of the down level's layers, and what that level was given.
    for side, depths, count in (("down", depth, layers), ("up", depth[::-1], layers + 1)):
        places = [(i, j) for i in range(levels) for j in range(count)]
        indices[f"{side}.{{i}}.res.{{j}}"] = places
        indices[f"{side}.{{i}}.attn.{{j}}"] = [(i, j) for i, j in places if depths[i]]
        indices[f"{side}.{{i}}.attn.{{j}}.blocks.{{k}}"] = [(i, j, k) for i, j in places for k in range(depths[i])]
    return indices


TABLE = KeyTable(
    rows=rows(TOP)
    + rows(RESNET, "down_blocks.{i}.resnets.{j}", "down.{i}.res.{j}")
    + rows(ATTENTION, "down_blocks.{i}.attentions.{j}", "down.{i}.attn.{j}")
    + rows(RESNET, "mid_block.resnets.{j}", "mid.res.{j}")
    + rows(ATTENTION, "mid_block.attentions.{j}", "mid.attn.{j}")
    + rows(RESNET, "up_blocks.{i}.resnets.{j}", "up.{i}.res.{j}")
    + rows(ATTENTION, "up_blocks.{i}.attentions.{j}", "up.{i}.attn.{j}"),
    indices=_indices,
)

COPIED = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "block_out_channels": "channels",
    "layers_per_block": "layers_per_block",
    "encoder_hid_dim": "text_dim",
    "cross_attention_dim": "cross_attention_dim",
    "addition_time_embed_dim": "size_embed_dim",
    "norm_num_groups": "norm_groups",
}

OURS = dict.fromkeys([*COPIED.values(), "pooled_dim", "sample_size"], int) | dict.fromkeys(
    ["channels", "transformer_depth", "num_heads"], tuple
)

DEFAULTS = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "encoder_hid_dim": None,
    "attention_head_dim": 8,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "time_embedding_dim": None,
    "encoder_hid_dim_type": None,
    "use_linear_projection": False,
    "addition_embed_type": None,
}

REQUIRED = {
    "encoder_hid_dim_type": "text_proj",
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "reverse_transformer_layers_per_block": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
}

# Rounding alone (upcast_attention), or read only by variants that are refused.
IGNORED = frozenset({"upcast_attention", "addition_embed_type_num_heads", "mid_block_only_cross_attention"})


def _block_types(depth: tuple[int, ...]) -> tuple[list[str], list[str]]:
    down = ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depth]
    return down, ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depth)]


def _to_ours(config: dict, where: str) -> dict:
    levels = len(config["block_out_channels"])
    depth = read(config, "transformer_layers_per_block", tuple, where, levels)
    check_levels(config, "down_block_types", levels, where)
    has_attention = [kind == "CrossAttnDownBlock2D" for kind in config["down_block_types"]]
    depth = tuple(d * attends for d, attends in zip(depth, has_attention, strict=True))
    for name, wanted in zip(("down_block_types", "up_block_types"), _block_types(depth), strict=True):
        check_levels(config, name, levels, where)
        if list(config[name]) != wanted:
            raise ValueError(f"{where}: {name} is {list(config[name])}, and only {wanted} is supported here.")
    if depth[-1] == 0:
        raise ValueError(f"{where}: down_block_types ends with a level without attention, which is not supported.")
    size_embed_dim = read(config, "addition_time_embed_dim", int, where)
    total = read(config, "projection_class_embeddings_input_dim", int, where)
    if total <= 6 * size_embed_dim:
        raise ValueError(
            f"{where}: projection_class_embeddings_input_dim is {total}, and more than 6 x {size_embed_dim} is needed."
        )
    time_dim, wanted = config["time_embedding_dim"], 4 * config["block_out_channels"][0]
    if time_dim not in (None, wanted):
        raise ValueError(f"{where}: time_embedding_dim is {time_dim!r}, and only {wanted} is supported here.")
    return {
        "transformer_depth": depth,
        "num_heads": read(config, "attention_head_dim", tuple, where, levels),
        "pooled_dim": total - 6 * size_embed_dim,
        "sample_size": 128 if config["sample_size"] is None else read(config, "sample_size", int, where),
    }


def _to_official(ours: dict) -> dict:
    depth = ours["transformer_depth"]
    down, up = _block_types(depth)
    return {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": down,
        "up_block_types": up,
        "transformer_layers_per_block": [max(d, 1) for d in depth],
        "attention_head_dim": ours["num_heads"],  # in spite of its name the number of heads
        "projection_class_embeddings_input_dim": ours["pooled_dim"] + 6 * ours["size_embed_dim"],
        "sample_size": ours["sample_size"],
    }


CONFIG = ConfigTable("UNet2DConditionModel", OURS, DEFAULTS, COPIED, REQUIRED, IGNORED, _to_ours, _to_official)
