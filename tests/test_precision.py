"""Which dtype a device computes fast in, and who asks."""

import time

import pytest
import torch
from test_loading import WEIGHTS, dtypes, edit_weights

from kolors_ref import KolorsPipeline, loading
from kolors_ref.mini.processes import Processes
from kolors_ref.precision import fast_dtype
from weights_conversion import open_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def capabilities(monkeypatch):
    """Gives the function that makes this CPU one with certain instructions, and nothing else."""
    return lambda *names: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("avx2", "avx512_f", "avx512_bf16"), torch.bfloat16),
        (("avx2", "avx512_f", "amx_tile", "amx_bf16"), torch.bfloat16),
        (("neon", "bf16"), torch.bfloat16),
        (("avx2", "avx512_f", "amx_int8"), torch.float32),
        (("avx2",), torch.float32),
        ((), torch.float32),
    ],
)
def test_a_cpu_with_instructions_for_bfloat16_and_one_without(capabilities, monkeypatch, names, dtype):
    capabilities(*names)
    assert fast_dtype(CPU) == dtype
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # what multiplies in bfloat16
    assert fast_dtype(CPU) == torch.float32


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_an_old_gpu_that_only_emulates_it(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert fast_dtype(torch.device("cuda", 0)) == dtype


def test_what_is_called_fast_is():
    """On the CPU that runs this: where there are no instructions for it, bfloat16 is 10 to 200 times slower."""

    def seconds(dtype):
        matrix = torch.randn(512, 512, dtype=dtype)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - began)
        return min(times)

    if fast_dtype(CPU) == torch.bfloat16:
        assert seconds(torch.bfloat16) < 4 * seconds(torch.float32)
    else:
        assert seconds(torch.bfloat16) > seconds(torch.float32)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "dtype"), [("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)])
def test_what_half_precision_weights_are_computed_in(checkpoint_copy, capabilities, stored, name, dtype):
    capabilities(name)
    edit_weights(checkpoint_copy / WEIGHTS["unet"], lambda tensors: tensors.update(cast(tensors, stored)))
    assert dtypes(KolorsPipeline.from_pretrained(checkpoint_copy)) == [{dtype}] * 3
    asked = KolorsPipeline.from_pretrained(checkpoint_copy, dtype=torch.float16)
    assert dtypes(asked) == [{torch.float16}, {torch.float16}, {torch.float32}]


def cast(tensors, dtype):
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
def test_other_weights_are_computed_in_their_own_format(checkpoint_copy, capabilities, stored):
    capabilities("avx512_bf16")
    edit_weights(checkpoint_copy / WEIGHTS["unet"], lambda tensors: tensors.update(cast(tensors, stored)))
    assert KolorsPipeline.from_pretrained(checkpoint_copy).dtype == stored


@pytest.mark.parametrize(("name", "dtype"), [("amx_bf16", torch.bfloat16), ("avx2", torch.float32)])
def test_what_training_computes_in(capabilities, name, dtype):
    capabilities(name)
    with Processes(0, 1, CPU).autocast():
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype


# ---------------------------------------------------------------------------------------------------------------------
# Weights that the memory has no room for in that format
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch):
    """Gives the function that sets how many bytes of memory this machine has."""
    own = loading.os.sysconf
    known = {"SC_PAGE_SIZE": 1}
    monkeypatch.setattr(loading, "CONTAINER_LIMITS", ())
    monkeypatch.setattr(loading.os, "sysconf", lambda name: known[name] if name in known else own(name))
    return lambda size: known.update(SC_PHYS_PAGES=size)


def test_weights_too_large_to_cast_stream(checkpoint_copy, memory):
    """Those of text encoder and UNet; those that are in the right format stay in the file anyway."""
    networks = open_checkpoint(checkpoint_copy).networks
    size = sum(t.numel() * 8 for name in ("text_encoder", "unet") for t in networks[name].tensors.values())
    memory(2 * size)
    assert KolorsPipeline.from_pretrained(checkpoint_copy, torch.float64).offload == "none"
    memory(2 * size - 1)
    assert KolorsPipeline.from_pretrained(checkpoint_copy, torch.float64).offload == "stream"
    assert KolorsPipeline.from_pretrained(checkpoint_copy, torch.float32).offload == "none"


@pytest.mark.parametrize("share", ["", "max\n", "9223372036854771712\n", "1000000\n"])
def test_a_containers_share_counts(monkeypatch, tmp_path, memory, share):
    """Where there is one: its file says "max" or a number beyond all memories if there is none."""
    memory(3_000_000)
    (tmp_path / "memory.max").write_text(share)
    monkeypatch.setattr(loading, "CONTAINER_LIMITS", (tmp_path / "memory.max", tmp_path / "missing"))
    assert loading.memory_allowed() == (1_000_000 if share == "1000000\n" else 3_000_000)


def test_what_is_asked_for_goes_before(small_checkpoint, memory):
    memory(1)
    load = lambda **options: KolorsPipeline.from_pretrained(small_checkpoint, torch.float64, **options).offload
    assert [load(offload=mode) for mode in ("none", "model", "stream")] == ["none", "model", "stream"]
    assert load(compile=True) == "none"
