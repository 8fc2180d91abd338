"""LoRA without an oracle: names, files, mistakes, and what happens to the network."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kolors_ref.config import GLMConfig, UNetConfig, VAEConfig
from kolors_ref.lora import (
    LoRA,
    LowRank,
    attach,
    attached,
    detach,
    fuse,
    load,
    read_lora,
    save_lora,
    unfuse,
    unload,
)
from kolors_ref.models.glm import GLMEncoder
from kolors_ref.models.unet import UNet
from kolors_ref.models.vae import VAE
from weights_conversion.__main__ import main
from weights_conversion.keymaps.lora import NAMINGS, Place, to_official, to_ours

UNET = UNetConfig(
    channels=(8, 16), transformer_depth=(0, 1), num_heads=(1, 2), layers_per_block=1, text_dim=12,
    cross_attention_dim=12, pooled_dim=12, size_embed_dim=4, norm_groups=4,
)  # fmt: skip
GLM = GLMConfig(
    vocab_size=20, hidden_size=16, ffn_hidden_size=20, num_layers=2, num_heads=2, head_dim=8, num_kv_groups=1
)
LAYERS = {"mid.attn.0.blocks.0.cross_attn.k": 2, "conv_in": 3, "text_proj": 4, "down.1.res.0.skip": 1}


def adaptable(network):
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def updates(network, ranks, seed=0, dtype=torch.float32):
    """Random updates for the layers of this network: name -> rank."""
    g = torch.Generator().manual_seed(seed)
    layers, found = adaptable(network), {}
    for i, (name, rank) in enumerate(ranks.items()):
        out, *rest = layers[name].weight.shape
        ones = [1] * (len(rest) - 1)
        down = torch.randn(rank, *rest, generator=g).to(dtype)
        found[name] = LowRank(down, torch.randn(out, rank, *ones, generator=g).to(dtype), 0.5 + i)
    return found


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(UNET).requires_grad_(False).eval()


@pytest.fixture
def glm():
    torch.manual_seed(1)
    return GLMEncoder(GLM).requires_grad_(False).eval()


@pytest.fixture
def file(unet, tmp_path):
    """A file with updates for four layers of the UNet."""
    save_lora(tmp_path / "style.safetensors", LoRA({"unet": updates(unet, LAYERS)}))
    return tmp_path / "style.safetensors"


@torch.no_grad()
def run(unet):
    dtype = unet.conv_in.weight.dtype
    g = torch.Generator().manual_seed(3)
    text, pooled, latents = (torch.randn(s, generator=g).to(dtype) for s in ((1, 5, 12), (1, 12), (1, 4, 8, 8)))
    return unet(latents, 7, unet.prepare(text, pooled, torch.tensor([[64, 64, 0, 0, 64, 64]])))


def expected_weights(unet, name_of_updates, scale=1.0):
    """Every weight with the updates in it, by the definition."""
    state = {name: tensor.double() for name, tensor in unet.state_dict().items()}
    for layer, low_rank in name_of_updates.items():
        delta = torch.einsum("or,r...->o...", low_rank.up.double().flatten(1), low_rank.down.double())
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + scale * low_rank.alpha / len(low_rank.down) * delta
    return state


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- names


def test_a_strength_that_has_no_room(unet, tmp_path):
    """An older name has no place for an alpha, and fp16 none for its product."""
    large = {"conv_in": replace(updates(unet, LAYERS)["conv_in"], alpha=1e9)}
    large["conv_in"] = replace(large["conv_in"], up=large["conv_in"].up.half())
    with pytest.raises(ValueError, match="overflows"):
        save_lora(tmp_path / "a.safetensors", LoRA({"unet": large}), "diffusers")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(("network", "model"), [("unet", UNet(UNET)), ("text_encoder", GLMEncoder(GLM))])
def test_every_layer_there_and_back(network, model, naming):
    """No two layers share a name, and every name leads back."""
    parts = ["down", "up", "alpha"] if naming == "kohya" else ["down", "up"]
    places = [Place(network, layer, part) for layer in adaptable(model) for part in parts]
    names = [to_official(place, naming) for place in places]
    assert len(set(names)) == len(names) >= 16
    assert [to_ours(name) for name in names] == places


def test_every_layer_of_the_official_sizes():
    """795 linear layers and convolutions of the UNet, 112 of the text encoder, all told apart by kohya's names."""
    with torch.device("meta"):
        models = {"unet": UNet(UNetConfig()), "text_encoder": GLMEncoder(GLMConfig())}
    places = [Place(network, layer, "up") for network, model in models.items() for layer in adaptable(model)]
    assert len(places) == 795 + 112
    assert [to_ours(to_official(place, "kohya")) for place in places] == places


K = "mid.attn.0.blocks.1.cross_attn.k"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_k.lora_A.weight", ("unet", K, "down")),
        ("mid_block.attentions.0.transformer_blocks.1.attn2.to_k.lora_B.weight", ("unet", K, "up")),
        ("unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_k.lora_B.style.weight", ("unet", K, "up")),
        ("base_model.model.mid_block.attentions.0.transformer_blocks.1.attn2.to_k.lora_A.weight", ("unet", K, "down")),
        ("unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_k.alpha", ("unet", K, "alpha")),
        ("unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_k.lora.up.weight", ("unet", K, "up")),
        ("unet.mid_block.attentions.0.transformer_blocks.1.attn2.processor.to_k_lora.up.weight", ("unet", K, "up")),
        ("mid_block.attentions.0.transformer_blocks.1.attn2.processor.to_k_lora.up.weight", ("unet", K, "up")),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_1_attn2_to_k.lora_up.weight", ("unet", K, "up")),
        ("lora_unet_middle_block_1_transformer_blocks_1_attn2_to_k.alpha", ("unet", K, "alpha")),
        ("text_encoder.encoder.layers.3.mlp.dense_h_to_4h.lora_A.weight", ("text_encoder", "layers.3.ffn.up", "down")),
        (
            "text_encoder.encoder.layers.3.self_attention.dense.lora_linear_layer.up.weight",
            ("text_encoder", "layers.3.attn.out", "up"),
        ),
        ("lora_te_encoder_layers_12_self_attention_dense.alpha", ("text_encoder", "layers.12.attn.out", "alpha")),
        (
            "lora_te1_transformer_encoder_layers_0_mlp_dense_4h_to_h.lora_down.weight",
            ("text_encoder", "layers.0.ffn.down", "down"),
        ),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", None),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", None),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_1_attn2_to_k.lora_mid.weight", None),
        ("lora_unet_mid_block_attentions_01_proj_in.alpha", None),
        ("lora_unet_mid_block_attentions_0_proj.in.alpha", None),
        ("lora_unet_input_blocks_9_0_in_layers_2.alpha", None),
        ("unet.mid_block.attentions.0.proj_in.weight", None),
        ("unet.mid_block.attentions.0.proj_in.lora_B.bias", None),
        ("text_encoder.mid_block.attentions.0.proj_in.lora_B.weight", None),
        ("transformer.blocks.0.attn.lora_A.weight", None),
        ("alpha", None),
        ("", None),
    ],
)
def test_a_name(name, place):
    assert to_ours(name) == place


# ---- the network


def test_hooks_and_fusing_follow_the_definition(unet):
    """W + scale x alpha / rank x up down, for linear layers and convolutions."""
    unet.double()
    ups, exact = updates(unet, LAYERS), copy.deepcopy(unet)
    exact.load_state_dict(expected_weights(unet, ups, -0.6))
    before, wanted = run(unet), run(exact)
    assert (wanted - before).norm() > 0.1 * before.norm()
    attach(unet, ups, "a", -0.6)
    assert (run(unet) - wanted).norm() < 1e-12 * wanted.norm()
    fuse(unet)
    assert (run(unet) - wanted).norm() < 1e-12 * wanted.norm()
    assert all((tensor - unet.state_dict()[name]).norm() < 1e-12 for name, tensor in exact.state_dict().items())


def test_nothing_remains(unet):
    """Neither hooks nor attributes, nor another module tree meanwhile."""
    before, tree, state = run(unet), str(unet), {name: t.clone() for name, t in unet.state_dict().items()}
    parameters = dict(unet.named_parameters())
    attach(unet, updates(unet, LAYERS), "a")
    assert not torch.equal(run(unet), before)
    assert str(unet) == tree
    assert same_tensors(unet.state_dict(), state)
    fuse(unet)
    assert not same_tensors(unet.state_dict(), state)
    detach(unet, "a")
    assert attached(unet) == []
    assert not any(module._forward_hooks or "lora" in vars(module) for module in unet.modules())
    assert torch.equal(run(unet), before)
    assert same_tensors(unet.state_dict(), state)
    assert all(
        tensor.data_ptr() == parameters[name].data_ptr() and not tensor.requires_grad
        for name, tensor in unet.named_parameters()
    )


def test_several_on_one_layer(unet):
    """The order of attaching and detaching does not matter, fused or not."""
    unet.double()
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        attach(unet, updates(unet, LAYERS, seed), name, 0.1 * seed)
    assert attached(unet) == ["a", "b", "c"]
    detach(unet, "b")
    wanted = copy.deepcopy(unet)
    fuse(unet)
    attach(unet, updates(unet, LAYERS, 2), "b", 0.2)
    assert not unet.conv_in.weight.equal(wanted.conv_in.weight)
    detach(unet, "b")
    unfuse(unet)
    assert torch.equal(run(unet), run(wanted))
    assert unet.conv_in.weight.equal(wanted.conv_in.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_fused_weights_are_rounded_once(unet, dtype):
    unet.to(dtype)
    ups = updates(unet, LAYERS, dtype=torch.float16)
    exact = expected_weights(unet, ups, 0.3)
    attach(unet, ups, "a", 0.3)
    fuse(fused := copy.deepcopy(unet))
    fuse(fused)
    for name, tensor in fused.state_dict().items():
        step = torch.finfo(dtype).eps * exact[name].abs()
        assert (tensor.double() - exact[name]).abs().le(0.51 * step + 1e-6).all(), name


def test_a_mapped_file_is_not_written(unet, tmp_path):
    """Base weights mapped from a file: fusing leaves them alone, unfusing puts the mapped ones back."""
    path = tmp_path / "unet.safetensors"
    save_file(unet.state_dict(), path)
    content = path.read_bytes()
    with torch.device("meta"):
        mapped = UNet(UNET)
    mapped.load_state_dict(load_file(path), assign=True)
    mapped.requires_grad_(False)
    place = mapped.conv_in.weight.data_ptr()
    attach(mapped, updates(unet, LAYERS), "a")
    fuse(mapped)
    assert mapped.conv_in.weight.data_ptr() != place
    unfuse(mapped)
    assert mapped.conv_in.weight.data_ptr() == place
    assert path.read_bytes() == content
    assert same_tensors(mapped.state_dict(), unet.state_dict())


def test_a_network_that_changes_its_format(unet):
    """The matrices follow the layer, and lose nothing on the way there and back; so do weights under a fusion."""
    attach(unet, updates(unet, LAYERS), "a")
    once = run(unet)
    exact = copy.deepcopy(unet).double()
    unet.bfloat16()
    assert run(unet).dtype == torch.bfloat16
    rounded = {name: t.clone() for name, t in unet.state_dict().items()}
    fuse(unet.double())
    unfuse(unet.bfloat16())
    assert same_tensors(unet.state_dict(), rounded)
    unet.float().load_state_dict({name: t.float() for name, t in exact.state_dict().items()})
    assert torch.equal(run(unet), once)


def test_matrices_of_two_formats(unet):
    wanted, mixed = updates(unet, LAYERS, dtype=torch.float16), {}
    for layer, low_rank in wanted.items():
        mixed[layer] = LowRank(low_rank.down.float(), low_rank.up, low_rank.alpha)
    attach(other := copy.deepcopy(unet), wanted, "a")
    attach(unet, mixed, "a")
    assert torch.equal(run(unet), run(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("late", [False, True])
def test_matrices_can_be_trained(unet, dtype, late):
    """In fp32 on a network in half precision too: a gradient reaches them, and what a step does to them counts."""
    wanted = updates(unet, LAYERS)
    matrices = [matrix for low_rank in wanted.values() for matrix in (low_rank.down, low_rank.up)]
    unet.to(dtype)
    if late:
        attach(unet, wanted, "a")
        run(unet)
    for matrix in matrices:
        matrix.requires_grad_()
    if not late:
        attach(unet, wanted, "a")
    optimizer, losses = torch.optim.Adam(matrices, 3e-2), []
    for _ in range(4):
        loss = run.__wrapped__(unet).float().square().mean()  # with gradients
        loss.backward()
        assert all(matrix.grad.abs().sum() > 0 for matrix in matrices)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    copy.deepcopy(unet)


def test_gradients_after_inference_mode(unet):
    """Matrices cast inside inference mode still serve a later call that records gradients."""
    attach(unet, updates(unet, LAYERS), "a")
    unet.double()
    with torch.inference_mode():
        unet.conv_in(torch.randn(1, 4, 8, 8, dtype=torch.float64))
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    unet.conv_in(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_copy_is_independent(unet):
    attach(unet, updates(unet, LAYERS), "a")
    other, once = copy.deepcopy(unet), run(unet)
    detach(other, "a")
    assert torch.equal(run(unet), once)
    assert not torch.equal(run(other), once)
    assert attached(unet) == ["a"]


def test_a_scale_of_zero(unet):
    before = run(unet)
    attach(unet, updates(unet, LAYERS), "a", 0)
    assert torch.equal(run(unet), before)


@pytest.mark.parametrize("scale", ["1", None, True, 1j, torch.ones(1), [1.0]])
def test_a_scale_that_is_no_number(unet, file, scale):
    with pytest.raises(TypeError, match="must be a number, not"):
        attach(unet, updates(unet, LAYERS), "a", scale)
    with pytest.raises(TypeError, match="must be a number, not"):
        load({"unet": unet}, file, scale)
    assert attached(unet) == []


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_not_finite(unet, scale):
    with pytest.raises(ValueError, match="must be finite"):
        attach(unet, updates(unet, LAYERS), "a", scale)


def test_updates_that_do_not_fit(unet):
    """How many, which first and why; the network stays as it was."""
    good = updates(unet, LAYERS)
    narrow = LowRank(torch.ones(2, 5), torch.ones(16, 2), 1.0)
    pointwise = LowRank(torch.ones(2, 16, 1, 1), torch.ones(16, 2, 1, 1), 1.0)
    for bad, message in [
        ({"mid.attn.0.proj_in": narrow}, r"1 of its 5 .* first is 'mid.attn.0.proj_in'.* \(16, 16\) there and \(16, 5"),
        ({"mid.attn.0.proj_in": pointwise, "x": narrow}, r"2 of its 6 .* \(16, 16\) there and \(16, 16, 1, 1\)"),
        ({"mid.attn.7.proj_in": narrow}, r"first is 'mid.attn.7.proj_in', which is not a linear"),
        ({"norm_out": narrow}, r"'norm_out', which is not a linear layer or convolution"),
    ]:
        with pytest.raises(ValueError, match=message):
            attach(unet, good | bad, "a")
        assert not any("lora" in vars(module) for module in unet.modules())


def test_a_convolution_of_another_kind():
    """The autoencoder enlarges before it convolves, which no hook knows of."""
    vae = VAE(VAEConfig(channels=(8, 8), layers_per_block=1, norm_groups=4))
    low_rank = LowRank(torch.ones(2, 8, 3, 3), torch.ones(8, 2, 1, 1), 1.0)
    with pytest.raises(ValueError, match=r"'decoder.up.0.upsample', which is not a linear layer"):
        attach(vae, {"decoder.up.0.upsample": low_rank}, "a")


def test_names_that_are_taken_or_unknown(unet):
    with pytest.raises(ValueError, match="no LoRA named 'a' on the UNet: there are none"):
        detach(unet, "a")
    with pytest.raises(ValueError, match="There is no LoRA to fuse"):
        fuse(unet)
    attach(unet, updates(unet, LAYERS), "a")
    with pytest.raises(ValueError, match="named 'a' is on the UNet already"):
        attach(unet, updates(unet, LAYERS), "a")
    with pytest.raises(ValueError, match="there are 'a'"):
        detach(unet, "b")
    unfuse(unet)
    assert attached(unet) == ["a"]


# ---- the networks of a pipeline


def test_load_and_unload(unet, glm, tmp_path):
    """Both networks at once, by name or all; a name of its own for each."""
    path = tmp_path / "style.safetensors"
    parts = {"unet": updates(unet, LAYERS), "text_encoder": updates(glm, {"layers.1.attn.qkv": 2})}
    save_lora(path, LoRA(parts))
    networks = {"unet": unet, "text_encoder": glm, "vae": nn.Conv2d(1, 1, 1)}
    assert [load(networks, path), load(networks, str(path), 0.5), load(networks, path, name="x")] == [
        "style", "style-2", "x",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'x' is loaded already"):
        load(networks, path, name="x")
    assert attached(unet) == attached(glm) == ["style", "style-2", "x"]
    unload(networks, "style")
    assert attached(unet) == attached(glm) == ["style-2", "x"]
    with pytest.raises(ValueError, match="No LoRA named 'style' is loaded: there are 'style-2', 'x'"):
        unload(networks, "style")
    fuse(unet, glm)
    unload(networks)
    assert attached(unet) == attached(glm) == []
    unload(networks)


def test_numbers_that_are_none(unet, tmp_path):
    """The file is named; else the UNet would be said to give NaN."""
    path = tmp_path / "style.safetensors"
    broken = updates(unet, LAYERS)
    broken["conv_in"].up[0, 0] = torch.nan
    save_lora(path, LoRA({"unet": broken}))
    with pytest.raises(ValueError, match=r"style.safetensors: the update of unet.conv_in holds NaN or infinity"):
        load({"unet": unet}, path)
    assert attached(unet) == []


def test_all_networks_or_none(unet, glm, tmp_path):
    path = tmp_path / "style.safetensors"
    wrong = {"layers.9.attn.qkv": updates(glm, {"layers.1.attn.qkv": 2})["layers.1.attn.qkv"]}
    save_lora(path, LoRA({"unet": updates(unet, LAYERS), "text_encoder": wrong}))
    with pytest.raises(ValueError, match=r"another GLMEncoder: 1 of its 1 updates .* 'layers.9.attn.qkv'"):
        load({"unet": unet, "text_encoder": glm}, path)
    with pytest.raises(ValueError, match="1 updates for a network that is not there, the text_encoder"):
        load({"unet": unet}, path)
    assert attached(unet) == attached(glm) == []


# ---- files


@pytest.mark.parametrize("naming", NAMINGS)
def test_there_and_back(unet, tmp_path, naming):
    """The same matrices bit for bit and the same alphas; without a place for alphas, the same product."""
    lora = LoRA({"unet": updates(unet, LAYERS)})
    save_lora(tmp_path / "a.safetensors", lora, naming)
    read = read_lora(tmp_path / "a.safetensors").networks["unet"]
    assert read.keys() == LAYERS.keys()
    for layer, low_rank in lora.networks["unet"].items():
        assert torch.equal(read[layer].down, low_rank.down)
        if naming == "diffusers":
            assert read[layer].strength == 1
            torch.testing.assert_close(read[layer].up, low_rank.up * low_rank.strength, rtol=1e-6, atol=0)
        else:
            assert torch.equal(read[layer].up, low_rank.up)
            assert read[layer].alpha == low_rank.alpha
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_alphas_are_exact(unet, tmp_path):
    """In kohya's files too, where one that float32 cannot hold is written in float64."""
    ups = updates(unet, {"conv_in": 3, "text_proj": 2})
    ups = {layer: LowRank(low.down, low.up, alpha) for (layer, low), alpha in zip(ups.items(), (0.1, 4), strict=True)}
    save_lora(tmp_path / "a.safetensors", LoRA({"unet": ups}), "kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors["lora_unet_conv_in.alpha"].item() == 0.1
    assert tensors["lora_unet_encoder_hid_proj.alpha"].dtype == torch.float32


def test_a_pickle(file, tmp_path):
    """A .bin is read as well, in the folder of diffusers' name too."""
    path = tmp_path / "pytorch_lora_weights.bin"
    torch.save(load_file(file), path)
    file.unlink()
    by_file, by_folder = read_lora(path).networks["unet"], read_lora(tmp_path).networks["unet"]
    assert by_file.keys() == by_folder.keys() == LAYERS.keys()
    save_lora(file, read_lora(path))


def test_one_tensor_under_two_names(unet, tmp_path):
    """As a pickle can have it; a safetensors file holds it twice."""
    k, v = "mid.attn.0.blocks.0.cross_attn.k", "mid.attn.0.blocks.0.cross_attn.v"
    ups = updates(unet, {k: 2, v: 2})
    tied = {k: ups[k], v: replace(ups[v], down=ups[k].down)}
    save_lora(tmp_path / "a.safetensors", LoRA({"unet": tied}))
    found = read_lora(tmp_path / "a.safetensors").networks["unet"]
    assert torch.equal(found[k].down, found[v].down)
    assert torch.equal(found[k].down, ups[k].down)


def test_a_folder_with_a_lora_for_each_network(unet, glm, tmp_path):
    """As the Kolors team's DreamBooth training leaves it: diffusers' file for the UNet, PEFT's for the text encoder."""
    layers = {"layers.1.attn.qkv": 2}
    save_lora(tmp_path / "pytorch_lora_weights.safetensors", LoRA({"unet": updates(unet, LAYERS)}))
    save_lora(tmp_path / "text.safetensors", LoRA({"text_encoder": updates(glm, layers)}))
    wrapped = {
        name.replace("text_encoder.", "base_model.model.", 1): tensor
        for name, tensor in load_file(tmp_path / "text.safetensors").items()
    }
    torch.save(wrapped, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 32}')
    found = read_lora(tmp_path).networks
    assert {network: set(layers) for network, layers in found.items()} == {
        "unet": set(LAYERS),
        "text_encoder": set(layers),
    }
    assert found["text_encoder"]["layers.1.attn.qkv"].strength == 16
    save_file(wrapped, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.bin").write_bytes(b"the same in another format")
    assert read_lora(tmp_path).networks["text_encoder"]["layers.1.attn.qkv"].strength == 16
    save_lora(tmp_path / "adapter_model.safetensors", LoRA({"unet": updates(unet, LAYERS)}), force=True)
    with pytest.raises(ValueError, match=r"holds two LoRAs of the unet, one in adapter_model.safetensors"):
        read_lora(tmp_path)


class Bomb:
    def __reduce__(self):
        return eval, ("1 / 0",)


def test_a_pickle_with_code(tmp_path):
    torch.save({"a": Bomb()}, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="is refused: it holds Python objects"):
        read_lora(tmp_path / "a.bin")


def rename(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def put(name, value):
    return lambda tensors: tensors | {name: value}


def drop(ending):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}


IN = "unet.conv_in"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename("unet.", "transformer."), "8 of the 8 tensors have no place .* the first is 'transformer."),
        (put("lora_te2_x.lora_down.weight", torch.ones(1)), "1 of the 9 tensors .* 'lora_te2_x.lora_down.weight'"),
        (put(f"{IN}.lora_B.bias", torch.ones(1)), "1 of the 9 tensors"),
        (put(f"{IN}.lora_magnitude_vector", torch.ones(1)), "is a DoRA"),
        (put("lora_unet_conv_in.lokr_w1", torch.ones(1)), "is a LoKr"),
        (put("lora_unet_conv_in.hada_w1_a", torch.ones(1)), "is a LoHa"),
        (put(f"{IN}.lora.up.weight", torch.ones(8, 3, 1, 1)), "the same matrix twice"),
        (drop("conv_in.lora_B.weight"), "holds 'unet.conv_in.lora_A.weight' without the other"),
        (put("unet.conv_out.alpha", torch.tensor(1.0)), "holds 'unet.conv_out.alpha' without the other"),
        (put(f"{IN}.lora_B.weight", torch.ones(8, 2, 1, 1)), r"\(3, 4, 3, 3\) and \(8, 2, 1, 1\), are not two"),
        (put(f"{IN}.lora_B.weight", torch.ones(8, 3)), "are not two matrices of one rank"),
        (put(f"{IN}.lora_B.weight", torch.ones(8, 3, 3, 3)), "are not two matrices of one rank"),
        (put(f"{IN}.lora_B.weight", torch.ones(8, 3, 1, 1, dtype=torch.int8)), "are not two matrices of one rank"),
        (put(f"{IN}.alpha", torch.ones(2)), "'unet.conv_in.alpha' must be one finite number"),
        (put(f"{IN}.alpha", torch.tensor(math.nan)), "must be one finite number"),
        (put(f"{IN}.alpha", torch.tensor(1j)), "must be one finite number"),
        (lambda tensors: {}, "holds no tensors"),
    ],
)
def test_files_that_are_no_lora_for_kolors(file, change, message):
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError, match=message) as error:
        read_lora(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "in its header is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"lora_alpha": "x"}', "'lora_alpha' must be one finite number"),
        ('{"unet.lora_alpha": NaN}', "'lora_alpha' must be one finite number"),
        ('{"unet.alpha_pattern": [1]}', "alpha_pattern is"),
        ('{"unet.alpha_pattern": {"(": 1}}', "is not understood: missing"),
        (json.dumps({"unet.alpha_pattern": {"(" * 5000 + ")" * 5000: 1}}), "alpha_pattern is not understood"),
        (r'{"unet.alpha_pattern": {"((\\w|\\.)+)+!": 1}}', "is not understood: only names are"),
        ('{"unet.alpha_pattern": {".*.*.*.*.*.*.*.*!": 1}}', "is not understood: only names are"),
        ('{"unet.alpha_pattern": {"a{99999999999999999999}": 1}}', "is not understood: only names are"),
        ('{"unet.init_lora_weights": "pissa_niter_4"}', "begun with 'pissa_niter_4', which moves the base"),
        ('{"init_lora_weights": "olora"}', "begun with 'olora'"),
        ('{"lora_alpha": 1' + "0" * 400 + "}", "'lora_alpha' must be one finite number"),
    ],
)
def test_damaged_settings(file, settings, message):
    save_file(load_file(file), file, {"lora_adapter_metadata": settings})
    with pytest.raises(ValueError, match=message):
        read_lora(file)


def test_a_moved_base_is_refused_where_layers_have_alphas_of_their_own(file):
    own = {name.replace("lora_A.weight", "alpha"): torch.tensor(3.0) for name in load_file(file) if "lora_A" in name}
    save_file({**load_file(file), **own}, file, {"lora_adapter_metadata": '{"init_lora_weights": "pissa"}'})
    with pytest.raises(ValueError, match="begun with 'pissa'"):
        read_lora(file)


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({}, 3),
        ({"unet.lora_alpha": 5}, 5),
        ({"lora_alpha": 5}, 5),
        ({"unet.lora_alpha": 5, "unet.init_lora_weights": "gaussian", "text_encoder.init_lora_weights": "pissa"}, 5),
        ({"lora_alpha": 5, "init_lora_weights": True}, 5),
        ({"text_encoder.lora_alpha": 5}, 3),
        ({"unet.lora_alpha": 5, "text_encoder.lora_alpha": 7, "unet.use_rslora": True}, 5 * 3**0.5),
        ({"unet.lora_alpha": 5, "unet.alpha_pattern": {"in": 9, "conv_in": 8, "conv.*": 7}}, 8),
        ({"unet.lora_alpha": 5, "unet.alpha_pattern": {"conv_.*": 7}}, 7),
        ({"unet.lora_alpha": 5, "unet.alpha_pattern": {"^conv_in$": 7}}, 7),
        ({"unet.lora_alpha": 5, "unet.alpha_pattern": {r"blocks\.\d+\.(in|out)|conv_(in|out)": 7}}, 7),
        ({"unet.lora_alpha": 5, "unet.alpha_pattern": {r"blocks\.[0-9]+\..*": 7}}, 5),
    ],
)
def test_where_alphas_come_from(file, settings, alpha):
    """PEFT's settings, prefixed or not, with patterns that match a layer from a dot to its end; else the rank, 3."""
    save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps(settings)})
    assert read_lora(file).networks["unet"]["conv_in"].alpha == alpha
    save_file(load_file(file) | {f"{IN}.alpha": torch.tensor(2.0)}, file)
    assert read_lora(file).networks["unet"]["conv_in"].alpha == 2


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_lora(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no LoRA"):
        read_lora(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_lora(tmp_path / "a.safetensors")


def test_saving_where_it_cannot_be(file, unet, tmp_path):
    """Refused with what stands there untouched and nothing left behind."""
    lora, content = read_lora(file), file.read_bytes()
    for path, naming, what, error, message in [
        (file, "peft", lora, FileExistsError, "exists already"),
        (tmp_path, "peft", lora, ValueError, "must end with .safetensors"),
        (tmp_path / "a.bin", "peft", lora, ValueError, "must end with .safetensors"),
        (tmp_path / "no" / "a.safetensors", "peft", lora, FileNotFoundError, "create it first"),
        (tmp_path / "a.safetensors", "a1111", lora, ValueError, "only peft, diffusers, kohya can"),
        (tmp_path / "a.safetensors", "peft", LoRA({}), ValueError, "is empty"),
        (tmp_path / "a.safetensors", "peft", LoRA({"vae": lora.networks["unet"]}), ValueError, "in the network 'vae'"),
    ]:
        with pytest.raises(error, match=message):
            save_lora(path, what, naming)
    assert file.read_bytes() == content
    save_lora(file, lora, "kohya", force=True)
    assert read_lora(file).networks["unet"].keys() == LAYERS.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["style.safetensors"]


# ---- the command line


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_command(file, tmp_path, naming):
    target = tmp_path / "new.safetensors"
    assert main(["lora", str(file), str(target), "--to", naming]) == 0
    assert read_lora(target).networks["unet"].keys() == LAYERS.keys()
    marks = {"peft": ".lora_A.", "diffusers": ".lora.down.", "kohya": ".lora_down."}
    assert any(marks[naming] in name for name in load_file(target))


def test_mistakes_of_the_command(file, tmp_path, capsys):
    """One line on standard error and exit status 2."""
    new = str(tmp_path / "new.safetensors")
    for arguments in (
        [str(tmp_path / "none.safetensors"), new, "--to", "peft"],
        [str(file), str(file), "--to", "peft"],
        [str(file), new],
        [str(file), new, "--to", "gguf"],
        [str(file), str(tmp_path / "new.bin"), "--to", "peft"],
    ):
        try:
            status = main(["lora", *arguments])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        assert (status, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert main(["lora", str(file), str(file), "--to", "kohya", "--force"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["style.safetensors"]
