"""The training loop: its rates and averages, and that a run which was killed gives the numbers of one which was not.

Run as a program, this file trains a tiny network in a folder; it can be told where to kill itself.
"""

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from kolors_ref.mini.loop import Curve, average_of, train
from kolors_ref.mini.processes import Processes
from kolors_ref.mini.recipe import Stage
from kolors_ref.mini.training_state import read_tensors, write_tensors

STAGE = Stage("tiny", 14, 6, 1e-2, 1e-3, matrix_rate=2e-2, warmup=3, ema_decay=0.5, save_every=4)
HERE = Processes(0, 1, torch.device("cpu"))


class Tiny(nn.Module):
    """A regression on whose loss all that a real network has takes part: products in bf16, a buffer, a nonlinearity."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out = nn.Linear(5, 8), nn.Linear(8, 1)
        self.register_buffer("shift", torch.tensor(0.1))

    def hidden_matrices(self):
        return [self.hidden.weight]

    def forward(self, x, y):
        return (self.out(torch.tanh(self.hidden(x + self.shift))).float() - y).square().mean()


def batch(numbers):
    """A batch that its numbers alone decide."""
    x = torch.stack([torch.randn(5, generator=torch.Generator().manual_seed(number)) for number in numbers])
    return x, x.prod(dim=1, keepdim=True) + x[:, :1]


def test_batches_can_depend_on_the_average_so_far(tmp_path):
    """It is that of the steps before, and of a checkpoint when a run goes on from one."""

    def follow(folder, stop):
        module, seen = Tiny(), []
        average = average_of(STAGE, module)

        def batch_and_look(numbers):
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(average.module.out.bias.item())
            return batch(numbers)

        with suppress(KeyboardInterrupt):
            assert train(STAGE, module, batch_and_look, folder, HERE, average=average) is average.module
        return seen

    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = follow(tmp_path / "whole", stop=99)
    assert len(set(whole)) == STAGE.steps
    assert whole[0] == Tiny().out.bias.item()
    assert follow(tmp_path / "parts", stop=9) == whole[:9]
    assert follow(tmp_path / "parts", stop=99) == whole[8:]


def main(folder, kill_in_step, kill_at_save):
    def batch_or_death(numbers):
        if numbers.start // STAGE.batch_size == kill_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(numbers)

    def death_before_the_name(source, target):
        if target.name == f"tiny-{kill_at_save:08d}.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    rename, os.replace = os.replace, death_before_the_name
    Curve.EVERY = 2
    trained(folder, batches=batch_or_death)


def run(folder, kill_in_step=-1, kill_at_save=-1):
    """Runs this file on a folder in a process of its own, and gives its exit status."""
    folder.mkdir(exist_ok=True)
    arguments = [str(value) for value in (folder, kill_in_step, kill_at_save)]
    return subprocess.run([sys.executable, __file__, *arguments], timeout=120).returncode


def content(folder):
    """The tensors and facts of every file of tensors, with numbers as bytes."""
    files = {path.name: read_tensors(path) for path in folder.glob("*.safetensors")}
    return {
        name: ({key: (tensor.dtype, tensor.numpy().tobytes()) for key, tensor in tensors.items()}, facts)
        for name, (tensors, facts) in files.items()
    }


def curve(folder):
    lines = [json.loads(line) for line in (folder / "tiny.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines], [line["loss"] for line in lines]


def trained(folder, stage=STAGE, batches=batch, module=None, **options):
    return train(stage, module or Tiny(), batches, folder, HERE, **options)


def finish(folder, **options):
    """Trains to the end, and puts the result beside the checkpoints."""
    write_tensors(folder / "result.safetensors", trained(folder, **options).state_dict())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curve, "EVERY", 2)
        finish(folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_killed_twice_ends_bit_for_bit_as_one_that_was_not(whole, tmp_path):
    """Weights, moments and averages: the files are the same, the two checkpoints that are left among them."""
    assert run(tmp_path, kill_in_step=6) == -signal.SIGKILL
    assert sorted(content(tmp_path)) == ["tiny-00000004.safetensors"]
    assert run(tmp_path, kill_at_save=12) == -signal.SIGKILL
    assert sorted(content(tmp_path)) == ["tiny-00000004.safetensors", "tiny-00000008.safetensors"]
    finish(tmp_path)
    assert content(tmp_path) == content(whole)
    assert sorted(content(whole)) == ["result.safetensors", "tiny-00000008.safetensors", "tiny-00000012.safetensors"]
    tensors, _ = read_tensors(tmp_path / "tiny-00000012.safetensors")
    assert {
        "module.out.bias",
        "average.n_averaged",
        "optimizer.0.0.exp_avg",
        "optimizer.1.0.momentum_buffer",
    } <= tensors.keys()


@pytest.mark.parametrize("stop", [3, 5, 8, 13])
def test_an_interrupted_run_ends_the_same(whole, tmp_path, stop):
    def interrupted(numbers):
        if numbers.start == stop * STAGE.batch_size:
            raise KeyboardInterrupt
        return batch(numbers)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, batches=interrupted)
    finish(tmp_path)
    assert content(tmp_path) == content(whole)


def test_the_last_but_one_checkpoint_leads_to_the_same_end(whole, tmp_path):
    finish(tmp_path)
    (tmp_path / "tiny-00000012.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tiny-00000012\.safetensors is damaged"):
        trained(tmp_path)
    finish(tmp_path, previous=True)
    assert content(tmp_path) == content(whole)


def test_the_curve_has_every_step_once(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(Curve, "EVERY", 2)
    trained(tmp_path)
    for damaged in ("", '{"step": 14, "lo'):  # lines beyond the checkpoint, and one that a full disk cut short
        with (tmp_path / "tiny.jsonl").open("a") as file:
            file.write(damaged)
        trained(tmp_path, previous=True)
        assert curve(tmp_path) == curve(whole)
    assert curve(whole)[0] == [2, 4, 6, 8, 10, 12, 14]


def test_a_new_run_begins_a_new_curve(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(Curve, "EVERY", 2)
    (tmp_path / "tiny.jsonl").write_text('{"step": 2, "loss": 9, "seconds": 1}\n')
    trained(tmp_path)
    assert curve(tmp_path) == curve(whole)


def test_a_full_disk_keeps_the_curve(tmp_path, monkeypatch):
    (tmp_path / "tiny.jsonl").write_text('{"step": 4, "loss": 9, "seconds": 1}\n')

    def full(path, *arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=r"tiny\.jsonl cannot be written: No space left on device"):
            Curve(tmp_path / "tiny.jsonl", 4)
    assert curve(tmp_path) == ([4], [9])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        patch.setattr(Curve, "EVERY", 2)
        with pytest.raises(OSError, match=r"tiny\.jsonl cannot be written: No space left on device"):
            trained(tmp_path)


def test_another_stage_or_another_network_is_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(ValueError, match="was made with other settings"):
        trained(tmp_path, stage=Stage("tiny", 15, 6, 1e-2, 1e-3, warmup=3, ema_decay=0.5, save_every=4))
    wider = Tiny()
    wider.hidden, wider.out = nn.Linear(5, 9), nn.Linear(9, 1)
    with pytest.raises(ValueError, match=r"holds a tiny of other sizes; train in another folder$"):
        trained(tmp_path, module=wider)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are none
# ---------------------------------------------------------------------------------------------------------------------


class Steep(Tiny):
    """A loss that stays what it is while the slope of a root at 0 makes its gradient no number, in one step."""

    def forward(self, x, y):
        root = (self.out.bias * 0).sum().sqrt() if torch.isinf(x).any() else 0.0
        return super().forward(x.nan_to_num(posinf=0.0), y) + root


@pytest.mark.parametrize("step", [3, 5])  # 3: the last before a checkpoint, which would keep the harm
@pytest.mark.parametrize(("module", "value"), [(Tiny, math.nan), (Steep, math.inf)], ids=["loss", "gradient"])
def test_a_loss_that_is_no_number_ends_the_run_and_is_never_saved(tmp_path, module, value, step):
    def spoilt(numbers):
        x, y = batch(numbers)
        return (torch.full_like(x, value) if numbers.start == step * STAGE.batch_size else x), y

    with pytest.raises(ValueError, match=rf"the loss of tiny is .* at step {step}; a lower learning rate may help$"):
        trained(tmp_path, batches=spoilt, module=module())
    assert sorted(content(tmp_path)) == ["tiny-00000004.safetensors"] * (step > 3)
    for path in tmp_path.glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in read_tensors(path)[0].values())


def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the 6 examples of a batch of tiny cannot be shared evenly by 4 processes"):
        train(STAGE, Tiny(), batch, tmp_path, Processes(0, 4, torch.device("cpu")))


# ---------------------------------------------------------------------------------------------------------------------
# Rates and averages
# ---------------------------------------------------------------------------------------------------------------------


def test_learning_rates_rise_in_a_line_and_fall_as_a_cosine():
    stage = Stage("any", 1000, 8, 1e-3, 1e-5, warmup=100)
    cosine = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * step / 1000)) / 2 for step in range(1000)]
    for step in range(1000):
        assert 1e-3 * stage.rate_factor(step) == pytest.approx(cosine[step] * min(1, (step + 1) / 100), rel=1e-12)
    rates = [1e-3 * stage.rate_factor(step) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5)
    assert max(rates) == pytest.approx(1e-3, rel=0.03)
    assert rates[99:] == sorted(rates[99:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5, rel=1e-3)
    assert 1e-3 * stage.rate_factor(5000) == pytest.approx(1e-5)


def test_a_stage_made_shorter_keeps_its_rates():
    stage = Stage("any", 7000, 32, 1e-3, 2e-4).scaled(0.01)
    assert (stage.steps, stage.warmup, stage.save_every) == (70, 1, 200)
    assert (stage.learning_rate, stage.final_learning_rate) == (1e-3, 2e-4)
    assert 1e-3 * stage.rate_factor(35) == pytest.approx(6e-4)


def recorded(folder, stage):
    """Trains, and gives the parameters before every step and after the last, and the average that comes out."""
    module, weights = Tiny(), []

    def batches(numbers):
        weights.append([parameter.detach().clone() for parameter in module.parameters()])
        return batch(numbers)

    average = train(stage, module, batches, folder, HERE)
    return [*weights, list(module.parameters())], list(average.parameters())


def test_the_result_is_the_moving_average_of_the_weights(tmp_path):
    """The decay is (1 + n) / (10 + n) at first, n counting the weights averaged so far, then that of the stage."""
    stage = Stage("tiny", 14, 6, 1e-2, 1e-3, warmup=3, ema_decay=0.5, save_every=100)
    weights, average = recorded(tmp_path, stage)
    expected = [parameter.double() for parameter in weights[1]]
    for count, parameters in enumerate(weights[2:], start=1):
        decay = min((1 + count) / (10 + count), 0.5)
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, parameters, strict=True)]
    for ours, theirs in zip(average, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-7)
    assert max((a - w).abs().max() for a, w in zip(average, weights[-1], strict=True)) > 1e-4


def test_each_step_goes_as_far_as_its_rate_says(tmp_path):
    """Adam's first step moves every weight by the rate, and the decay of weights comes on top."""
    weights, _ = recorded(tmp_path, STAGE)
    rate = 1e-2 * STAGE.rate_factor(0)
    assert rate == pytest.approx(1e-2 / 3)
    for before, after in list(zip(weights[0], weights[1], strict=True))[1:]:
        moved = (after - before * (1 - 0.01 * rate)).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=0)


def test_muon_steps_alike_in_all_directions(tmp_path):
    """The singular values of its step lie around 0.2 sqrt(8) rate for a matrix (8, 5), whatever the gradient's."""
    weights, _ = recorded(tmp_path, STAGE)
    rate = 2e-2 * STAGE.rate_factor(0)
    before, after = weights[0][0], weights[1][0]
    assert before.shape == (8, 5)
    sizes = torch.linalg.svdvals((after - before * (1 - 0.01 * rate)).double())[:3] / (0.2 * 8**0.5 * rate)
    assert ((sizes > 0.5) & (sizes < 1.3)).all()
    (tmp_path / "adam").mkdir()
    with_adam, _ = recorded(tmp_path / "adam", replace(STAGE, matrix_rate=None))
    moved = (with_adam[1][0] - before * (1 - 0.01 * 1e-2 * STAGE.rate_factor(0))).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2 * STAGE.rate_factor(0)), rtol=1e-3, atol=0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
