"""LoRA on the UNet and the text encoder against diffusers and PEFT, with files of each naming."""

import copy
import json
import re

import pytest
import torch
from diffusers import KolorsPipeline
from parity.oracle import assert_parity, glm_config, pair, relative_error, unet_config
from parity.test_glm import VOCAB, official_embeddings, token_batch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kolors_ref.lora import LowRank, attach, detach, fuse, load, read_lora, save_lora, unfuse, unload
from kolors_ref.text_layout import packed_layout

SIZES = {"channels": (16, 32, 32), "num_heads": (2, 2, 4), "cross_attention_dim": 24}
UNET = unet_config(**SIZES, depth=(0, 1, 1), layers_per_block=1)
GLM = glm_config(vocab_size=VOCAB)
LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
EVERYWHERE = [*LINEAR, "time_emb_proj", "linear_1", "linear_2", "encoder_hid_proj"]
EVERYWHERE += ["conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out"]
UNEVEN = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": EVERYWHERE,
    "rank_pattern": {"attn2.to_k": 3, "down_blocks.1.attentions.0.proj_in": 7, "conv1": 2, r".*\.1\..*\.to_q": 5},
    "alpha_pattern": {"attn2.to_k": 1.5, "mid_block.resnets.0.conv1": 9, "ff.net.2": 0.75, "encoder_hid_proj": 3},
}
UNKNOWN_TO_DIFFUSERS = "add_embedding|encoder_hid_proj"  # under kohya's names: it warns and leaves them out
GLM_LAYERS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
ORIGINAL = {  # kohya's names of blocks in SDXL's original code, spelled out
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
    "down_blocks_0_resnets_0_conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks_0_downsamplers_0_conv": "input_blocks_3_0_op",
    "down_blocks_1_resnets_0_conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks_1_attentions_1_proj_in": "input_blocks_5_1_proj_in",
    "down_blocks_2_resnets_1_time_emb_proj": "input_blocks_8_0_emb_layers_1",
    "down_blocks_2_attentions_1_transformer_blocks_1_attn1_to_out_0": (
        "input_blocks_8_1_transformer_blocks_1_attn1_to_out_0"
    ),
    "mid_block_resnets_0_conv2": "middle_block_0_out_layers_3",
    "mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": "middle_block_1_transformer_blocks_0_ff_net_0_proj",
    "mid_block_resnets_1_conv1": "middle_block_2_in_layers_2",
    "up_blocks_0_resnets_2_conv2": "output_blocks_2_0_out_layers_3",
    "up_blocks_0_upsamplers_0_conv": "output_blocks_2_2_conv",
    "up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": "output_blocks_3_1_transformer_blocks_0_attn2_to_k",
    "up_blocks_1_upsamplers_0_conv": "output_blocks_5_2_conv",
    "up_blocks_2_resnets_2_conv_shortcut": "output_blocks_8_0_skip_connection",
}


def randomise_adapter(network, adapter, seed):
    """Natural numbers in both matrices of every layer: PEFT starts the second at zero."""
    generator = torch.Generator().manual_seed(seed)
    count = 0
    for name, parameter in network.named_parameters():
        if f".{adapter}." in name and "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
            parameter.data.copy_(noise)
            count += 1
    assert count > 0
    return network.requires_grad_(False)


def trained(unet, folder, adapter="default", seed=10, **settings):
    """Puts a random LoRA on diffusers' UNet and writes it as diffusers does."""
    config = LoraConfig(**settings)
    unet.add_adapter(config, adapter_name=adapter)
    randomise_adapter(unet.to(unet.dtype), adapter, seed)
    layers = get_peft_model_state_dict(unet, adapter_name=adapter)
    metadata = unet.peft_config[adapter].to_dict()
    metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in metadata.items()}
    KolorsPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    return folder / "pytorch_lora_weights.safetensors"


def read_by_diffusers(unet, path, adapter="default"):
    """Puts a LoRA file on diffusers' UNet as its Kolors pipeline does, plus what SDXL's does about block names."""
    state, alphas, metadata = KolorsPipeline.lora_state_dict(
        path, unet_config=unet.config, return_lora_metadata=True, local_files_only=True
    )
    KolorsPipeline.load_lora_into_unet(state, alphas, unet, adapter_name=adapter, metadata=metadata)
    return unet.requires_grad_(False)


def inputs(dtype=torch.float64, seed=1):
    """Latents, text, pooled and sizes of a batch of two."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([[128, 96, 0, 8, 120, 96], [64, 160, 16, 0, 64, 128]])
    shapes = (2, 4, 8, 12), (2, 7, 32), (2, 32)
    return *(torch.randn(shape, generator=g).to(dtype) for shape in shapes), sizes


@torch.no_grad()
def run_oracle(unet, dtype=torch.float64):
    latents, text, pooled, sizes = inputs(dtype)
    added = {"text_embeds": pooled, "time_ids": sizes}
    return unet(latents, 321, encoder_hidden_states=text, added_cond_kwargs=added).sample


@torch.no_grad()
def run_ours(unet, dtype=torch.float64):
    latents, text, pooled, sizes = inputs(dtype)
    return unet(latents, 321, unet.prepare(text, pooled, sizes))


# ---- the UNet


@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_of_diffusers(tmp_path, rslora):
    """Every kind of layer, per-layer ranks and alphas from the header; hooks, fused, and taken off again."""
    oracle, ours = pair("unet", UNET)
    before, state = run_ours(ours), {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    path = trained(oracle, tmp_path, use_rslora=rslora, **UNEVEN)
    with_lora = run_oracle(oracle)
    assert relative_error(with_lora, before) > 0.1

    assert load({"unet": ours}, path, name="a") == "a"
    assert_parity(run_ours(ours), with_lora)
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    fuse(ours)
    assert_parity(run_ours(ours), with_lora)
    assert sum(not torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items()) == len(
        read_lora(path).networks["unet"]
    )
    unfuse(ours)
    assert_parity(run_ours(ours), with_lora)
    unload({"unet": ours})
    assert torch.equal(run_ours(ours), before)


def test_two_with_weights(tmp_path):
    """On overlapping layers, with weights of either sign: as hooks, fused, and fused without the first."""
    oracle, ours = pair("unet", UNET)
    paths = [
        trained(oracle, tmp_path / "a", "a", 11, r=3, lora_alpha=5, target_modules=EVERYWHERE),
        trained(oracle, tmp_path / "b", "b", 12, r=5, lora_alpha=2, target_modules=[*LINEAR, "conv2"]),
    ]
    oracle.set_adapters(["a", "b"], [0.7, -1.3])
    both = run_oracle(oracle)
    for path, name, scale in zip(paths, ["a", "b"], [0.7, -1.3], strict=True):
        load({"unet": ours}, path, scale, name)
    assert_parity(run_ours(ours), both)
    fuse(ours)
    assert_parity(run_ours(ours), both)
    detach(ours, "a")
    oracle.set_adapters(["b"], [-1.3])
    alone = run_oracle(oracle)
    assert relative_error(alone, both) > 0.01
    assert_parity(run_ours(ours), alone)
    unfuse(ours)
    assert_parity(run_ours(ours), alone)


def older(name):
    """An older diffusers name: `lora.down` in place of `lora_A`."""
    return name.replace("lora_A", "lora.down").replace("lora_B", "lora.up")


def oldest(name):
    """The oldest diffusers name, of attention processors: `attn1.processor.to_out_lora.down`."""
    for layer in ("to_q", "to_k", "to_v", "to_out.0"):
        name = name.replace(f".{layer}.lora.", f".processor.{layer.removesuffix('.0')}_lora.")
    return name


@pytest.mark.parametrize("rename", [older, lambda name: oldest(older(name))], ids=["older", "oldest"])
def test_older_diffusers_names(tmp_path, rename):
    """Without alphas: the strength is 1, whatever the rank."""
    oracle, ours = pair("unet", UNET)
    path = trained(oracle, tmp_path, r=3, lora_alpha=7, target_modules=LINEAR, rank_pattern={"to_k": 2})
    tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
    assert not any("lora_" in name.replace("_lora.", "") for name in tensors)
    save_file(tensors, path)
    oracle, _ = pair("unet", UNET)
    load({"unet": ours}, path)
    assert_parity(run_ours(ours), run_oracle(read_by_diffusers(oracle, path)))


def kohya(state, alphas=lambda layer, rank: rank):
    """PEFT tensors with kohya's names and alphas."""
    tensors = {}
    for name, tensor in state.items():
        layer, kind = name.removeprefix("unet.").rsplit(".lora_", 1)
        layer = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{layer}.{'lora_down' if kind == 'A.weight' else 'lora_up'}.weight"] = tensor
        if kind == "A.weight":
            tensors[f"{layer}.alpha"] = torch.tensor(float(alphas(layer, tensor.shape[0])))
    return tensors


def test_kohya_names(tmp_path):
    """With the official block names and one alpha, over uneven ranks; diffusers reads the same file."""
    oracle, ours = pair("unet", UNET)
    before = run_ours(ours)
    path = trained(oracle, tmp_path, r=4, target_modules=EVERYWHERE, rank_pattern={"conv1": 2, "to_q": 3})
    state = {name: tensor for name, tensor in load_file(path).items() if not re.search(UNKNOWN_TO_DIFFUSERS, name)}
    save_file(kohya(state, lambda layer, rank: 2), path)
    oracle, _ = pair("unet", UNET)
    load({"unet": ours}, path)
    assert relative_error(run_ours(ours), before) > 0.1
    assert_parity(run_ours(ours), run_oracle(read_by_diffusers(oracle, path)))


def test_kohya_names_with_an_alpha_per_layer(tmp_path):
    """The oracle is PEFT on the trained UNet: reading such a file back, diffusers drops the attentions' alphas."""
    oracle, ours = pair("unet", UNET)
    path = trained(oracle, tmp_path, **UNEVEN)
    strengths = {
        "lora_unet_" + name.replace(".", "_"): module.scaling["default"]
        for name, module in oracle.named_modules()
        if hasattr(module, "scaling")
    }
    assert len(set(strengths.values())) > 5
    save_file(kohya(load_file(path), lambda layer, rank: strengths[layer] * rank), path)
    load({"unet": ours}, path)
    assert_parity(run_ours(ours), run_oracle(oracle))


def test_kohya_names_of_the_original_blocks(tmp_path):
    """A file that names the blocks as SDXL's original code gives the same as one with the official names."""
    oracle, ours = pair("unet", unet_config(**SIZES, depth=(0, 1, 2)))
    path = trained(oracle, tmp_path, r=2, target_modules=EVERYWHERE)
    official, original = {}, {}
    for name, tensor in kohya(load_file(path), lambda layer, rank: 3).items():
        layer, ending = name.removeprefix("lora_unet_").split(".", 1)
        if layer in ORIGINAL:
            official[name] = tensor
            original[f"lora_unet_{ORIGINAL[layer]}.{ending}"] = tensor
    assert len(original) == 3 * len(ORIGINAL)
    save_file(official, tmp_path / "official.safetensors")
    save_file(original, tmp_path / "original.safetensors")
    one, other = (read_lora(tmp_path / f"{name}.safetensors").networks["unet"] for name in ("official", "original"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[layer].down, other[layer].down) for layer in one)
    load({"unet": ours}, tmp_path / "original.safetensors")
    oracle, _ = pair("unet", unet_config(**SIZES, depth=(0, 1, 2)))
    assert_parity(run_ours(ours), run_oracle(read_by_diffusers(oracle, tmp_path / "original.safetensors")))


@pytest.mark.parametrize("naming", ["peft", "diffusers", "kohya"])
def test_diffusers_reads_what_is_written(tmp_path, naming):
    """Exported under each naming, with per-layer ranks, and alphas where diffusers reads them for each layer."""
    oracle, ours = pair("unet", UNET)
    targets = [layer for layer in EVERYWHERE if layer not in ("linear_1", "linear_2", "encoder_hid_proj")]
    even = {**UNEVEN, "target_modules": targets, "alpha_pattern": {}}
    path = trained(oracle, tmp_path, **(even if naming == "kohya" else UNEVEN))
    expected = run_oracle(oracle)
    exported = tmp_path / "exported.safetensors"
    save_lora(exported, read_lora(path), naming)
    load({"unet": ours}, exported)
    assert_parity(run_ours(ours), expected)
    oracle, _ = pair("unet", UNET)
    assert_parity(run_oracle(read_by_diffusers(oracle, exported)), expected)


def test_a_half_precision_file(tmp_path):
    """fp16 matrices on a float32 network are cast to it."""
    oracle, ours = pair("unet", UNET, torch.float32)
    path = trained(oracle, tmp_path, r=4, lora_alpha=6, target_modules=[*LINEAR, "conv2", "conv_in"])
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    oracle, _ = pair("unet", UNET, torch.float32)
    load({"unet": ours}, path)
    for _ in ("hooks", "fused"):
        assert_parity(run_ours(ours, torch.float32), run_oracle(read_by_diffusers(oracle, path), torch.float32))
        oracle, _ = pair("unet", UNET, torch.float32)
        fuse(ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv"])
@torch.no_grad()
def test_a_layer_in_half_precision(kind, dtype):
    """fp16 matrices on a layer in half precision: as near to the exact result as PEFT, as hooks and fused."""
    torch.manual_seed(5)
    layer = nn.Linear(64, 96) if kind == "linear" else nn.Conv2d(24, 32, 3, stride=2, padding=1)
    x = (torch.randn(400, 64) if kind == "linear" else torch.randn(4, 24, 17, 20)).to(dtype)
    ours = nn.ModuleDict({"layer": layer}).to(dtype)
    oracle = inject_adapter_in_model(LoraConfig(r=6, lora_alpha=8, target_modules=["layer"]), copy.deepcopy(ours))
    randomise_adapter(oracle.half(), "default", 6)
    adapted = oracle["layer"]
    down, up = adapted.lora_A["default"].weight.clone(), adapted.lora_B["default"].weight.clone()
    theirs = oracle.to(dtype)["layer"](x)
    exact = oracle.double()
    exact["layer"].base_layer.load_state_dict(layer.state_dict())
    adapted.lora_A["default"].weight.copy_(down)
    adapted.lora_B["default"].weight.copy_(up)
    exact = exact["layer"](x.double())
    attach(ours, {"layer": LowRank(down, up, 8)}, "a")
    assert ours["layer"].lora.updates["a"].down.dtype == dtype
    for _ in ("hooks", "fused"):
        assert ours["layer"](x).dtype == dtype
        assert 1e-5 < relative_error(ours["layer"](x), exact) < 1.05 * relative_error(theirs, exact)
        fuse(ours)


# ---- the text encoder


@pytest.mark.parametrize("layout", ["folder of PEFT", "text_encoder prefix", "kohya"])
def test_the_text_encoder(tmp_path, layout):
    """The fused query, key and value projection and every other linear layer, with per-layer ranks and alphas."""
    oracle, ours = pair("text_encoder", GLM)
    before = packed_layout(token_batch((9, 4))).encode(ours)
    patterns = {"rank_pattern": {"dense": 3}, "alpha_pattern": {"layers.1.mlp.dense_4h_to_h": 9.0}}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=GLM_LAYERS, **patterns)
    adapted = randomise_adapter(get_peft_model(oracle, config).double(), "default", 13)
    adapted.save_pretrained(tmp_path)
    path = tmp_path
    if layout == "text_encoder prefix":
        state = {
            f"text_encoder.{name.removeprefix('base_model.model.')}": tensor
            for name, tensor in get_peft_model_state_dict(adapted).items()
        }
        for name in [name for name in state if name.endswith("lora_A.weight")]:
            rank, alpha = len(state[name]), 9.0 if "1.mlp.dense_4h" in name else 6.0
            state[name.replace("lora_A.weight", "alpha")] = torch.tensor(alpha)
            assert rank == (3 if ".dense." in name else 4)
        path = tmp_path / "prefix.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    if layout == "kohya":
        path = tmp_path / "kohya.safetensors"
        save_lora(path, read_lora(tmp_path), "kohya")
        assert "lora_te_encoder_layers_0_self_attention_query_key_value.lora_down.weight" in load_file(path)
    load({"text_encoder": ours, "unet": torch.nn.Identity()}, path)
    tokens = token_batch((9, 4))
    sequence, pooled = official_embeddings(adapted, tokens)
    for _ in ("hooks", "fused"):
        text = packed_layout(tokens).encode(ours)
        assert relative_error(text.pooled, before.pooled) > 0.05
        assert_parity(text.pooled, pooled)
        for i, length in enumerate((9, 4)):
            assert_parity(text.sequence[i, -length:], sequence[i, -length:])
        fuse(ours)


def test_peft_reads_what_is_written(tmp_path):
    """Our file on the bare text encoder by PEFT alone, configured by our header."""
    oracle, ours = pair("text_encoder", GLM)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=GLM_LAYERS, rank_pattern={"dense": 3}, use_rslora=True)
    adapted = randomise_adapter(get_peft_model(oracle, config).double(), "default", 13)
    adapted.save_pretrained(tmp_path)
    exported = tmp_path / "exported.safetensors"
    save_lora(exported, read_lora(tmp_path))
    attach(ours, read_lora(exported).networks["text_encoder"], "a")
    tokens = token_batch((9, 4))
    _, expected = official_embeddings(adapted, tokens)
    assert_parity(packed_layout(tokens).encode(ours).pooled, expected)

    with safe_open(exported, framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    settings = {key.removeprefix("text_encoder."): value for key, value in settings.items()}
    oracle, _ = pair("text_encoder", GLM)
    inject_adapter_in_model(LoraConfig(**settings), oracle)
    state = {name.removeprefix("text_encoder."): tensor for name, tensor in load_file(exported).items()}
    result = set_peft_model_state_dict(oracle.double(), state)
    assert not result.unexpected_keys
    with torch.no_grad():
        assert_parity(official_embeddings(oracle, tokens)[1], expected)
