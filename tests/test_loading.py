"""Checkpoints to pipelines: every layout, without a copy of the weights; and one line for each way to be broken."""

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import updates

from kolors_ref import KolorsPipeline, cli, lora
from kolors_ref.sampling import DPMSolverPP, Euler
from weights_conversion import convert
from weights_conversion.files import FLOATS, check_numbers

NETWORKS = ("text_encoder", "unet", "vae")
WEIGHTS = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


def draw(pipe, prompt="a cat", **options):
    """A tiny picture as a tensor, always from the same noise."""
    noise = torch.Generator().manual_seed(0)
    sizes = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    return pipe(prompt, generator=noise, **{**sizes, **options})


def write(path, content):
    """Writes a file in the place of a link to a shared one."""
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def edit_json(path, **changes):
    fields = {**json.loads(path.read_text()), **changes}
    write(path, {name: value for name, value in fields.items() if value is not ...})


def edit_weights(path, function):
    tensors = load_file(path)
    function(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def shard(folder, kind):
    """Splits the weights of a folder in two files with an index; kind: "safetensors" or "bin"."""
    source = next(folder.glob("*.safetensors"))
    stem = source.name.removesuffix(".safetensors") if kind == "safetensors" else "pytorch_model"
    tensors, weight_map = load_file(source), {}
    source.unlink()
    for number in (1, 2):
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % 2 == number - 1}
        file = f"{stem}-{number:05d}-of-00002.{kind}"
        torch.save(part, folder / file) if kind == "bin" else save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{kind}.index.json"
    write(index, {"metadata": {}, "weight_map": weight_map})
    return index


def layout(name, source, folder):
    """The small checkpoint in another layout."""
    if name == "ours":
        convert(source, folder)
        return folder
    shutil.copytree(source, folder, copy_function=os.link)
    if name == "sharded":
        shard(folder / "unet", "safetensors")
    elif name == "kolors":
        shard(folder / "text_encoder", "bin")
        shutil.move(folder / "tokenizer" / "tokenizer.model", folder / "text_encoder")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc/self/maps")
@pytest.mark.parametrize("name", ["diffusers", "sharded", "kolors", "ours"])
def test_every_layout_is_the_same_pipeline_without_a_copy(small_checkpoint, small_pipe, tmp_path, name):
    """The text encoder's and the UNet's numbers lie in the files' own mappings, and are the same bit for bit.

    Only convolutions have copies of theirs, laid out channels-last.
    The pictures differ by rounding: a matrix times a single row is summed in an order that hangs on its address.
    """
    folder = layout(name, small_checkpoint, tmp_path / "other")
    pipe = KolorsPipeline.from_pretrained(str(folder))
    mappings = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            mappings.append([int(address, 16) for address in line.split()[0].split("-")])
    for network in ("text_encoder", "unet"):
        for key, parameter in getattr(pipe, network).state_dict().items():
            mapped = any(low <= parameter.data_ptr() < high for low, high in mappings)
            assert mapped != (parameter.ndim == 4), (network, key)
            assert parameter.ndim != 4 or parameter.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(parameter, getattr(small_pipe, network).state_dict()[key])
    assert torch.allclose(draw(pipe), draw(small_pipe), rtol=0, atol=1e-5)
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in pipe.unet.parameters())
    assert not any(getattr(pipe, network).training for network in NETWORKS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_autoencoders_layout(small_checkpoint, dtype):
    """In fp32 on a CPU group norm loses digits channels-last, in bf16 convolutions are several times slower without."""
    vae, formats = KolorsPipeline.from_pretrained(small_checkpoint, dtype=dtype).vae, []
    for part in (vae.encoder.mid, vae.decoder.mid):
        part.register_forward_pre_hook(
            lambda _, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
    vae.encode(torch.zeros(1, 3, 64, 64, dtype=dtype))
    vae.decode(torch.zeros(1, 4, 8, 8, dtype=dtype))
    assert formats == [dtype == torch.bfloat16] * 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_compiled_blocks_draw_the_same_picture(small_checkpoint, small_pipe):
    """One graph for the transformer blocks of each of the two resolutions; weights keep their names."""
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    pipe = KolorsPipeline.from_pretrained(small_checkpoint, compile=True)
    assert torch.allclose(draw(pipe), draw(small_pipe), rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - counted == 2
    assert list(pipe.unet.state_dict()) == list(small_pipe.unet.state_dict())


def test_many_kinds_of_call_are_all_compiled(monkeypatch):
    """Each has graphs of its own; torch keeps 8, and would then compile nothing more, with only a line in the log."""
    torch._dynamo.reset()
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile(module, backend="eager"))
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    options = {"prompt": "a cat", "num_inference_steps": 1, "output_type": "np", "height": 64, "width": 64}
    long, several, free = {"prompt": "a cat " * 40}, {"num_images_per_prompt": 2}, {"guidance_scale": 1.0}
    with torch._dynamo.config.patch(recompile_limit=8):
        pipe = KolorsPipeline.from_pretrained("mini", torch.bfloat16, compile=True)
        for kind in ({}, several, free, {"width": 96}, long, several | free, long | free):
            pipe(**{**options, **kind})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - counted > 8


def test_compiled_blocks_notice_a_lora_that_comes_later(small_checkpoint, monkeypatch):
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile(module, backend="eager"))
    pipes = [KolorsPipeline.from_pretrained(small_checkpoint, compile=compiled) for compiled in (True, False)]
    plain = [draw(pipe) for pipe in pipes]
    assert torch.allclose(*plain, rtol=0, atol=1e-5)
    for pipe in pipes:
        lora.attach(pipe.unet, updates(pipe.unet, {"down.1.attn.0.blocks.0.self_attn.q": 4}), "style", 1.0)
    with_lora = [draw(pipe) for pipe in pipes]
    assert torch.allclose(*with_lora, rtol=0, atol=1e-5)
    assert (with_lora[0] - plain[0]).abs().max() > 1e-3
    lora.detach(pipes[0].unet, "style")
    assert torch.equal(draw(pipes[0]), plain[0])


def test_compiling_does_not_go_with_offload(small_checkpoint):
    with pytest.raises(ValueError, match="offload='stream'"):
        KolorsPipeline.from_pretrained(small_checkpoint, offload="stream", compile=True)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc/self/status")
def test_memory_while_loading(checkpoint_copy):
    """100 MB of weights cost no memory of the process's own; cast to half, they cost half."""

    def grow(tensors):
        for name in ("transformer.embedding.word_embeddings.weight", "embedding.word_embeddings.weight"):
            if name in tensors:
                tensors[name] = torch.cat([tensors[name]] * 24)

    edit_weights(checkpoint_copy / WEIGHTS["text_encoder"], grow)
    edit_json(checkpoint_copy / "text_encoder" / "config.json", padded_vocab_size=65024 * 24)
    code = f"""
import re
import torch
from kolors_ref import KolorsPipeline
from kolors_ref.loading import load_network
from weights_conversion import open_checkpoint

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

network = open_checkpoint({str(checkpoint_copy)!r}).networks["text_encoder"]
load_network(network, torch.float32, "cpu")  # once before, for what torch imports by then
for dtype in (torch.float32, torch.bfloat16):
    before = own()
    module = load_network(network, dtype, "cpu")
    size = sum(p.numel() * p.element_size() for p in module.parameters()) / 2**20
    print(size, own() - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    (size, growth), (half_size, half_growth) = [map(float, line.split()) for line in run.stdout.splitlines()]
    assert size > 90
    assert growth < 10
    assert half_size == size / 2
    assert half_growth < half_size + 10


def test_the_compiler_is_left_alone(small_checkpoint):
    """Building, loading and drawing do not import torch's compiler, which takes longer than they do."""
    code = f"""
import sys
from kolors_ref import KolorsPipeline
from kolors_ref.config import CLIPVisionConfig, IPAdapterConfig
from kolors_ref.models.clip import CLIPVision
from kolors_ref.models.ip_adapter import IPAdapter
from kolors_ref.unfilled import unfilled

with unfilled():
    networks = CLIPVision(CLIPVisionConfig()), IPAdapter(IPAdapterConfig())
assert all(parameter.is_meta for network in networks for parameter in network.parameters())
for offload in ("none", "stream"):
    pipe = KolorsPipeline.from_pretrained({str(small_checkpoint)!r}, offload=offload)
    pipe("a red circle", height=32, width=32, num_inference_steps=1)
print("torch._dynamo" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout == "False\n"


def test_a_unet_file_over_a_base(small_checkpoint, small_pipe, tmp_path):
    """Only the UNet is another one; a whole checkpoint is taken as well as a single file."""
    folder = layout("diffusers", small_checkpoint, tmp_path / "other")

    def scale(tensors):
        tensors["conv_out.weight"] *= 0.5

    edit_weights(folder / WEIGHTS["unet"], scale)
    single = Path(shutil.move(folder / WEIGHTS["unet"], tmp_path / "fine-tune.safetensors"))
    pipe = KolorsPipeline.from_pretrained(small_checkpoint, unet=single)
    assert torch.equal(pipe.unet.conv_out.weight, small_pipe.unet.conv_out.weight * 0.5)
    assert torch.equal(pipe.vae.decoder.conv_in.weight, small_pipe.vae.decoder.conv_in.weight)
    shutil.copy(single, folder / WEIGHTS["unet"])
    whole = KolorsPipeline.from_pretrained(small_checkpoint, unet=folder)
    assert torch.equal(draw(whole), draw(pipe))
    assert not torch.equal(draw(pipe), draw(small_pipe))


def test_the_index_says_which_scheduler(checkpoint_copy):
    """As diffusers reads it: the class in model_index.json, the fields in scheduler_config.json."""
    edit_json(checkpoint_copy / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    edit_json(checkpoint_copy / "scheduler" / "scheduler_config.json", use_karras_sigmas=True)
    assert KolorsPipeline.from_pretrained(checkpoint_copy).sampler == DPMSolverPP(karras=True)
    edit_json(checkpoint_copy / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    edit_json(checkpoint_copy / "scheduler" / "scheduler_config.json", _class_name="DPMSolverMultistepScheduler")
    assert KolorsPipeline.from_pretrained(checkpoint_copy).sampler == Euler(karras=True)


@pytest.mark.parametrize("force_zeros", [False, True])
def test_what_no_negative_prompt_stands_for(checkpoint_copy, force_zeros):
    """Zeros or "", as model_index.json says; "" itself is always encoded."""
    edit_json(checkpoint_copy / "model_index.json", force_zeros_for_empty_prompt=force_zeros)
    pipe = KolorsPipeline.from_pretrained(checkpoint_copy)
    embeds = pipe.encode_prompt("")
    zeros = type(embeds)(embeds.sequence * 0, embeds.pooled * 0)
    with_zeros = draw(pipe, negative_prompt=None, negative_prompt_embeds=zeros)
    expected = with_zeros if force_zeros else draw(pipe, negative_prompt="")
    assert torch.allclose(draw(pipe, negative_prompt=None), expected, atol=1e-5)
    assert not torch.allclose(with_zeros, draw(pipe, negative_prompt=""), atol=1e-3)


def test_the_guidance_that_a_checkpoint_asks_for(checkpoint_copy, tmp_path):
    """Kolors' own if it does not say, as none of diffusers does; ours may, and conversion keeps it both ways."""
    assert KolorsPipeline.from_pretrained(checkpoint_copy).guidance_scale == 6.5
    convert(checkpoint_copy, tmp_path / "ours")
    assert "guidance_scale" not in json.loads((tmp_path / "ours" / "kolors-ref.json").read_text())["pipeline"]
    edit_json(tmp_path / "ours" / "kolors-ref.json", pipeline={"guidance_scale": 2.0})
    convert(tmp_path / "ours", tmp_path / "theirs", "diffusers")
    convert(tmp_path / "theirs", tmp_path / "again")
    for folder in ("theirs", "again"):
        pipe = KolorsPipeline.from_pretrained(tmp_path / folder)
        assert torch.equal(draw(pipe), draw(pipe, guidance_scale=2.0))
        assert not torch.allclose(draw(pipe), draw(pipe, guidance_scale=6.5), atol=1e-3)
    for wrong in ("2", True, math.inf, -math.inf, math.nan, 10**400, [2]):
        edit_json(tmp_path / "again" / "kolors-ref.json", pipeline={"guidance_scale": wrong})
        with pytest.raises(ValueError, match=r"pipeline: guidance_scale is .*, and a number is needed\.$"):
            KolorsPipeline.from_pretrained(tmp_path / "again")


# ---------------------------------------------------------------------------------------------------------------------
# Number formats
# ---------------------------------------------------------------------------------------------------------------------


def dtypes(pipe):
    return [
        {parameter.dtype for parameter in getattr(pipe, network).parameters()} for network in (*NETWORKS[:2], "vae")
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_asked_for_format(small_checkpoint, small_pipe, dtype):
    """The autoencoder stays in fp32 where fp16 is asked for, and the picture is about the same."""
    pipe = KolorsPipeline.from_pretrained(small_checkpoint, dtype=dtype)
    assert pipe.dtype == dtype
    assert dtypes(pipe) == [{dtype}, {dtype}, {torch.float32 if dtype == torch.float16 else dtype}]
    assert torch.equal(pipe.unet.conv_in.weight, small_pipe.unet.conv_in.weight.to(dtype))
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = (draw(pipe, latents=latents).double() - draw(small_pipe, latents=latents).double()).abs().mean()
    assert error < {torch.float64: 1e-5, torch.float32: 1e-12, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]


# ---------------------------------------------------------------------------------------------------------------------
# Broken checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class Code:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def tensors_to(network, function):
    return lambda folder: edit_weights(folder / WEIGHTS[network], function)


def cut(file, length):
    return lambda folder: write(folder / file, (folder / file).read_bytes()[:length])


def set_value(name, value):
    def change(tensors):
        tensors[name].view(-1)[-1] = value

    return change


def missing_shard(folder):
    shard(folder / "unet", "safetensors")
    next((folder / "unet").glob("*-00002-of-*")).unlink()


def outside(folder):
    index = shard(folder / "text_encoder", "bin")
    fields = json.loads(index.read_text())
    fields["weight_map"] = dict.fromkeys(fields["weight_map"], "../../secret.bin")
    write(index, fields)


def pickle_with_code(folder):
    index = shard(folder / "text_encoder", "bin")
    file = next(index.parent.glob("*-00001-of-*"))
    torch.save({"a": Code()}, file)
    write(file, file.read_bytes())


def plain_pickle(folder):
    shard(folder / "text_encoder", "bin")
    write(next((folder / "text_encoder").glob("*-00001-of-*")), pickle.dumps(Code()))


BROKEN = {
    "no folder": (shutil.rmtree, "does not exist"),
    "empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "is not a checkpoint"),
    "no unet": (lambda folder: shutil.rmtree(folder / "unet"), "unet does not exist"),
    "no vae in the index": (lambda folder: edit_json(folder / "model_index.json", vae=[None, None]), "no vae"),
    "no scheduler in the index": (lambda f: edit_json(f / "model_index.json", scheduler=[None, None]), "no scheduler"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "no tokenizer"),
    "no weights": (lambda folder: (folder / WEIGHTS["vae"]).unlink(), "has no weights file"),
    "other pipeline": (lambda f: edit_json(f / "model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
    "other scheduler": (lambda f: edit_json(f / "model_index.json", scheduler=["x", "FlowMatch"]), "FlowMatch"),
    "index not json": (lambda folder: write(folder / "model_index.json", b"{"), "not JSON"),
    "index a list": (lambda folder: write(folder / "model_index.json", []), "object is needed"),
    "cut in the header": (cut(WEIGHTS["unet"], 100), "not a whole safetensors file"),
    "cut in the data": (cut(WEIGHTS["unet"], -1), "not a whole safetensors file"),
    "empty file": (cut(WEIGHTS["text_encoder"], 0), "not a whole safetensors file"),
    "zeros": (lambda folder: write(folder / WEIGHTS["vae"], bytes(10_000)), "not a whole safetensors file"),
    "missing shard": (missing_shard, "00002-of-00002.safetensors, which does not exist"),
    "outside the folder": (outside, "only a file of the same folder is allowed"),
    "code in a pickle": (pickle_with_code, "other than tensors"),
    "plain pickle": (plain_pickle, "is refused"),
    "missing key": (tensors_to("unet", lambda tensors: tensors.pop("conv_in.bias")), "'conv_in.bias'"),
    "extra key": (tensors_to("vae", lambda tensors: tensors.update(more=torch.ones(1))), "'more'"),
    "wrong shape": (
        tensors_to("unet", lambda tensors: tensors.update({"conv_in.bias": torch.ones(17)})),
        "conv_in.bias has shape (17,) in the file, but its config asks for (16,)",
    ),
    "no numbers": (tensors_to("unet", lambda t: t.update({"conv_in.bias": torch.ones(0)})), "has shape (0,)"),
    "nan": (tensors_to("unet", set_value("conv_in.weight", torch.nan)), "conv_in.weight holds NaN or infinity"),
    "infinity": (tensors_to("vae", set_value("decoder.conv_in.bias", -torch.inf)), "holds NaN or infinity"),
    "whole numbers": (
        tensors_to("unet", lambda tensors: tensors.update({"conv_out.bias": torch.ones(4, dtype=torch.int8)})),
        "conv_out.bias is of the format int8",
    ),
    "8-bit floats": (
        tensors_to("unet", lambda t: t.update({"conv_in.weight": t["conv_in.weight"].to(torch.float8_e4m3fn)})),
        "conv_in.weight is of the format float8_e4m3fn",
    ),
    "complex numbers": (
        tensors_to("vae", lambda tensors: tensors.update({"decoder.conv_in.bias": torch.ones(24) * 1j})),
        "decoder.conv_in.bias is of the format complex64",
    ),
    "groups": (
        lambda f: edit_json(f / "unet" / "config.json", norm_num_groups=7),
        "the unet cannot be built with the sizes in its config",
    ),
    "heads": (lambda f: edit_json(f / "unet" / "config.json", attention_head_dim=[2, 5, 4]), "num_heads is 5"),
    "key groups": (lambda f: edit_json(f / "text_encoder" / "config.json", num_attention_heads=3), "num_kv_groups"),
    "more layers": (lambda f: edit_json(f / "text_encoder" / "config.json", num_layers=90), "is incomplete"),
    "many layers": (lambda f: edit_json(f / "text_encoder" / "config.json", num_layers=10**12), "more than 100"),
    "wide layers": (lambda f: edit_json(f / "text_encoder" / "config.json", ffn_hidden_size=10**30), "config"),
    "huge layers": (lambda f: edit_json(f / "text_encoder" / "config.json", ffn_hidden_size=2**60), "config"),
    "tokenizer": (lambda f: write(f / "tokenizer" / "tokenizer.model", b"nonsense"), "not a SentencePiece model"),
    "empty tokenizer": (lambda f: write(f / "tokenizer" / "tokenizer.model", b""), "not a SentencePiece model"),
    "betas": (lambda f: edit_json(f / "scheduler" / "scheduler_config.json", beta_end="x"), "beta_end"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_checkpoints(checkpoint_copy, tmp_path, monkeypatch, capsys, how):
    """One line and exit status 2 from the command line, and nothing written."""
    breaking, mentions = BROKEN[how]
    breaking(checkpoint_copy)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert cli.main(["a cat", "--model", str(checkpoint_copy), "--steps", "1", "--seed", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"kolors-ref: error: [^\n]+\n", err)
    assert mentions in err
    assert os.listdir(here) == []


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_damaged_numbers(dtype):
    """Wherever NaN or infinity stands it is found; numbers as large as the format holds are no damage."""
    largest = torch.full((3, 700), torch.finfo(dtype).max, dtype=dtype)
    assert not largest.sum().isfinite()
    for intact in (largest, -largest, torch.ones(3, 700, dtype=dtype), torch.ones(0, dtype=dtype)):
        check_numbers(intact, "it")
    for start in (largest, torch.ones(3, 700, dtype=dtype)):
        for where in (0, 1000, -1):
            for values in ((math.nan,), (math.inf,), (-math.inf,), (math.inf, -math.inf)):
                damaged = start.clone()
                for offset, value in enumerate(values):
                    damaged.view(-1)[where - offset] = value
                with pytest.raises(ValueError, match="it holds NaN or infinity in the file"):
                    check_numbers(damaged, "it")


def small_vocabulary(folder):
    edit_json(folder / "text_encoder" / "config.json", padded_vocab_size=1000)

    def cut_rows(tensors):
        for name, tensor in tensors.items():
            if len(tensor) == 65024:
                tensors[name] = tensor[:1000].clone()

    edit_weights(folder / WEIGHTS["text_encoder"], cut_rows)


def other_text_size(folder):
    edit_json(folder / "unet" / "config.json", encoder_hid_dim=24)

    def widen(tensors):
        tensors["encoder_hid_proj.weight"] = torch.ones(48, 24)

    edit_weights(folder / WEIGHTS["unet"], widen)


def other_pooled_size(folder):
    edit_json(folder / "unet" / "config.json", projection_class_embeddings_input_dim=24 + 6 * 8)

    def widen(tensors):
        tensors["add_embedding.linear_1.weight"] = torch.ones(len(tensors["add_embedding.linear_1.bias"]), 24 + 6 * 8)

    edit_weights(folder / WEIGHTS["unet"], widen)


def other_latents(folder):
    edit_json(folder / "unet" / "config.json", in_channels=8)

    def widen(tensors):
        tensors["conv_in.weight"] = torch.ones(16, 8, 3, 3)

    edit_weights(folder / WEIGHTS["unet"], widen)


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        (small_vocabulary, ["tokenizer", "vocabulary", "1000"]),
        (other_text_size, ["unet", "text encoder", "24", "16"]),
        (other_pooled_size, ["unet", "text encoder", "24", "16"]),
        (other_latents, ["unet", "vae", "8", "4"]),
    ],
)
def test_parts_that_do_not_fit_each_other(checkpoint_copy, change, mentions):
    change(checkpoint_copy)
    with pytest.raises(ValueError, match=mentions[0]) as caught:
        KolorsPipeline.from_pretrained(checkpoint_copy)
    assert all(word in str(caught.value) for word in mentions), caught.value


@pytest.mark.parametrize(
    ("options", "error", "mentions"),
    [
        ({"dtype": "float16"}, ValueError, "torch.float16"),
        ({"dtype": torch.int8}, ValueError, "torch.int8"),
        ({"device": "nonsense"}, ValueError, "'nonsense' cannot be used"),
        ({"device": "meta"}, ValueError, "'meta' cannot be used"),
        ({"device": "hpu"}, ValueError, "'hpu' cannot be used"),
        ({"variant": "fp8"}, FileNotFoundError, "'fp8'"),
        ({"unet": "missing.safetensors"}, FileNotFoundError, "missing.safetensors"),
        ({"path": None}, TypeError, "NoneType"),
    ],
)
def test_wrong_arguments(small_checkpoint, options, error, mentions):
    with pytest.raises(error) as caught:
        KolorsPipeline.from_pretrained(**{"path": small_checkpoint, **options})
    assert mentions in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unet_files_that_do_not_fit(small_checkpoint, tmp_path):
    tensors = load_file(small_checkpoint / WEIGHTS["unet"])
    file = tmp_path / "fine-tune.safetensors"

    def expect(changed, mentions):
        save_file(changed, file)
        with pytest.raises(ValueError, match=re.escape(mentions)):
            KolorsPipeline.from_pretrained(small_checkpoint, unet=file)

    expect({**tensors, "conv_in.bias": torch.ones(3)}, "conv_in.bias has shape (3,)")
    expect({name: tensor for name, tensor in tensors.items() if name != "conv_in.bias"}, "not a whole UNet")
    expect({**tensors, "conv_out.bias": tensors["conv_out.bias"] * torch.nan}, "holds NaN")
    expect({**tensors, "nonsense": torch.ones(3)}, "'nonsense'")
    save_file(tensors, file)
    with pytest.raises(ValueError, match="holds a UNet alone"):
        KolorsPipeline.from_pretrained(file)
