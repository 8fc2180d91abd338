"""Opening a checkpoint of any layout, and one sentence for whatever is wrong with it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from weights_conversion import open_checkpoint
from weights_conversion.keymaps import KEYMAPS

COUNTS = {"text_encoder": 25, "unet": 840, "vae": 152}


def expect(error, path, *parts, variant=None):
    """Opening fails with this kind of exception, in one line that holds all the parts."""
    with pytest.raises(error) as caught:
        open_checkpoint(path, variant)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def state_dicts(pipeline):
    """The oracle's tensors under our names."""
    networks = {name: getattr(pipeline, name).state_dict() for name in KEYMAPS}
    return {
        name: {KEYMAPS[name].TABLE.to_ours(key): tensor for key, tensor in state.items()}
        for name, state in networks.items()
    }


@pytest.mark.parametrize(
    ("fixture", "layout", "tokenizer"),
    [
        ("shared_diffusers", "diffusers", "tokenizer/tokenizer.model"),
        ("shared_fp16", "diffusers", "tokenizer/tokenizer.model"),
        ("shared_kolors", "kolors", "text_encoder/tokenizer.model"),
        ("shared_ours", "kolors-ref", "tokenizer.model"),
    ],
)
def test_every_layout_holds_the_oracles_tensors(request, pipeline, fixture, layout, tokenizer):
    """Under our names: the same numbers, shapes, formats and sizes, whatever the layout."""
    path = request.getfixturevalue(fixture)
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.layout == layout
    assert checkpoint.path == path
    assert checkpoint.tokenizer == path / tokenizer
    assert checkpoint.scheduler["num_train_timesteps"] == 1100
    assert checkpoint.force_zeros_for_empty_prompt is True
    assert {name: len(network.tensors) for name, network in checkpoint.networks.items()} == COUNTS
    for name, state in state_dicts(pipeline).items():
        network = checkpoint.networks[name]
        assert network.shapes == {key: tuple(tensor.shape) for key, tensor in state.items()}
        assert network.dtypes == {key: tensor.dtype for key, tensor in state.items()}
        assert all(torch.equal(network.tensors[key], tensor) for key, tensor in state.items())
        assert network.official_config is not None
        assert KEYMAPS[name].CONFIG.to_ours(network.official_config, "config.json") == network.config
    assert checkpoint.networks["text_encoder"].config["num_kv_groups"] == 2
    assert checkpoint.networks["unet"].config["transformer_depth"] == (0, 2, 3)
    assert checkpoint.networks["vae"].config["channels"] == (8, 8, 16)
    assert set(checkpoint.networks["text_encoder"].unused) == {"rope.inv_freq", "lm_head.weight", "final_norm.weight"}
    assert checkpoint.networks["unet"].unused == []


def test_a_unet_file(unet_file, pipeline):
    """Layout 3: one network without a config."""
    checkpoint = open_checkpoint(unet_file)
    assert checkpoint.layout == "unet-file"
    assert list(checkpoint.networks) == ["unet"]
    network = checkpoint.networks["unet"]
    assert (network.config, network.official_config) == (None, None)
    assert set(network.tensors) == set(state_dicts(pipeline)["unet"])
    assert torch.equal(network.tensors["time_embed.0.weight"], pipeline.unet.time_embedding.linear_1.weight)


def test_a_unet_file_may_be_partial(unet_file, edit_weights):
    """It is put over a base checkpoint, which has the rest."""
    edit_weights(unet_file, lambda tensors: [tensors.pop(name) for name in list(tensors) if "attn2" not in name])
    assert all("cross_attn" in name for name in open_checkpoint(unet_file).networks["unet"].tensors)


def test_weights_may_all_be_bin_files(diffusers_folder, pipeline):
    """unet/ and vae/ with a .bin each."""
    for name in ("unet", "vae"):
        path = diffusers_folder / name / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    networks = open_checkpoint(diffusers_folder).networks
    assert torch.equal(networks["vae"].tensors["quant_conv.bias"], pipeline.vae.quant_conv.bias)


def test_old_and_prefixed_names(diffusers_folder, pipeline):
    """The VAE's attention as it was called once, and the GLM inside its language model."""
    vae = diffusers_folder / "vae" / "diffusion_pytorch_model.safetensors"
    glm = diffusers_folder / "text_encoder" / "model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(vae).items():
        for new_part, old_part in old.items():
            name = name.replace(f"attentions.0.{new_part}.", f"attentions.0.{old_part}.")
        renamed[name] = tensor
    save_file(renamed, vae)
    save_file({f"transformer.{name}": tensor for name, tensor in load_file(glm).items()}, glm)
    networks = open_checkpoint(diffusers_folder).networks
    expected = pipeline.vae.decoder.mid_block.attentions[0].to_out[0].weight
    assert torch.equal(networks["vae"].tensors["decoder.mid.attn.out.weight"], expected)
    assert torch.equal(networks["text_encoder"].tensors["lm_head.weight"], pipeline.text_encoder.output_layer.weight)


def test_plain_files_before_a_variant(diffusers_folder, shared_fp16):
    """Both present: the plain ones, unless the variant is asked for."""
    for name in ("text_encoder", "unet", "vae"):
        for path in (shared_fp16 / name).glob("*fp16*"):
            shutil.copy(path, diffusers_folder / name)
    marked = diffusers_folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(marked).items()}
    save_file(tensors, marked)
    assert open_checkpoint(diffusers_folder).networks["vae"].tensors["quant_conv.bias"].abs().sum() == 0
    assert open_checkpoint(diffusers_folder, "fp16").networks["vae"].tensors["quant_conv.bias"].abs().sum() > 0


def test_a_variant_that_is_not_there(shared_diffusers, shared_ours, unet_file):
    """Asked for and absent is an error; the other layouts have no variants."""
    expect(FileNotFoundError, shared_diffusers, "text_encoder", "'fp16'", variant="fp16")
    expect(ValueError, shared_ours, "'fp16'", variant="fp16")
    expect(ValueError, unet_file, "'fp16'", variant="fp16")


def test_the_kolors_teams_text_encoder_has_no_variant(kolors_folder):
    """Its .bin shards are taken whatever variant the other networks are asked for in."""
    for name in ("unet", "vae"):
        path = kolors_folder / name / "diffusion_pytorch_model.safetensors"
        path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert set(open_checkpoint(kolors_folder, "fp16").networks) == set(COUNTS)
    assert set(open_checkpoint(kolors_folder).networks) == set(COUNTS)


def test_what_does_not_disturb(diffusers_folder, edit_json):
    """An image encoder, adapters and other folders beside the networks."""
    edit_json(
        diffusers_folder / "model_index.json",
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    (diffusers_folder / "ip-adapter").mkdir()
    (diffusers_folder / "ip-adapter" / "ip_adapter.bin").write_bytes(b"garbage")
    assert set(open_checkpoint(diffusers_folder).networks) == set(COUNTS)


def test_without_a_model_index(diffusers_folder):
    """The folders say what there is."""
    (diffusers_folder / "model_index.json").unlink()
    checkpoint = open_checkpoint(diffusers_folder)
    assert set(checkpoint.networks) == set(COUNTS)
    assert checkpoint.force_zeros_for_empty_prompt is False


def test_a_name_that_is_not_utf8(shared_ours, tmp_path):
    """The library cannot open it, and says that the file is damaged."""
    try:
        (tmp_path / "a\udcff").mkdir()
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    for file in shared_ours.iterdir():
        shutil.copyfile(file, tmp_path / "a\udcff" / file.name)
    expect(ValueError, tmp_path / "a\udcff", "has a name that is not UTF-8")


def test_links_of_a_download_cache(diffusers_folder, tmp_path):
    """The hub keeps files under other names elsewhere and links to them."""
    path = diffusers_folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(tmp_path / "0123abcd")
    path.symlink_to(tmp_path / "0123abcd")
    assert len(open_checkpoint(diffusers_folder).networks["vae"].tensors) == COUNTS["vae"]


def test_no_checkpoint_at_all(tmp_path, shared_diffusers):
    """A missing folder, an empty one, a file of another kind, a single network's folder."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").touch()
    expect(FileNotFoundError, tmp_path / "nothing", "nothing does not exist")
    expect(ValueError, tmp_path / "empty", "empty is not a checkpoint", "model_index.json")
    expect(NotADirectoryError, tmp_path / "x.txt", "x.txt is a file")
    expect(NotADirectoryError, shared_diffusers / "model_index.json", "model_index.json is a file")
    expect(ValueError, shared_diffusers / "unet", "unet is not a checkpoint")


@pytest.mark.parametrize(
    ("changes", "mentioned"),
    [
        ({"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ({"_class_name": ...}, "None"),
        ({"_class_name": ["KolorsPipeline"]}, "KolorsPipeline"),
        ({"text_encoder": ["transformers", "CLIPTextModel"]}, "CLIPTextModel"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny"),
        ({"unet": ["diffusers", "SD3Transformer2DModel"]}, "SD3Transformer2DModel"),
        ({"tokenizer": ["transformers", "CLIPTokenizer"]}, "CLIPTokenizer"),
        ({"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "text_encoder_2"),
        ({"controlnet": ["diffusers", ["ControlNetModel"]]}, "controlnet"),
    ],
)
def test_other_pipelines_are_refused_by_name(diffusers_folder, edit_json, changes, mentioned):
    """The class of the pipeline and of every component counts."""
    edit_json(diffusers_folder / "model_index.json", **changes)
    expect(ValueError, diffusers_folder, "model_index.json", mentioned)


@pytest.mark.parametrize("name", ["KolorsImg2ImgPipeline", "KolorsPAGPipeline", "StableDiffusionXLPipeline"])
def test_other_pipelines_of_the_same_networks(diffusers_folder, edit_json, name):
    """The component classes are those of Kolors."""
    edit_json(diffusers_folder / "model_index.json", _class_name=name)
    assert set(open_checkpoint(diffusers_folder).networks) == set(COUNTS)


def test_a_component_that_is_null_is_absent(diffusers_folder, edit_json):
    """As diffusers writes it for a pipeline without a text encoder."""
    edit_json(diffusers_folder / "model_index.json", text_encoder=[None, None], scheduler=[None, None])
    checkpoint = open_checkpoint(diffusers_folder)
    assert set(checkpoint.networks) == {"unet", "vae"}
    assert checkpoint.scheduler is None


@pytest.mark.parametrize(
    "missing",
    [
        "vae",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_missing_parts(diffusers_folder, missing):
    """The message names the file or the folder."""
    path = diffusers_folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    expect(FileNotFoundError, diffusers_folder, missing.split("/diff")[0].split("/model")[0])


def test_a_file_in_the_place_of_a_folder(diffusers_folder):
    """And a folder in the place of a file."""
    shutil.rmtree(diffusers_folder / "vae")
    (diffusers_folder / "vae").touch()
    expect(FileNotFoundError, diffusers_folder, "vae does not exist or is not a folder")
    (diffusers_folder / "unet" / "config.json").unlink()
    (diffusers_folder / "unet" / "config.json").mkdir()
    expect(FileNotFoundError, diffusers_folder, "config.json does not exist or is not a file")


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", ["", "{'a': 1}", "[]", "null"])
def test_malformed_json(diffusers_folder, file, content):
    """Not JSON, or not an object."""
    (diffusers_folder / file).write_text(content)
    expect(ValueError, diffusers_folder, file)


def test_a_config_of_another_network(diffusers_folder, edit_json):
    """The field and the file are named."""
    edit_json(diffusers_folder / "unet" / "config.json", act_fn="gelu")
    expect(ValueError, diffusers_folder, "unet/config.json", "act_fn", "'gelu'", "'silu'")


def test_names_that_are_missing(diffusers_folder, ours_folder, edit_weights):
    """The count and the first one, as the file would spell it."""
    removed = ["conv_in.bias", "up_blocks.1.attentions.2.proj_in.weight"]
    path = diffusers_folder / "unet" / "diffusion_pytorch_model.safetensors"
    edit_weights(path, lambda tensors: [tensors.pop(name) for name in removed])
    expect(ValueError, diffusers_folder, "model.safetensors", "lacks 2 of its tensors", "'conv_in.bias'")
    edit_weights(ours_folder / "vae.safetensors", lambda tensors: tensors.pop("decoder.mid.attn.q.weight"))
    expect(ValueError, ours_folder, "vae.safetensors", "lacks 1 of its tensors", "'decoder.mid.attn.q.weight'")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "down_blocks.0.attentions.0.norm.weight"),
        ("unet/diffusion_pytorch_model.safetensors", "down_blocks.3.resnets.0.conv1.weight"),
        ("unet/diffusion_pytorch_model.safetensors", "unet.conv_in.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.mid_block.attentions.1.to_q.weight"),
        ("text_encoder/model.safetensors", "encoder.layers.3.mlp.dense_4h_to_h.weight"),
        ("text_encoder/model.safetensors", "encoder.layers.0.mlp.dense_4h_to_h.weight_scale"),
    ],
)
def test_names_that_do_not_belong(diffusers_folder, edit_weights, file, name):
    """Unknown to the table, or beyond the sizes in the config."""
    edit_weights(diffusers_folder / file, lambda tensors: tensors.update({name: torch.zeros(2)}))
    expect(ValueError, diffusers_folder, file, repr(name))


def test_one_tensor_under_two_names(diffusers_folder, edit_weights):
    """The old name and the new one."""
    old = "encoder.mid_block.attentions.0.query.weight"
    path = diffusers_folder / "vae" / "diffusion_pytorch_model.safetensors"
    edit_weights(path, lambda tensors: tensors.update({old: torch.zeros(16, 16)}))
    expect(ValueError, diffusers_folder, "twice", old)


def test_an_adapter_is_no_unet_file(tmp_path):
    """A LoRA, an empty file of tensors, our own names."""
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    expect(ValueError, tmp_path / "lora.safetensors", "lora.safetensors", "'unet.conv_in.lora_A.weight'")
    save_file({}, tmp_path / "empty.safetensors")
    expect(ValueError, tmp_path / "empty.safetensors", "empty.safetensors holds no tensors")


def test_damaged_weights_in_a_checkpoint(kolors_folder, ours_folder):
    """The shard, or our file, is named."""
    (kolors_folder / "text_encoder" / "pytorch_model-00003-of-00007.bin").write_bytes(b"garbage")
    expect(ValueError, kolors_folder, "pytorch_model-00003-of-00007.bin is refused")
    (ours_folder / "unet.safetensors").write_bytes(b"")
    expect(ValueError, ours_folder, "unet.safetensors is not a whole safetensors file")
    (ours_folder / "unet.safetensors").unlink()
    expect(FileNotFoundError, ours_folder, "unet.safetensors")


@pytest.mark.parametrize(
    ("changes", "mentioned"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version"),
        ({"unet": {"channels": [1]}}, "unet"),
        ({"vae": 3}, "vae"),
        ({"pipeline": 3}, "pipeline"),
        ({"pipeline": {"force_zeros_for_empty_prompt": "false"}}, "true or false"),
        ({"scheduler": "euler"}, "scheduler"),
        ({"unet": ..., "vae": ..., "text_encoder": ...}, "no network"),
    ],
)
def test_our_own_index_is_checked(ours_folder, edit_json, changes, mentioned):
    """kolors-ref.json is read as strictly as the official files."""
    edit_json(ours_folder / "kolors-ref.json", **changes)
    expect(ValueError, ours_folder, "kolors-ref.json", mentioned)


def test_our_own_index_holds_our_fields(shared_ours):
    """What the loader builds the networks from."""
    index = json.loads((shared_ours / "kolors-ref.json").read_text())
    assert list(index) == ["format", "version", "text_encoder", "unet", "vae", "scheduler", "pipeline"]
    assert (index["format"], index["version"]) == ("kolors-ref", 1)
    assert index["unet"]["pooled_dim"] == 32
    assert index["scheduler"]["_class_name"] == "EulerDiscreteScheduler"
    assert index["pipeline"] == {"force_zeros_for_empty_prompt": True}
