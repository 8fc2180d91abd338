"""Networks that rest in their file: the same pictures in every mode, what is in memory when, and what is refused."""

import contextlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_image_prompts import ENCODER, randomised
from test_loading import NETWORKS, WEIGHTS, draw, edit_weights
from test_lora import updates

from kolors_ref import KolorsPipeline, loading, lora, offload
from kolors_ref.config import GLMConfig, IPAdapterConfig, UNetConfig
from kolors_ref.image_prompts import Adapter
from kolors_ref.ip_adapter_file import cross_attention_channels
from kolors_ref.models.clip import CLIPVision
from kolors_ref.models.glm import GLMEncoder
from kolors_ref.models.ip_adapter import IPAdapter
from kolors_ref.models.unet import UNet

MODES = ("model", "stream")
HALF = 100_000
"""Bytes, about half of what each of the small networks takes in 16 bits."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


@pytest.fixture(params=["model", "stream", "pinned stream", "half pinned stream"])
def carrier(request, monkeypatch):
    """A mode of offloading on a CPU: its name; the way of CUDA with a stand-in for CUDA's streams and events."""
    if "pinned" in request.param:
        pretend_cuda(monkeypatch, HALF if "half" in request.param else 0)
    return request.param.split()[-1]


class PretendStream:
    """A stream that knows what it waits for; `current` is the one that work is given to."""

    current = None

    def __init__(self, *args):
        self.awaits = None

    def wait_event(self, event):
        event.awaited_by = self

    def wait_stream(self, other):
        self.awaits = other


class PretendEvent:
    """What an event marks, and where: it may be going on still, a stream waits for it, it has yet to be marked."""

    pending = due = False
    stream = awaited_by = None

    def record(self, stream=None):
        self.stream = stream or PretendStream.current
        self.pending, self.awaited_by, self.due = True, None, False

    def synchronize(self):
        self.pending = False


@contextlib.contextmanager
def on_stream(stream):
    """Gives work to another stream for a while."""
    before, PretendStream.current = PretendStream.current, stream
    try:
        yield
    finally:
        PretendStream.current = before


def pretend_cuda(monkeypatch, capacity=0):
    """Lets "stream" stream on a CPU as it does on CUDA, one thing after the other; `capacity` bytes may stay.

    A buffer must not be written before it is known that nobody reads it, nor read before it is known to be written: the
    computing stream must have marked the one, and wait for another to have done the other.
    """
    empty, make, views = torch.empty, offload.make_carrier, offload.Slot.views

    def checked_views(slot, memory, unit):
        if memory is slot.buffer:
            assert slot.copied.awaited_by is computing
            assert slot.copied.stream not in (None, computing)
            assert not slot.copied.due
            slot.used.due = True
        else:
            assert not any((slot.copied.pending, slot.used.pending, slot.used.due))
            assert slot.used.stream in (None, computing)
            slot.copied.due = True
        return views(slot, memory, unit)

    monkeypatch.setattr(offload.Slot, "views", checked_views)
    monkeypatch.setattr(offload, "SMALL", 10_000)
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    monkeypatch.setattr(torch.cuda, "Event", PretendEvent)
    monkeypatch.setattr(torch.cuda, "Stream", PretendStream)
    computing = PretendStream()
    monkeypatch.setattr(PretendStream, "current", computing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: PretendStream.current)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    pinned = lambda mode, device: offload.PinnedStream(device, capacity) if mode == "stream" else make(mode, device)
    monkeypatch.setattr(loading, "make_carrier", pinned)


def in_half(folder):
    """Casts all weights of a checkpoint to fp16."""
    for path in WEIGHTS.values():
        edit_weights(folder / path, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    return folder


def units(network):
    """The parameters of each unit."""
    return [list(unit.values()) for unit in offload.parameters_by_unit(network).values()]


def present(units):
    """The bytes of each unit whose weights are there."""
    own = lambda parameter: parameter.untyped_storage().nbytes() if any(parameter.stride()) else 0
    return [size for unit in units if (size := sum(map(own, unit)))]


def unit_sizes(network):
    return [sum(p.numel() * p.element_size() for p in unit) for unit in units(network)]


@contextlib.contextmanager
def watched(pipe):
    """Gives a list that grows by what is present of the text encoder and of the UNet whenever a layer has computed."""
    seen, glm, unet = [], units(pipe.text_encoder), units(pipe.unet)
    look = lambda layer, *args: seen.append((present(glm), present(unet))) if layer._parameters else None
    handle = torch.nn.modules.module.register_module_forward_hook(look)
    yield seen
    handle.remove()


# ---------------------------------------------------------------------------------------------------------------------
# The same pictures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_pictures(checkpoint_copy, carrier, dtype):
    """From text, without guidance, from a picture; twice, for the second run finds other traces than the first.

    From fp16 files, since copies of weights used in place have other addresses, and CPU kernels may round otherwise.
    """
    in_half(checkpoint_copy)
    pipe = KolorsPipeline.from_pretrained(checkpoint_copy, dtype=dtype, offload=carrier)
    resident = KolorsPipeline.from_pretrained(checkpoint_copy, dtype=dtype)
    assert (pipe.dtype, pipe.device) == (resident.dtype, resident.device)
    for options in (
        {},
        {"prompt": ["a red cat", "一座灯塔"], "guidance_scale": 1.0},
        {"image": Image.effect_noise((32, 32), 60), "sampler": "heun"},
    ) * 2:
        expected = draw(resident, **options)
        assert expected.isfinite().all()
        assert torch.equal(draw(pipe, **options), expected)
    official, ours = (p.encode_prompt(["a cat", ""]) for p in (resident, pipe))
    assert torch.equal(ours.sequence, official.sequence)
    assert torch.equal(ours.pooled, official.pooled)
    with torch.inference_mode():
        assert torch.equal(draw(pipe), draw(resident))


def test_what_comes_in_inference_mode_serves_outside_of_it(checkpoint_copy, carrier):
    """In either order, though tensors made in that mode can neither be written nor recorded outside of it."""
    in_half(checkpoint_copy)
    pipe = KolorsPipeline.from_pretrained(checkpoint_copy, torch.float32, offload=carrier)
    resident = KolorsPipeline.from_pretrained(checkpoint_copy, torch.float32)
    expected = draw(resident)
    with torch.inference_mode():
        assert torch.equal(draw(pipe), expected)
        pipe.encode_prompt("a cat")
    assert torch.equal(pipe.encode_prompt("a cat").sequence, resident.encode_prompt("a cat").sequence)
    assert torch.equal(draw(pipe), expected)


def test_an_interrupted_copy_is_done_again(checkpoint_copy, monkeypatch):
    """A buffer whose copying was broken off does not pass for the weights that it should have got."""
    pretend_cuda(monkeypatch)
    in_half(checkpoint_copy)
    pipe = KolorsPipeline.from_pretrained(checkpoint_copy, torch.float32, offload="stream")
    expected = pipe.encode_prompt("a cat").sequence

    def interrupt(stream):
        raise KeyboardInterrupt

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "stream", interrupt)
            with pytest.raises(KeyboardInterrupt):
                pipe.encode_prompt("a cat")
        assert torch.equal(pipe.encode_prompt("a cat").sequence, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_files(checkpoint_copy, mode, device):
    """fp16 in the file, computed in bfloat16: cast as it comes."""
    in_half(checkpoint_copy)
    resident, pipe = (
        KolorsPipeline.from_pretrained(checkpoint_copy, torch.bfloat16, device, offload=name) for name in ("none", mode)
    )
    assert pipe.dtype == torch.bfloat16
    assert torch.equal(draw(pipe), draw(resident))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_image_prompts_and_loras(small_checkpoint, mode, device):
    """Both work without the weights being there; a LoRA may sit on any layer, a unit of its own or not."""
    pipes = [KolorsPipeline.from_pretrained(small_checkpoint, device=device, offload=name) for name in ("none", mode)]
    layers = ["conv_in", "down.0.downsample", "down.1.attn.0.blocks.0.cross_attn.k", "mid.res.0.conv1", "text_proj"]
    config = pipes[0].unet.config
    for pipe in pipes:
        torch.manual_seed(0)
        channels, dim = cross_attention_channels(config), config.cross_attention_dim
        sizes = IPAdapterConfig(ENCODER.width, 32, 1, 1, num_queries=3, ffn=48, output_dim=dim, channels=channels)
        adapter, encoder = randomised(IPAdapter(sizes)), randomised(CLIPVision(ENCODER))
        pipe.ip_adapters["style"] = Adapter(adapter.to(device), encoder.to(device), Path())
    plain = draw(pipes[0])
    for picture in ({}, {"ip_adapter_image": Image.effect_noise((30, 30), 60)}):
        expected, ours = (draw(pipe, **picture) for pipe in pipes)
        assert torch.equal(ours, expected)
        assert torch.equal(expected, plain) == (not picture)
    for pipe in pipes:
        lora.attach(pipe.unet, updates(pipe.unet, dict.fromkeys(layers, 2)), "a")
        lora.attach(pipe.text_encoder, updates(pipe.text_encoder, {"layers.0.attn.qkv": 2}), "a")
    expected, ours = (draw(pipe, **picture) for pipe in pipes)
    assert torch.equal(ours, expected)
    assert not torch.equal(expected, plain)
    for pipe in pipes:
        pipe.unload_lora()
    assert torch.equal(draw(pipes[1]), plain)


def test_calls_that_are_mixed(checkpoint_copy, carrier):
    """A loop that is interrupted by an encoding and by another loop goes on as if nothing had happened."""
    pipe, resident = (
        KolorsPipeline.from_pretrained(in_half(checkpoint_copy), torch.float32, offload=name)
        for name in (carrier, "none")
    )
    start = lambda pipe: pipe.denoise(
        "a cat", height=32, width=32, num_inference_steps=3, generator=torch.Generator().manual_seed(0)
    )
    expected = [step.latents for step in start(resident)]
    for step, latents in zip(start(pipe), expected, strict=True):
        assert torch.equal(step.latents, latents)
        next(iter(start(pipe)))
        pipe.encode_prompt("a dog")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("capacity", [0, HALF, offload.KEPT])
def test_the_same_pictures_on_cuda(small_checkpoint, monkeypatch, capacity, dtype, mode):
    """Several times, for copies and computation to overlap in many ways."""
    monkeypatch.setattr(offload, "KEPT", capacity)
    monkeypatch.setattr(offload, "SMALL", 10_000)
    resident, pipe = (
        KolorsPipeline.from_pretrained(small_checkpoint, dtype, "cuda", offload=name) for name in ("none", mode)
    )
    expected = draw(resident, num_inference_steps=10)
    for _ in range(10):
        assert torch.equal(draw(pipe, num_inference_steps=10), expected)


# ---------------------------------------------------------------------------------------------------------------------
# What is in memory
# ---------------------------------------------------------------------------------------------------------------------


def test_a_stream_holds_one_unit(checkpoint_copy):
    """Of weights that must be cast, those of the unit that computes are there, and nothing before and after."""
    pipe = KolorsPipeline.from_pretrained(in_half(checkpoint_copy), torch.bfloat16, offload="stream")
    everything = units(pipe.text_encoder) + units(pipe.unet)
    assert present(everything) == []
    with watched(pipe) as seen:
        draw(pipe, num_inference_steps=1)
    assert present(everything) == []
    assert max(len(glm) + len(unet) for glm, unet in seen) == 1
    assert {size for glm, _ in seen for size in glm} == set(unit_sizes(pipe.text_encoder))
    assert {size for _, unet in seen for size in unet} == set(unit_sizes(pipe.unet))
    assert len(unit_sizes(pipe.text_encoder)) == 1 + pipe.text_encoder.config.num_layers
    assert max(unit_sizes(pipe.unet)) < sum(unit_sizes(pipe.unet)) / 8


def test_a_pinned_stream_holds_two_units(checkpoint_copy, monkeypatch):
    """Two slots of the largest unit's size; once the order is known, every unit is there before it is asked for."""
    pretend_cuda(monkeypatch)
    carrier = offload.PinnedStream(torch.device("cpu"), 0)
    monkeypatch.setattr(loading, "make_carrier", lambda mode, device: carrier)
    pipe = KolorsPipeline.from_pretrained(in_half(checkpoint_copy), torch.bfloat16, offload="stream")
    late, before, after = [], carrier.before, carrier.after

    def checked_before(unit):
        late.append(unit not in [slot.holds for slot in carrier.slots])
        before(unit)

    def checked_after(unit):
        after(unit)
        assert unit in [slot.holds for slot in carrier.slots], "what may still compute is overwritten"

    monkeypatch.setattr(carrier, "before", checked_before)
    monkeypatch.setattr(carrier, "after", checked_after)
    draw(pipe)
    late.clear()
    for _ in draw_steps(pipe, 3):
        assert present(units(pipe.text_encoder) + units(pipe.unet)) == []
        largest = max(unit_sizes(pipe.unet))
        room, other = (len(slot.buffer) for slot in carrier.slots)
        assert room == other
        assert largest <= room < largest + offload.ALIGNMENT * 40
    assert sum(late) <= 4  # the first of each network and, between its preparation and the loop, of the UNet


def test_slots_come_and_go_when_nothing_is_copied_or_computed(monkeypatch):
    pretend_cuda(monkeypatch)
    carrier = offload.PinnedStream(torch.device("cpu"), 0)
    carrier.make_room(())
    assert carrier.copying.awaits is torch.cuda.current_stream(carrier.device)
    assert len(carrier.slots) == 2
    torch.cuda.current_stream(carrier.device).awaits = None
    carrier.clear()
    assert torch.cuda.current_stream(carrier.device).awaits is carrier.copying
    assert carrier.slots == []


def test_a_unit_that_failed_leaves_with_the_others(checkpoint_copy, monkeypatch):
    pretend_cuda(monkeypatch)
    carrier = offload.PinnedStream(torch.device("cpu"), 0)
    monkeypatch.setattr(loading, "make_carrier", lambda mode, device: carrier)
    pipe = KolorsPipeline.from_pretrained(in_half(checkpoint_copy), torch.bfloat16, offload="stream")
    pipe.text_encoder.layers[1].attn.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(pipe)
    carrier.clear()
    assert present(units(pipe.text_encoder)) == []


def test_a_unit_comes_as_a_whole_or_not_at_all():
    class Broken:
        ndim = 2

        def to(self, **place):
            raise KeyboardInterrupt

    parameters = [torch.nn.Parameter(torch.zeros(()).expand(3, 3)) for _ in range(2)]
    weights = [
        offload.Weight("w", parameter, stored, parameter.data)
        for parameter, stored in zip(parameters, (torch.ones(3, 3), Broken()), strict=True)
    ]
    unit = offload.Unit(weights, lambda name, stored: None)
    with pytest.raises(KeyboardInterrupt):
        unit.arrive()
    assert present([parameters]) == []


def test_a_pinned_stream_lets_some_units_stay(checkpoint_copy, monkeypatch):
    """Of the network at work as many as it may, brought once; those in between are copied in every step."""
    pretend_cuda(monkeypatch, HALF)
    arrivals, arrive = [], offload.Unit.arrive
    monkeypatch.setattr(offload.Unit, "arrive", lambda unit: (arrivals.append(unit), arrive(unit)))
    fetched, views = [], offload.Slot.views
    monkeypatch.setattr(
        offload.Slot, "views", lambda slot, memory, unit: (fetched.append(unit), views(slot, memory, unit))[1]
    )
    pipe = KolorsPipeline.from_pretrained(in_half(checkpoint_copy), torch.bfloat16, offload="stream")
    glm, unet = units(pipe.text_encoder), units(pipe.unet)
    for step, _ in enumerate(draw_steps(pipe, 3)):
        assert present(glm) == []
        assert HALF * 0.8 < sum(present(unet)) <= HALF
        if step == 0:
            stayed = set(arrivals)
            arrivals.clear()
            fetched.clear()
    assert not arrivals
    assert fetched
    assert not stayed & set(fetched)
    pipe.encode_prompt("a cat")
    assert present(unet) == []


def test_the_autoencoder_has_the_memory_to_itself(checkpoint_copy, carrier, monkeypatch):
    """Whatever stayed of the UNet leaves first, and its memory with it; the next picture is the same."""
    pipe = KolorsPipeline.from_pretrained(in_half(checkpoint_copy), torch.bfloat16, offload=carrier)
    everything, seen, given_back = units(pipe.text_encoder) + units(pipe.unet), [], []
    for half in (pipe.vae.encoder, pipe.vae.decoder):
        half.conv_in.register_forward_hook(lambda *args: seen.append(present(everything)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(present(everything)))
    image = Image.effect_noise((32, 32), 60)
    assert torch.equal(draw(pipe, image=image), draw(pipe, image=image))
    assert seen == given_back == [[]] * 4


def test_an_interruption_while_weights_leave(checkpoint_copy, carrier, monkeypatch):
    """What has left by half does not pass for being there."""
    pipe = KolorsPipeline.from_pretrained(in_half(checkpoint_copy), torch.float32, offload=carrier)
    expected = draw(pipe)

    def interrupt(unit):
        unit.weights[0].parameter.data = unit.weights[0].absent
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(offload.Unit, "leave", interrupt)
            with pytest.raises(KeyboardInterrupt):
                draw(pipe)
        assert torch.equal(draw(pipe), expected)


def test_what_stays_of_the_official_networks(monkeypatch):
    """In fp16 a gigabyte of the UNet moves in every step; of what computes once a picture, nothing stays."""
    networks, let_stay = [], offload.let_stay
    monkeypatch.setattr(offload, "let_stay", lambda *args: networks.append(args) or let_stay(*args))
    for make, config in ((UNet, UNetConfig()), (GLMEncoder, GLMConfig())):
        with torch.device("meta"):
            network = make(config)
        stored = network.half().state_dict()
        offload.let_rest(network, stored, torch.half, "meta", SimpleNamespace(capacity=offload.KEPT), None)
    (unet, once, _), (glm, *_) = networks
    size = lambda units: sum(unit.num_bytes for unit in units)
    assert 0.95 * offload.KEPT < size(unit for unit in unet if unit.stays) <= offload.KEPT
    assert size(unit for unit in unet if not unit.stays and unit not in once) < 1e9
    assert not any(unit.stays for unit in (*once, *glm))
    assert len(once) == 2 * 70 + 3


@pytest.mark.parametrize(
    ("capacity", "staying"),
    [(0, ""), (2.5, "ab5"), (5.5, "ab1357"), (100, "ab01234567")],
)
def test_what_stays_is_spread_out(capacity, staying):
    """Small units and those of convolutions first, the rest as evenly as there is room; none that compute once."""
    shapes = {"a": (10**3,), "b": (2500, 1000, 2, 2), **dict.fromkeys("c01234567", (10**7,))}
    units = {}
    for name, shape in shapes.items():
        weight = torch.empty(shape, dtype=torch.half, device="meta")
        units[name] = offload.Unit([offload.Weight(name, torch.nn.Parameter(weight), weight, weight)], None)
    offload.let_stay(tuple(units.values()), {units["c"]}, capacity * 20_000_000)
    assert "".join(name for name, unit in units.items() if unit.stays) == staying
    moving = [unit for unit in units.values() if not unit.stays]
    assert [unit.following for unit in moving] == [*moving[1:], None]


def draw_steps(pipe, count):
    return pipe.denoise("a cat", height=32, width=32, num_inference_steps=count)


def test_one_network_at_a_time(checkpoint_copy):
    """With offload="model" each is there as a whole, and never with the other."""
    pipe = KolorsPipeline.from_pretrained(in_half(checkpoint_copy), torch.bfloat16, offload="model")
    with watched(pipe) as seen:
        for _ in range(2):
            draw(pipe, num_inference_steps=1, output_type="latent")
    whole = {tuple(unit_sizes(pipe.text_encoder)), tuple(unit_sizes(pipe.unet))}
    assert {(tuple(glm) or tuple(unet)) for glm, unet in seen} == whole
    assert not any(glm and unet for glm, unet in seen)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at /proc/self/maps")
@pytest.mark.parametrize("mode", MODES)
def test_the_right_type_is_used_in_place(small_checkpoint, mode):
    """On a CPU, weights of the type to compute in are those in the file's own mapping, but for convolutions' layout."""
    pipe = KolorsPipeline.from_pretrained(small_checkpoint, offload=mode)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(small_checkpoint) in line]
    mappings = [[int(address, 16) for address in line.split()[0].split("-")] for line in lines]
    places = []
    for network in (pipe.text_encoder, pipe.unet):
        for module in network.modules():
            module.register_forward_hook(
                lambda module, *rest: places.extend(
                    p.data_ptr() for p in module.parameters(recurse=False) if p.ndim < 4
                ),
                prepend=True,
            )
    draw(pipe)
    assert len(places) > 250
    assert all(any(low <= place < high for low, high in mappings) for place in places)


IN_A_ROW = """
import re, sys, torch
from pathlib import Path
from kolors_ref import KolorsPipeline
from kolors_ref.offload import MODES

resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
pipes = [KolorsPipeline.from_pretrained(sys.argv[1], offload=mode) for mode in MODES]
size = {"height": 32, "width": 32, "num_inference_steps": 1}
for number in range(220):
    pipes[number % 3](f"a picture of {number}", generator=torch.Generator().manual_seed(0), **size)
    if number == 19:
        print(resident())
print(resident())
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is counted in the way of Linux")
def test_many_pictures_in_a_row(small_checkpoint):
    """Resident memory stays flat over 200 pictures, in every mode, with another prompt every time.

    In a process of its own, whose one percent is not that of what other tests have used.
    """
    command = [sys.executable, "-c", IN_A_ROW, str(small_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < 1.01 * before


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS[:2])
def test_a_damaged_weight(checkpoint_copy, carrier, network):
    """It is found when it is used first, every time, and named as when a whole network is loaded."""
    name = {"text_encoder": "mlp.dense_4h_to_h", "unet": "mid_block.resnets.1.conv2"}[network]

    def spoil(tensors):
        tensors[next(key for key in tensors if name in key and key.endswith("weight"))].view(-1)[7] = torch.nan

    edit_weights(checkpoint_copy / WEIGHTS[network], spoil)
    with pytest.raises(ValueError, match="damaged") as resident:
        KolorsPipeline.from_pretrained(checkpoint_copy)
    pipe = KolorsPipeline.from_pretrained(checkpoint_copy, offload=carrier)
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged") as streamed:
            draw(pipe)
        assert str(streamed.value) == str(resident.value)


def test_what_cannot_be(checkpoint_copy):
    for wrong in ("sequential", "", True):
        with pytest.raises(ValueError, match=r"offload is .*; it must be one of none, model, stream$"):
            KolorsPipeline.from_pretrained(checkpoint_copy, offload=wrong)
    pipe = KolorsPipeline.from_pretrained(checkpoint_copy, offload="stream")
    lora.attach(pipe.unet, updates(pipe.unet, {"conv_in": 2}), "a")
    with pytest.raises(ValueError, match="a LoRA cannot be fused with offload='stream'"):
        pipe.fuse_lora()
    with pytest.raises(ValueError, match="cannot be fused into weights that are offloaded"):
        lora.fuse(pipe.unet)
    assert draw(pipe).isfinite().all()
    path = checkpoint_copy / WEIGHTS["unet"]
    edit_weights(path, lambda tensors: tensors.update({"conv_in.bias": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"conv_in\.bias has shape"):
        KolorsPipeline.from_pretrained(checkpoint_copy, offload="stream")


def test_a_weight_that_is_away_is_seen(small_checkpoint):
    """Its shadow has the shape, type and device of the weight, and NaN for numbers."""
    pipe = KolorsPipeline.from_pretrained(small_checkpoint, torch.bfloat16, offload="stream")
    weight = pipe.unet.conv_in.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((16, 4, 3, 3), torch.bfloat16, "cpu")
    assert weight.isnan().all()
    assert weight.untyped_storage().nbytes() == 2
    resident = KolorsPipeline.from_pretrained(small_checkpoint, torch.bfloat16).unet
    shapes = lambda unet: {name: tensor.shape for name, tensor in unet.state_dict().items()}
    assert shapes(pipe.unet) == shapes(resident)
