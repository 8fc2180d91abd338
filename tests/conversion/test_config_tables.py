"""Official config.json <-> our sizes: both directions, the oracle's defaults, and refusal of other mathematics."""

import inspect
import json
from dataclasses import asdict

import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from parity.oracle import OFFICIAL_TOKENIZER, needs_official_tokenizer

from kolors_ref.config import GLMConfig, UNetConfig, VAEConfig
from weights_conversion.keymaps import KEYMAPS

ORACLES = {"text_encoder": ChatGLMConfig, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
OURS = {"text_encoder": GLMConfig(), "unet": UNetConfig(), "vae": VAEConfig()}
UNET, VAE, GLM = (KEYMAPS[name].CONFIG for name in ("unet", "vae", "text_encoder"))


def official(name, **changes):
    """The official config of a network of the official sizes, some fields changed; ... removes one."""
    config = KEYMAPS[name].CONFIG.to_official(asdict(OURS[name])) | changes
    return {field: value for field, value in config.items() if value is not ...}


@pytest.mark.parametrize("name", list(KEYMAPS))
def test_our_fields_are_those_of_the_dataclasses(name):
    """The tables list the fields of kolors_ref.config, without importing it."""
    assert set(KEYMAPS[name].CONFIG.ours) == set(asdict(OURS[name]))


@pytest.mark.parametrize("name", list(KEYMAPS))
def test_ours_to_official_and_back(name):
    """Through JSON, as in a file; and the official sizes are the dataclasses' defaults."""
    table = KEYMAPS[name].CONFIG
    through_json = json.loads(json.dumps(official(name)))
    assert table.to_ours(through_json, "config.json") == asdict(OURS[name])
    assert table.check_ours(json.loads(json.dumps(asdict(OURS[name]))), "kolors-ref.json") == asdict(OURS[name])


@pytest.mark.parametrize("name", list(KEYMAPS))
def test_every_field_of_the_oracle_is_known_with_its_default(name):
    """A new field or another default in the oracle must be looked at here."""
    table = KEYMAPS[name].CONFIG
    parameters = inspect.signature(ORACLES[name].__init__).parameters.values()
    fields = {p.name: p.default for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD}
    assert set(fields) <= set(table.defaults) | set(table.required) | table.ignored
    for field, default in fields.items():
        if field not in table.ignored:
            assert table.defaults.get(field, table.required.get(field)) == default, field


@needs_official_tokenizer
def test_the_official_text_encoder_config():
    """The file of the official checkpoint, or one kept beside its tokenizer, gives the official sizes."""
    beside = OFFICIAL_TOKENIZER.with_name("text_encoder_config.json")
    places = [beside, OFFICIAL_TOKENIZER.parents[1] / "text_encoder" / "config.json"]
    found = [path for path in places if path.is_file()]
    if not found:
        pytest.skip("the official text encoder's config is not with its tokenizer")
    config = json.loads(found[0].read_text())
    assert GLM.to_ours(config, "config.json") == asdict(GLMConfig())


def test_the_oracle_reads_what_is_written():
    """diffusers builds the same network from a config that went through ours."""
    config = UNET.to_official(asdict(UNetConfig(channels=(32, 64), transformer_depth=(1, 2), num_heads=(2, 4))))
    written = dict(UNet2DConditionModel.from_config({**config, "norm_num_groups": 8}).config)
    for field, value in config.items():
        if field not in ("_class_name", "norm_num_groups"):
            assert written[field] == value, field
    assert UNET.to_ours(written, "config.json")["transformer_depth"] == (1, 2)


def test_numbers_for_all_levels_and_missing_fields():
    """diffusers takes one number for all levels; a missing field takes its default."""
    config = official("unet", attention_head_dim=..., transformer_layers_per_block=2, layers_per_block=[3, 3, 3])
    ours = UNET.to_ours({**config, "sample_size": None, "only_cross_attention": [False] * 3}, "config.json")
    assert ours["num_heads"] == (8, 8, 8)
    assert ours["transformer_depth"] == (0, 2, 2)
    assert ours["layers_per_block"] == 3
    assert ours["sample_size"] == 128
    assert VAE.to_ours(official("vae", scaling_factor=...), "config.json")["scaling_factor"] == 0.18215
    assert GLM.to_ours(official("text_encoder", seq_length=...), "config.json")["max_positions"] == 2048


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *[("unet", field, "other") for field in UNET.required],
        *[("vae", field, "other") for field in VAE.required],
        *[("text_encoder", field, "other") for field in GLM.required],
        *[("unet", field, "other") for field in UNET.copied],
        *[("vae", field, "other") for field in VAE.copied],
        *[("text_encoder", field, "other") for field in GLM.copied],
        ("unet", "_class_name", "UNet2DModel"),
        ("unet", "use_linear_projection", ...),
        ("unet", "addition_embed_type", ...),
        ("text_encoder", "add_qkv_bias", ...),
        ("text_encoder", "multi_query_attention", ...),
        ("unet", "num_attention_heads", 8),
        ("unet", "only_cross_attention", [False, True, False]),
        ("unet", "layers_per_block", [2, 2, 3]),
        ("unet", "cross_attention_dim", [2048, 2048, 1024]),
        ("unet", "transformer_layers_per_block", [1, 2]),
        ("unet", "transformer_layers_per_block", [1, 2, [1, 2]]),
        ("unet", "attention_head_dim", [5, 10]),
        ("unet", "block_out_channels", [320.0, 640, 1280]),
        ("unet", "down_block_types", ["DownBlock2D", "SimpleCrossAttnDownBlock2D", "CrossAttnDownBlock2D"]),
        ("unet", "down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"]),
        ("unet", "down_block_types", None),
        ("unet", "up_block_types", ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"]),
        ("unet", "up_block_types", 3),
        ("unet", "projection_class_embeddings_input_dim", 6 * 256),
        ("unet", "projection_class_embeddings_input_dim", None),
        ("unet", "time_embedding_dim", 640),
        ("unet", "sample_size", [128, 96]),
        ("unet", "in_channels", True),
        ("unet", "in_channels", 0),
        ("unet", "a_new_field", "something"),
        ("unet", "a_new_field", 1),
        ("vae", "out_channels", 4),
        ("vae", "scaling_factor", float("nan")),
        ("vae", "scaling_factor", float("inf")),
        pytest.param("vae", "scaling_factor", 10**400, id="vae-scaling_factor-huge"),
        ("vae", "latents_mean", [0.0, 0.0, 0.0, 0.0]),
        ("vae", "shift_factor", 0.1),
        ("vae", "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"] * 2),
        ("vae", "up_block_types", ["UpDecoderBlock2D"] * 3),
        ("text_encoder", "quantization_bit", 4),
        ("text_encoder", "pre_seq_len", 64),
        ("text_encoder", "rope_ratio", 500),
        ("text_encoder", "model_type", "t5"),
    ],
)
def test_other_mathematics_is_refused_by_name(name, field, value):
    """One sentence that names the file and the field."""
    with pytest.raises(ValueError, match=rf"^the/config\.json: .*\b{field}\b") as error:
        KEYMAPS[name].CONFIG.to_ours(official(name, **{field: value}), "the/config.json")
    assert "\n" not in str(error.value)


def test_a_last_level_without_attention_is_refused():
    """The depth of the middle block is that of the last level."""
    down, up = (
        ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
    )
    with pytest.raises(ValueError, match="down_block_types"):
        UNET.to_ours(official("unet", down_block_types=down, up_block_types=up), "config.json")


def test_what_has_no_effect_passes():
    """Unknown fields that are off, private fields, and fields that touch rounding or bookkeeping alone."""
    extra = {"a_new_field": None, "another": False, "_name_or_path": "x", "upcast_attention": True}
    assert UNET.to_ours(official("unet", **extra), "config.json") == asdict(UNetConfig())
    assert VAE.to_ours(official("vae", force_upcast=False, sample_size=7), "config.json") == asdict(VAEConfig())


@pytest.mark.parametrize(
    ("change", "mentioned"),
    [
        ({"channels": [320, 640]}, "channels"),
        ({"channels": "wide"}, "channels"),
        ({"norm_groups": 2.5}, "norm_groups"),
        ({"layers_per_block": 10**12}, "layers_per_block asks for more than 100 layers"),
        ({"transformer_depth": [0, 1, 10**12]}, "transformer_depth asks for more than 100 layers"),
        ({"new": 1}, "new"),
    ],
)
def test_our_own_config_is_checked(change, mentioned):
    """The sizes in kolors-ref.json are read as strictly."""
    with pytest.raises(ValueError, match=mentioned):
        UNET.check_ours(asdict(UNetConfig()) | change, "kolors-ref.json")
    with pytest.raises(ValueError, match="missing"):
        UNET.check_ours("not an object", "kolors-ref.json")
