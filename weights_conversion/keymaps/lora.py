"""LoRA files: the three ways in which they name a layer and the matrices of its update <-> our names of layers.

    peft       unet.down_blocks.1.attentions.0.proj_in.lora_A.weight          lora_B.weight
    diffusers  unet.down_blocks.1.attentions.0.proj_in.lora.down.weight       lora.up.weight
    kohya      lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight  lora_up.weight, alpha

The layers themselves come from the tables of the networks. kohya's underscores are ambiguous, so a name counts only if
one of those layers is written exactly like it; its blocks may also bear the names they had in SDXL's original code.
"""

import re
from itertools import product
from typing import NamedTuple

from weights_conversion.keymaps import glm, unet

TABLES = {"unet": unet.TABLE, "text_encoder": glm.TABLE}
NAMINGS = ("peft", "diffusers", "kohya")


class Place(NamedTuple):
    """What a tensor of a LoRA file is: `part` ("down", "up" or "alpha") of a layer (our name) of a network."""

    network: str
    layer: str
    part: str


ENDINGS = {
    "down": re.compile(r"(.+?)(\.lora_A(\.[^.]+)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight"),
    "up": re.compile(r"(.+?)(\.lora_B(\.[^.]+)?|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight"),
    "alpha": re.compile(r"(.+?)(\.lora)?\.alpha"),
}
"""How a tensor's name ends in any of the namings; after lora_A and lora_B PEFT may put the adapter's name."""

WRITTEN = {
    "peft": {"down": ".lora_A.weight", "up": ".lora_B.weight"},
    "diffusers": {"down": ".lora.down.weight", "up": ".lora.up.weight"},
    "kohya": {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha"},
}

KOHYA_PREFIXES = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
WRAPPER = "base_model.model."  # PEFT's own files: the adapted model is wrapped twice


def to_ours(name: str) -> Place | None:
    """What the tensor of this name is, in whatever naming; None if it belongs to no layer of Kolors."""
    for part, ending in ENDINGS.items():
        if match := ending.fullmatch(name):
            found = _our_layer(match[1])
            return Place(*found, part) if found else None
    return None


def to_official(place: Place, naming: str) -> str:
    """The name of a tensor in one of the NAMINGS. Raises ValueError for a layer that the network does not have."""
    layer = official_layer(place.network, place.layer)
    if naming == "kohya":
        prefix = next(prefix for prefix, network in KOHYA_PREFIXES.items() if network == place.network)
        layer = prefix + layer.replace(".", "_")
    else:
        layer = f"{place.network}.{layer}"
    return layer + WRITTEN[naming][place.part]


def official_layer(network: str, layer: str) -> str:
    """The official name for one of our layers. Raises ValueError if the network has none of this name."""
    official = TABLES[network].to_official(f"{layer}.weight") if network in TABLES else None
    if official is None:
        raise ValueError(f"There is no layer {layer!r} in the network {network!r}.")
    return official.removesuffix(".weight")


def _our_layer(name: str) -> tuple[str, str] | None:
    """Network and our layer for what stands before the ending of a tensor's name."""
    for prefix, network in KOHYA_PREFIXES.items():
        if name.startswith(prefix):
            layer = _from_underscores(network, name.removeprefix(prefix))
            return (network, layer) if layer else None
    name = name.removeprefix(WRAPPER)
    named = [network for network in TABLES if name.startswith(f"{network}.")]
    if named:
        name = name.removeprefix(f"{named[0]}.").removeprefix(WRAPPER)
    # The oldest diffusers files name the attention's processor, in which the output's projection had no number.
    name = re.sub(r"\.to_out$", ".to_out.0", name.replace(".processor.", "."))
    for network in named or TABLES:
        if ours := TABLES[network].to_ours(f"{name}.weight"):
            return network, ours.removesuffix(".weight")
    return None


# ---- names with underscores


def _from_underscores(network: str, name: str) -> str | None:
    """Our layer for an official layer whose dots have become underscores."""
    if network == "unet":
        name = _from_original(name)
    name = name.removeprefix(TABLES[network].prefix.replace(".", "_"))
    for pattern, ours in UNDERSCORED[network]:
        if match := pattern.fullmatch(name):
            return ours.format(**match.groupdict())
    return None


def _underscored(row: tuple[str, str]) -> tuple[re.Pattern[str], str]:
    """One row of a network's table, as a pattern for the official layer with underscores and our layer."""
    official, ours = (column.removesuffix(".*").removesuffix(".weight") for column in row)
    return re.compile(re.sub(r"{(\w)}", r"(?P<\1>0|[1-9][0-9]*)", official.replace(".", "_"))), ours


UNDERSCORED = {network: [_underscored(row) for row in table.rows] for network, table in TABLES.items()}


def _original_blocks() -> dict[str, str]:
    """SDXL's original names of the UNet's blocks -> the official ones: three levels of two layers, as published."""
    names = {f"middle_block_{n}": f"mid_block_resnets_{j}" for n, j in ((0, 0), (2, 1))}
    names["middle_block_1"] = "mid_block_attentions_0"
    for i, j in product(range(3), range(2)):
        names[f"input_blocks_{3 * i + j + 1}_0"] = f"down_blocks_{i}_resnets_{j}"
        names[f"input_blocks_{3 * i + j + 1}_1"] = f"down_blocks_{i}_attentions_{j}"
    for i, j in product(range(3), range(3)):
        names[f"output_blocks_{3 * i + j}_0"] = f"up_blocks_{i}_resnets_{j}"
        names[f"output_blocks_{3 * i + j}_1"] = f"up_blocks_{i}_attentions_{j}"
    for i in range(2):
        names[f"input_blocks_{3 * i + 3}_0_op"] = f"down_blocks_{i}_downsamplers_0_conv"
        names[f"output_blocks_{3 * i + 2}_2_conv"] = f"up_blocks_{i}_upsamplers_0_conv"
    return names


ORIGINAL_BLOCKS = _original_blocks() | {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}
ORIGINAL_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _from_original(name: str) -> str:
    """A layer under SDXL's original name -> the official one; any other name stays as it is."""
    for original, official in ORIGINAL_BLOCKS.items():
        if name == original:
            return official
        if name.startswith(f"{original}_"):
            rest = name.removeprefix(f"{original}_")
            return f"{official}_{ORIGINAL_RESNET.get(rest, rest)}"
    return name
