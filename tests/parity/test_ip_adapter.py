"""IP-Adapter-Plus: the resampler and the files against diffusers, which reads the same official names."""

import json
import pickle
from dataclasses import asdict, replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from parity.oracle import relative_error
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from kolors_ref.config import IPAdapterConfig, UNetConfig
from kolors_ref.ip_adapter_file import (
    count_cross_attentions,
    cross_attention_channels,
    load_image_encoder,
    load_ip_adapter,
    read_ip_adapter,
)
from kolors_ref.models.ip_adapter import IPAdapter, Resampler
from kolors_ref.precision import fast_dtype
from weights_conversion.keymaps.ip_adapter import TABLE, file_order

UNET = UNetConfig(
    channels=(32, 64, 64), transformer_depth=(0, 1, 2), num_heads=(1, 2, 4), layers_per_block=1, norm_groups=8,
    cross_attention_dim=24, text_dim=20, pooled_dim=20, size_embed_dim=8,
)  # fmt: skip
CONFIGS = [
    IPAdapterConfig(40, width=48, depth=4, heads=3, num_queries=5, ffn=192, output_dim=24, channels=(32,) * 2),
    IPAdapterConfig(64, width=32, depth=1, heads=1, num_queries=1, ffn=64, output_dim=48, channels=(32,)),
    IPAdapterConfig(24, width=80, depth=2, heads=5, head_dim=32, num_queries=16, ffn=160, output_dim=40, channels=(8,)),
]


def randomise(module, seed=0):
    """Gives every parameter natural random values: none is left at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(0.3 * noise + 1 if parameter.ndim < 2 else noise / parameter.shape[-1] ** 0.5)
    return module.eval()


def diffusers_resampler(ours, config):
    """diffusers' resampler with the weights of ours."""
    oracle = IPAdapterPlusImageProjection(
        config.image_dim, config.output_dim, config.width, config.depth, config.head_dim, config.heads,
        config.num_queries, config.ffn / config.width,
    )  # fmt: skip
    state = {}
    for name, tensor in ours.state_dict().items():
        for mine, theirs in [
            ("queries", "latents"), ("attn.norm_image", "ln0"), ("attn.norm_queries", "ln1"), ("attn.q.", "attn.to_q."),
            ("attn.out.", "attn.to_out.0."), ("ff.1", "ff.1.net.0.proj"), ("ff.3", "ff.1.net.2"),
        ]:  # fmt: skip
            name = theirs if name == mine else name.replace(f".{mine}", f".{theirs}")
        if "attn.kv" in name:
            state[name.replace("kv", "to_k")], state[name.replace("kv", "to_v")] = tensor.chunk(2)
        else:
            state[name] = tensor
    oracle.load_state_dict(state)
    return oracle.eval()


# ---- the networks


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@torch.no_grad()
def test_resampler(config, dtype, tolerance):
    ours = randomise(Resampler(config)).to(dtype)
    oracle = diffusers_resampler(ours, config).to(dtype)
    hidden = torch.randn(3, 11, config.image_dim, generator=torch.Generator().manual_seed(1), dtype=dtype)
    tokens = ours(hidden)
    assert tokens.shape == (3, config.num_queries, config.output_dim)
    assert relative_error(tokens, oracle(hidden)) < tolerance


@pytest.mark.skipif(
    fast_dtype(torch.device("cpu")) != torch.bfloat16, reason="this CPU takes minutes for so many products in bf16"
)
@torch.no_grad()
def test_the_official_resampler_in_bfloat16():
    """At full size, ours in bf16 is as near to fp32 as the oracle in bf16."""
    config = IPAdapterConfig()
    ours = randomise(Resampler(config))
    oracle = diffusers_resampler(ours, config)
    hidden = torch.randn(1, 577, 1024, generator=torch.Generator().manual_seed(1))
    exact = oracle(hidden)
    assert relative_error(ours(hidden), exact) < 1e-5
    theirs = relative_error(oracle.bfloat16()(hidden.bfloat16()).float(), exact)
    half = relative_error(ours.bfloat16()(hidden.bfloat16()).float(), exact)
    assert 1e-4 < half < 1.1 * theirs


@torch.no_grad()
def test_keys_and_values_of_every_layer():
    config = replace(CONFIGS[0], channels=(32, 64, 96))
    adapter = randomise(IPAdapter(config)).double()
    tokens = adapter.image_tokens(torch.randn(2, 11, 40, dtype=torch.float64))
    pairs = adapter.keys_values(tokens, [2, 4, 3])
    assert [k.shape for k, _ in pairs] == [v.shape for _, v in pairs] == [(2, 2, 5, 16), (2, 4, 5, 16), (2, 3, 5, 32)]
    for i, (pair, heads) in enumerate(zip(pairs, [2, 4, 3], strict=True)):
        for projected, layer in zip(pair, (adapter.to_k[i], adapter.to_v[i]), strict=True):
            flat = projected.transpose(1, 2).flatten(2)
            assert projected.shape[1] == heads
            assert relative_error(flat, tokens @ layer.weight.T) < 1e-14
    with pytest.raises(ValueError, match="3 layers, but 2 numbers"):
        adapter.keys_values(tokens, [2, 4])


# ---- the order of the projections


def test_the_order_of_the_official_file():
    """Entries 25 ... 60 of the file are the way up and 61 ... 70 the middle, the other way round than executed."""
    assert count_cross_attentions(UNetConfig()) == (24, 10, 36)
    order = file_order(24, 10, 36)
    assert order == [*range(24), *range(34, 70), *range(24, 34)]
    assert sorted(order) == list(range(70)) != order
    assert cross_attention_channels(UNetConfig()) == IPAdapterConfig().channels
    assert len(IPAdapterConfig().channels) == 70


def oracle_unet(unet=UNET):
    """diffusers' UNet of Kolors' kind, with the sizes of ours."""
    kinds = [("CrossAttn" if depth else "", depth) for depth in unet.transformer_depth]
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=unet.channels,
        down_block_types=[f"{kind}DownBlock2D" for kind, _ in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind, _ in reversed(kinds)],
        layers_per_block=unet.layers_per_block,
        transformer_layers_per_block=[max(depth, 1) for _, depth in kinds],
        attention_head_dim=unet.num_heads,
        cross_attention_dim=unet.cross_attention_dim,
        encoder_hid_dim=unet.text_dim,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text_time",
        addition_time_embed_dim=unet.size_embed_dim,
        projection_class_embeddings_input_dim=unet.pooled_dim + 6 * unet.size_embed_dim,
        use_linear_projection=True,
        norm_num_groups=unet.norm_groups,
    )


def official_parts(config=None, unet=UNET, seed=0):
    """An official file's two dictionaries with random tensors, numbered as diffusers numbers its attentions."""
    config = config or replace(CONFIGS[0], channels=cross_attention_channels(unet))
    adapter = randomise(IPAdapter(config), seed)
    names = {name: TABLE.to_official(name) for name in adapter.state_dict()}
    parts = {"image_proj": {}, "ip_adapter": {}}
    for ours, official in names.items():
        part, name = official.split(".", 1)
        if part == "image_proj":
            parts[part][name] = adapter.state_dict()[ours]
    generator = torch.Generator().manual_seed(seed)
    for number, name in enumerate(oracle_unet(unet).attn_processors):
        if "attn2" in name:
            level = int(name.split(".")[1]) if "mid" not in name else -1
            channels = (unet.channels[::-1] if "up" in name else unet.channels)[level]
            for kind in ("to_k_ip", "to_v_ip"):
                weight = torch.randn(channels, config.output_dim, generator=generator) / config.output_dim**0.5
                parts["ip_adapter"][f"{number}.{kind}.weight"] = weight
    return parts


def flat(parts):
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def write(path, parts):
    if path.suffix == ".bin":
        torch.save(parts, path)
    else:
        save_file(flat(parts), path)
    return path


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@torch.no_grad()
def test_the_official_file_as_diffusers_reads_it(tmp_path, suffix):
    """Image tokens, and every projection at the cross-attention where diffusers' UNet runs it."""
    parts = official_parts()
    path = write(tmp_path / f"adapter{suffix}", parts)
    unet = oracle_unet().double()
    unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    adapter = load_ip_adapter(path, UNET, dtype=torch.float64)

    ran = []
    for module in unet.modules():
        if hasattr(getattr(module, "processor", None), "to_k_ip"):
            module.register_forward_hook(lambda module, *_: ran.append(module.processor))
    hidden = torch.randn(1, 7, 40, dtype=torch.float64)
    tokens = unet.encoder_hid_proj([hidden[:, None]])[0][:, 0]
    assert relative_error(adapter.image_tokens(hidden), tokens) < 1e-10

    unet(
        torch.randn(1, 4, 8, 8, dtype=torch.float64),
        10,
        torch.randn(1, 3, UNET.text_dim, dtype=torch.float64),
        added_cond_kwargs={
            "text_embeds": torch.randn(1, UNET.pooled_dim, dtype=torch.float64),
            "time_ids": torch.zeros(1, 6, dtype=torch.float64),
            "image_embeds": [hidden[:, None]],
        },
    )
    counts = count_cross_attentions(UNET)
    assert len(ran) == len(adapter.to_k) == sum(counts)
    for processor, to_k, to_v in zip(ran, adapter.to_k, adapter.to_v, strict=True):
        assert torch.equal(processor.to_k_ip[0].weight, to_k.weight)
        assert torch.equal(processor.to_v_ip[0].weight, to_v.weight)
    in_file = [parts["ip_adapter"][f"{2 * i + 1}.to_k_ip.weight"].double() for i in range(sum(counts))]
    misplaced = [to_k.weight.shape != t.shape or not torch.equal(to_k.weight, t) for to_k, t in
                 zip(adapter.to_k, in_file, strict=True)]  # fmt: skip
    assert misplaced == [False] * counts[0] + [True] * (counts[1] + counts[2])


# ---- files


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_sizes_are_read_off_the_file(tmp_path, suffix):
    config = replace(CONFIGS[0], channels=cross_attention_channels(UNET))
    parts = official_parts(config)
    found, state = read_ip_adapter(write(tmp_path / f"adapter{suffix}", parts), UNET)
    assert found == config
    assert set(state) == TABLE.names(asdict(config)) == set(IPAdapter(config).state_dict())
    assert len(state) == len(flat(parts))
    assert torch.equal(state["resampler.layers.3.attn.kv.weight"], parts["image_proj"]["layers.3.0.to_kv.weight"])


def test_the_key_table_goes_both_ways():
    names = TABLE.names(asdict(IPAdapterConfig()))
    official = {TABLE.to_official(name) for name in names}
    assert None not in official
    assert {TABLE.to_ours(name) for name in official} == names
    assert len(official) == len(names) == 7 + 4 * 11 + 2 * 70


def changed(part, drop=None, **added):
    parts = official_parts()
    parts[part].pop(drop, None)
    parts[part].update({name.replace("__", "."): tensor for name, tensor in added.items()})
    return parts


def filled(name, value, dtype=torch.float32):
    like = official_parts()["image_proj"][name.replace("__", ".")]
    return changed("image_proj", **{name: torch.full(like.shape, value, dtype=dtype)})


X = torch.zeros(2, 2)
BROKEN = {
    "other kind": (lambda: {"image_proj": {"proj.weight": X}, "ip_adapter": {}}, "another kind of IP-Adapter"),
    "no adapter": (lambda: {"unet": {"conv.weight": X}}, "no IP-Adapter"),
    "no queries": (lambda: changed("image_proj", "latents"), "another kind"),
    "no output": (lambda: changed("image_proj", "proj_out.weight"), "incomplete"),
    "no norm": (lambda: changed("image_proj", "layers.2.0.norm1.bias"), "incomplete: 1 tensors .*norm_image.bias"),
    "no key": (lambda: changed("ip_adapter", "3.to_k_ip.weight"), "incomplete: .*to_k.1.weight"),
    "no value": (lambda: changed("ip_adapter", "3.to_v_ip.weight"), "incomplete: .*to_v.1.weight"),
    "even number": (lambda: changed("ip_adapter", **{"2__to_k_ip__weight": X}), "2.to_k_ip.weight"),
    "more layers": (lambda: changed("ip_adapter", **{"99__to_k_ip__weight": X}), "99.to_k_ip.weight"),
    "no number": (lambda: changed("ip_adapter", odd=X), "ip_adapter.odd"),
    "unknown": (lambda: changed("image_proj", odd=X), "image_proj.odd"),
    "wrong shape": (lambda: changed("image_proj", proj_in__bias=X), "proj_in.bias.* instead of"),
    "far layer": (
        lambda: changed("image_proj", **{"layers__999999999999__0__norm1__weight": X}),
        "incomplete: 11 tensors",
    ),
    "not a number": (lambda: filled("proj_in__bias", torch.nan), "'resampler.proj_in.bias' .* holds NaN or infinity"),
    "whole numbers": (lambda: filled("proj_in__bias", 1, torch.int64), "is of the format int64"),
    "complex": (lambda: filled("proj_in__bias", 1j, torch.complex64), "is of the format complex64"),
    "queries of two axes": (lambda: changed("image_proj", latents=X), "sizes"),
    "channels": (lambda: changed("ip_adapter", **{"1__to_k_ip__weight": X}), "made for another UNet: layer 0 has 2"),
}


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_in_one_sentence(tmp_path, case, suffix):
    parts, words = BROKEN[case]
    path = write(tmp_path / f"broken{suffix}", parts())
    with pytest.raises(ValueError, match=words) as caught:
        load_ip_adapter(path, UNET)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith(".")


class Hostile:
    def __reduce__(self):
        return (open, ("/dev/null",))


def test_code_in_a_pickle_is_not_run(tmp_path):
    path = tmp_path / "hostile.bin"
    torch.save({"image_proj": Hostile(), "ip_adapter": {}}, path)
    with pytest.raises(ValueError, match="refused: it holds Python objects"):
        read_ip_adapter(path, UNET)
    path.write_bytes(pickle.dumps({"image_proj": Hostile()}))
    with pytest.raises(ValueError, match="refused"):
        read_ip_adapter(path, UNET)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"nothing of the kind", "half"])
def test_damaged_and_missing_files(tmp_path, suffix, content):
    path = tmp_path / f"adapter{suffix}"
    with pytest.raises(FileNotFoundError, match="adapter"):
        read_ip_adapter(path, UNET)
    if content == "half":
        write(path, official_parts())
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="adapter") as caught:
        read_ip_adapter(path, UNET)
    assert "\n" not in str(caught.value)


def nested(tensor):
    return {"image_proj": {"latents": tensor}, "ip_adapter": {"1.to_k_ip.weight": X}}


@pytest.mark.parametrize(
    "parts",
    [
        [1],
        {},
        {"image_proj": X},
        nested(1),
        nested(X.to("meta")),
        nested(X.to_sparse()),
        nested(torch.quantize_per_tensor(X, 1.0, 0, torch.qint8)),
    ],
    ids=["list", "empty", "flat", "number", "meta", "sparse", "quantized"],
)
def test_pickles_of_another_form(tmp_path, parts):
    torch.save(parts, tmp_path / "odd.bin")
    with pytest.raises(ValueError, match="two dictionaries of dense tensors"):
        read_ip_adapter(tmp_path / "odd.bin", UNET)


# ---- the image encoder's folder

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"image_size": 28, "patch_size": 14}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An official folder, and the oracle that was saved there."""
    folder = tmp_path_factory.mktemp("encoder")
    oracle = randomise(CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=8, **SIZES)))
    oracle.save_pretrained(folder)
    return folder, oracle


@torch.no_grad()
def check_encoder(folder, oracle):
    model = load_image_encoder(folder, dtype=torch.float64)
    pixels = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    oracle = oracle.double()
    oracle.set_attn_implementation("sdpa")
    expected = oracle(pixels, output_hidden_states=True).hidden_states[-2]
    return relative_error(model(pixels), expected) < 1e-10


def test_the_image_encoder_from_its_folder(encoder, tmp_path):
    folder, oracle = encoder
    assert check_encoder(folder, oracle)
    state = oracle.float().state_dict()
    old = state | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}  # as older files have it
    torch.save(old, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert check_encoder(tmp_path, oracle)


def test_the_image_encoder_from_all_of_clip(tmp_path):
    """As in the official adapter's repository, where the vision config is silent about the projection."""
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    oracle = randomise(CLIPModel(CLIPConfig(vision_config=SIZES, text_config=text, projection_dim=8)))
    oracle.save_pretrained(tmp_path)
    assert check_encoder(tmp_path, oracle.vision_model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'quick_gelu'"),
        ({"model_type": "siglip_vision_model"}, "model_type"),
        ({"num_channels": 1}, "num_channels"),
        ({"num_attention_heads": 5}, "5 attention heads"),
        ({"num_hidden_layers": 4}, "incomplete"),
        ({"num_hidden_layers": 2}, "holds"),
        ({"hidden_size": 64}, "has the shape"),
        ({"qk_layernorm": True}, "qk_layernorm"),
    ],
)
def test_configs_of_other_networks(encoder, tmp_path, change, words):
    folder, _ = encoder
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=words) as caught:
        load_image_encoder(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_parts_of_the_folder(encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_image_encoder(tmp_path)
    (tmp_path / "config.json").write_text((encoder[0] / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_image_encoder(tmp_path)
