"""Whole trainings of a tiny miniature, from nothing to a checkpoint that draws: interrupted, killed, and shared by two.

Run by torchrun, this file trains in several processes in a folder; it can be told to kill the first of them.
"""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_train_stages import GLM, UNET, VAE
from torch import nn

from kolors_ref import KolorsPipeline
from kolors_ref.mini import denoiser, loop, recipe, reward_tuning, train
from kolors_ref.mini.autoencoder import (
    CROP,
    AutoencoderLoss,
    DecoderLoss,
    decoder_batches,
    picture_batches,
    whole_pictures,
)
from kolors_ref.mini.optimizers import Optimizers
from kolors_ref.mini.processes import Processes, processes
from kolors_ref.mini.recipe import Recipe, Stage
from kolors_ref.mini.training_state import read_tensors, write_tensors

HERE = Processes(0, 1, torch.device("cpu"))
LEARNING = Recipe(
    tokenizer_captions=1500,
    glm=Stage("glm", 25, 8, 1e-2, 1e-3, warmup=5),
    vae=Stage("vae", 40, 4, 1e-2, 3e-3, warmup=2),
    vae_whole=Stage("vae-whole", 10, 4, 3e-3, 1e-4, warmup=2),
    vae_decoder=Stage("vae-decoder", 20, 4, 3e-3, 1e-4, warmup=2),
    unet=Stage("unet", 20, 4, 2e-3, 1e-3, matrix_rate=2e-3, warmup=5),
    unet_tuning=Stage("unet-tuning", 40, 4, 5e-4, 5e-5, matrix_rate=1e-3, warmup=5),
    unet_reward=Stage("unet-reward", 0, 4, 5e-4, 5e-5),
    unet_reward_again=Stage("unet-reward-again", 0, 4, 5e-4, 5e-5),
    scenes=64,
    clean_scenes=32,
)
"""Long enough that every loss falls."""
SHORT = Recipe(
    tokenizer_captions=500,
    glm=Stage("glm", 6, 4, 1e-2, 1e-3, warmup=2, save_every=2),
    vae=Stage("vae", 4, 2, 1e-2, 1e-3, warmup=2, save_every=2),
    vae_whole=Stage("vae-whole", 2, 2, 1e-2, 1e-3, warmup=2, save_every=1),
    vae_decoder=Stage("vae-decoder", 2, 2, 1e-2, 1e-3, warmup=2, save_every=1),
    unet=Stage("unet", 5, 2, 1e-2, 1e-3, matrix_rate=1e-2, warmup=2, save_every=2),
    unet_tuning=Stage("unet-tuning", 4, 2, 1e-2, 1e-3, warmup=2, save_every=2),
    unet_reward=Stage("unet-reward", 5, 2, 1e-2, 1e-3, warmup=2, save_every=2),
    unet_reward_again=Stage("unet-reward-again", 3, 2, 1e-2, 1e-3, warmup=2, save_every=2),
    scenes=64,
    clean_scenes=32,
)
"""Long enough to be interrupted anywhere."""
SUM = Stage("sum", 8, 4, 1e-2, 1e-3, warmup=2, ema_decay=0.5, save_every=4)
MATRICES = Stage("matrices", 5, 4, 1e-2, 1e-3, matrix_rate=1e-1, warmup=2)


@contextmanager
def tiny_networks():
    """Makes the miniature still smaller, its curves finer and its files of latents shorter."""
    with pytest.MonkeyPatch.context() as patch:
        for name, config in (("GLM", GLM), ("VAE", VAE), ("UNET", UNET)):
            patch.setattr(recipe, name, config)
        patch.setattr(loop.Curve, "EVERY", 5)
        patch.setattr(denoiser, "SHARD", 16)
        for name, count in (("CAPTIONS", 2), ("GROUP", 2), ("UPDATES", 2), ("STEPS", 2)):
            patch.setattr(reward_tuning, name, count)
        patch.setattr(train, "measured_scale", partial(train.measured_scale, count=32))
        yield


class Sum(nn.Module):
    """A regression without products of matrices, which would be rounded to bf16: its gradients are exact in fp32."""

    def __init__(self):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.linspace(-1, 1, 5)), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return (torch.tanh((x * self.weight).sum(1) + self.offset) - x[:, 0] * x[:, 1] - 1).square().mean()


def batch(numbers):
    return (torch.stack([torch.randn(5, generator=torch.Generator().manual_seed(number)) for number in numbers]),)


class Matrices(nn.Module):
    """Three matrices for Muon, one of them a convolution's, and a bias for AdamW."""

    def __init__(self):
        super().__init__()
        shapes = {"wide": (6, 10), "kernel": (4, 3, 3, 3), "tall": (9, 5), "bias": (7,)}
        for number, (name, shape) in enumerate(shapes.items()):
            setattr(self, name, nn.Parameter(normal(shape, number)))

    def hidden_matrices(self):
        return [self.wide, self.kernel, self.tall]


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def optimized(here):
    """Weights and moments after five steps down given gradients; after three of them everything is put back."""
    module = Matrices()
    optimizers = Optimizers(MATRICES, module, here)
    for step in range(5):
        if step == 3:
            moments = optimizers.state()
            optimizers = Optimizers(MATRICES, module, here)
            optimizers.load(moments)
        for number, parameter in enumerate(module.parameters()):
            parameter.grad = normal(parameter.shape, 10 * step + number)
        optimizers.step(step)
        assert all(parameter.grad is None for parameter in module.parameters())
    return {**module.state_dict(), **optimizers.state()}


def main(folder, kill):
    """Trains in two processes; with `kill`, the first of them ends itself amidst the UNet's stage."""

    def killed_batches(*arguments):
        make, calls = denoiser.denoising_batches(*arguments), itertools.count()

        def batch_or_death(numbers):
            if next(calls) == 3 and os.environ["RANK"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            return make(numbers)

        return batch_or_death

    with tiny_networks(), processes("cpu") as here:
        if kill:
            train.denoising_batches = killed_batches
        train.train_mini(folder / "interrupted", SHORT, here)
        train.train_mini(folder / "whole", SHORT, here)
        own = folder / f"rank{here.rank}"  # so that it shows who writes
        own.mkdir()
        result = loop.train(SUM, Sum(), batch, own, here)
        write_tensors(folder / f"result{here.rank}.safetensors", result.state_dict())
        write_tensors(folder / f"optimized{here.rank}.safetensors", optimized(here))


def run_two(folder, kill):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, __file__, str(folder), str(int(kill))], env=environment, timeout=400, capture_output=True, text=True
    )
    return ended.returncode, ended.stderr


def numbers_in(folder):
    """What every file of a run holds, with numbers as bytes; of curves, the steps."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix == ".jsonl":
            found[path.name] = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        elif path.suffix == ".safetensors" and path.parent == folder:
            tensors, facts = read_tensors(path)
            found[path.name] = ({name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, facts)
        else:
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with tiny_networks():
        yield


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """The folder of a training that learns something."""
    folder = tmp_path_factory.mktemp("learnt")
    assert train.train_mini(folder, LEARNING, HERE) == folder / "model"
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The folder of a short training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("short")
    train.train_mini(folder, SHORT, HERE)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# In one process
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["glm", "vae", "unet"])
def test_the_curve_of_a_stage_falls(learnt, stage):
    losses = [json.loads(line)["loss"] for line in (learnt / f"{stage}.jsonl").read_text().splitlines()]
    assert len(losses) == getattr(LEARNING, stage).steps // 5
    assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
def loss_of(folder, stage, module, examples):
    module.load_state_dict(read_tensors(folder / f"{stage}.safetensors")[0])
    return module.eval()(*examples).item()


def test_the_second_stage_of_the_autoencoder_goes_further(learnt):
    fresh = picture_batches(0, VAE)(range(90_000, 90_024))
    module = AutoencoderLoss(VAE)
    assert loss_of(learnt, "vae-whole", module, fresh) < loss_of(learnt, "vae", module, fresh)
    crops = picture_batches(0, VAE, CROP)(range(90_000, 90_024))
    torch.manual_seed(LEARNING.seed)  # the weights that it started from
    with torch.no_grad():
        untrained = AutoencoderLoss(VAE)(*crops).item()
    assert loss_of(learnt, "vae", module, crops) < 0.8 * untrained


def test_the_decoder_alone_goes_further_and_latents_stay(learnt):
    done = train.Run(learnt, LEARNING, HERE, False)
    before, after = train.Run(learnt, LEARNING.without("vae_decoder"), HERE, False).autoencoder(), done.autoencoder()
    latents, pictures, weight = decoder_batches(0, before, HERE)(range(90_000, 90_024))
    with torch.no_grad():
        losses = [DecoderLoss(vae)(latents, pictures, weight).item() for vae in (before, after)]
        assert torch.equal(before.encode(pictures).mean, after.encode(pictures).mean)
    assert losses[1] < 0.95 * losses[0]
    shipped = KolorsPipeline.from_pretrained(learnt / "model", dtype=torch.float32).vae
    assert torch.equal(shipped.decoder.conv_in.weight, after.decoder.conv_in.weight.half().float())


def test_quality_tuning_goes_further_on_clean_pictures(learnt):
    done = train.Run(learnt, LEARNING, HERE, False)
    encoder = done.language_model().encoder
    cached = denoiser.cache_latents(nn.Module(), learnt, "latents-clean", 1, 32, True, HERE)
    batches = denoiser.denoising_batches(cached, 1, True, 0.5, 1100, done.tokenizer(), encoder)
    module = denoiser.DenoisingLoss(UNET, train.NoiseSchedule(LEARNING.schedule))
    fresh = batches(range(90_000, 90_064))
    assert loss_of(learnt, "unet-tuning", module, fresh) < loss_of(learnt, "unet", module, fresh)


@pytest.mark.parametrize("prompt", ["一个红色的圆形在蓝色方块的左边", "a red circle to the left of a blue square"])
def test_the_checkpoint_draws(learnt, prompt):
    pipe = KolorsPipeline.from_pretrained(learnt / "model")
    images = pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
    other = pipe("", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert images.shape == (1, 3, 128, 128)
    assert not torch.equal(images, other)
    assert pipe.unet.config == UNET
    assert pipe.schedule.config.num_train_timesteps == LEARNING.schedule.num_train_timesteps


def test_latents_have_unit_scale_in_the_checkpoint(learnt):
    vae = KolorsPipeline.from_pretrained(learnt / "model", dtype=torch.float32).vae
    assert vae.config == replace(VAE, scaling_factor=vae.config.scaling_factor)
    (pictures,) = whole_pictures(0, 32)
    with torch.no_grad():
        assert vae.encode(pictures).mean.std().item() == pytest.approx(1, abs=0.01)


def test_what_is_done_is_not_done_again(short, monkeypatch):
    before = numbers_in(short)
    for owner, name in ((train, "train"), (train, "train_tokenizer"), (train, "measured_scale"), (denoiser, "encode")):
        monkeypatch.setattr(owner, name, None)
    train.train_mini(short, SHORT, HERE)
    assert numbers_in(short) == before


def interrupted(function, count):
    """The same function, but interrupted from the keyboard the next time after `count` calls."""
    calls = itertools.count()

    def called(*arguments, **options):
        if next(calls) == count:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return called


def test_a_training_interrupted_everywhere_gives_the_same_files(short, tmp_path):
    """Between stages, inside each of them, and while files are made; each time it goes on from the last checkpoint."""
    for owner, name, count in (
        (train, "train_tokenizer", 0),
        (loop, "clip_grad_norm_", 3),  # step 3 of glm: the next begins at 2
        (loop, "clip_grad_norm_", 4 + 3),  # step 3 of vae
        (loop, "clip_grad_norm_", 2 + 1),  # step 1 of vae-whole
        (train, "measured_scale", 0),
        (loop, "clip_grad_norm_", 1),  # step 1 of vae-decoder
        (denoiser, "write_tensors", 2),  # the third file of latents
        (loop, "clip_grad_norm_", 4),  # step 4 of unet
        (loop, "clip_grad_norm_", 1 + 1),  # step 1 of unet-tuning, which has no checkpoint yet
        (reward_tuning, "judge", 4 + 4 + 1),  # in the third round of unet-reward, of 4 pictures each
        (reward_tuning, "judge", 4 + 4 + 1),  # in the second round of unet-reward-again, after the third of the other
        (train, "write_safetensors", 1),
        (train, "write_json", 0),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, interrupted(getattr(owner, name), count))
            with pytest.raises(KeyboardInterrupt):
                train.train_mini(tmp_path, SHORT, HERE)
    train.train_mini(tmp_path, SHORT, HERE)
    assert numbers_in(tmp_path) == numbers_in(short)


def test_a_full_disk_leaves_nothing_half_written(short, monkeypatch):
    def full(path, *arguments):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    before = numbers_in(short)
    monkeypatch.setattr(train, "write_safetensors", full)
    with pytest.raises(OSError, match=r"^\S*/text_encoder\.safetensors cannot be written: No space left on device$"):
        train.train_mini(short, SHORT, HERE)
    assert numbers_in(short) == before


def test_a_model_is_of_one_run(short, monkeypatch):
    """The disk is full when the last network is written anew: those of before are all there still."""
    write = train.write_safetensors

    def full(path, tensors, dtype):
        if "vae" in path.name:
            raise OSError(28, "No space left on device")
        write(path, {name: tensor + 1 for name, tensor in tensors.items()}, dtype)

    before = numbers_in(short)
    monkeypatch.setattr(train, "write_safetensors", full)
    with pytest.raises(OSError, match=r"^\S*/vae\.safetensors cannot be written: No space left on device$"):
        train.train_mini(short, SHORT, HERE)
    assert numbers_in(short) == before


def test_a_folder_of_another_recipe_is_refused(short):
    with pytest.raises(ValueError, match="holds a run of another recipe; give another folder"):
        train.train_mini(short, replace(SHORT, seed=1), HERE)


def test_a_folder_of_other_networks_is_refused(short, monkeypatch):
    monkeypatch.setattr(recipe, "GLM", replace(GLM, num_layers=3))
    with pytest.raises(ValueError, match=r"glm\.safetensors is of other sizes; train in another folder$"):
        train.train_mini(short, SHORT, HERE)


@pytest.mark.parametrize("name", ["recipe.json", "vae.safetensors", "vae-scale.json"])
def test_a_damaged_file_is_named(short, name):
    path = short / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    try:
        with pytest.raises(ValueError, match=rf"{name} is (damaged|not JSON): [^\n]*$"):
            train.train_mini(short, SHORT, HERE)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("content", ["{}", '{"scaling_factor": "0.5"}', '{"scaling_factor": NaN}', "[]"])
def test_a_scale_that_is_none(short, content):
    path = short / "vae-scale.json"
    whole = path.read_bytes()
    path.write_text(content)
    try:
        with pytest.raises(ValueError, match=r"vae-scale\.json [^\n]*$"):
            train.train_mini(short, SHORT, HERE)
    finally:
        path.write_bytes(whole)


def test_what_a_killed_run_left_half_written_goes(short):
    left = [folder / ".unet-00000004.safetensors.partial-4711" for folder in (short, short / "model")]
    for path in left:
        path.write_bytes(b"half of it")
    train.train_mini(short, SHORT, HERE)
    assert not any(path.exists() for path in left)


def test_a_run_that_is_under_way_is_left_alone(short):
    """A second one would take its half-written files for those of a killed run."""
    with train.held(short), pytest.raises(ValueError, match=r"a training is under way in .*; give another folder"):
        train.train_mini(short, SHORT, HERE)
    train.train_mini(short, SHORT, HERE)


def test_a_damaged_checkpoint_is_passed_over_on_request(short, tmp_path):
    """In the middle of a stage of the real training: the one before it gives the same model in the end."""
    folder = tmp_path / "again"
    shutil.copytree(short, folder)
    shutil.rmtree(folder / "model")
    for path in folder.glob("unet*.safetensors"):
        path.unlink()
    save = loop.save_state
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_state", lambda *arguments: save(*arguments) or kill_at(4, *arguments))
        with pytest.raises(KeyboardInterrupt):
            train.train_mini(folder, SHORT, HERE)
    damaged = folder / "unet-00000004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(ValueError, match="--previous goes back"):
        train.train_mini(folder, SHORT, HERE)
    train.train_mini(folder, SHORT, HERE, previous=True)
    for path in (short / "model").iterdir():
        assert (folder / "model" / path.name).read_bytes() == path.read_bytes()


def kill_at(step, folder, stage, state):
    if stage == "unet" and state.step == step:
        raise KeyboardInterrupt


@pytest.mark.parametrize("count", [3, 8])
def test_processes_that_cannot_share_a_later_stage_are_refused_at_once(tmp_path, count):
    """The official batches of the autoencoder's later stages are of 4."""
    with pytest.raises(ValueError, match=rf"cannot be shared evenly by {count} processes"):
        train.train_mini(tmp_path / "new", Recipe(), Processes(0, count, torch.device("cpu")))
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------------------
# In two processes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder of a training in two processes which was killed and went on, and of one which was not."""
    folder = tmp_path_factory.mktemp("shared")
    status, errors = run_two(folder, kill=True)
    assert status != 0, errors
    assert (folder / "interrupted" / "unet-00000002.safetensors").is_file(), errors
    assert not (folder / "interrupted" / "unet.safetensors").exists()
    status, errors = run_two(folder, kill=False)
    assert status == 0, errors
    return folder


def test_two_killed_processes_go_on_bit_for_bit(shared):
    assert numbers_in(shared / "interrupted") == numbers_in(shared / "whole")


def test_two_processes_make_the_same_files_as_one(shared, short):
    ours, theirs = numbers_in(shared / "whole"), numbers_in(short)
    assert ours.keys() == theirs.keys()
    for name in ("recipe.json", "tokenizer.model", "model/tokenizer.model"):
        assert ours[name] == theirs[name]


def test_two_processes_learn_what_one_does(shared, tmp_path):
    one = loop.train(SUM, Sum(), batch, tmp_path, HERE).state_dict()
    first, second = (read_tensors(shared / f"result{rank}.safetensors")[0] for rank in range(2))
    start = Sum().state_dict()
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=1e-6)
        assert (tensor - start[name]).abs().max() > 1e-2
    ours, theirs = (read_tensors(folder / "sum-00000004.safetensors")[0] for folder in (shared / "rank0", tmp_path))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


def test_two_processes_share_muon_out_and_both_have_all_of_it(shared):
    one, start = optimized(HERE), Matrices().state_dict()
    assert {"0.0.exp_avg", *(f"1.{number}.momentum_buffer" for number in range(3))} <= one.keys()
    for rank in range(2):
        two = read_tensors(shared / f"optimized{rank}.safetensors")[0]
        assert two.keys() == one.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-7)
    for name, tensor in start.items():
        assert (one[name] - tensor).abs().max() > 1e-2


def test_a_process_that_is_left_alone_says_so():
    """Started without torchrun, which would end it, perhaps before it notices."""
    work = "if here.first: sys.exit(1)\n    here.wait()"
    script = f"import sys\nfrom kolors_ref.mini.processes import processes\nwith processes('cpu') as here:\n    {work}"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    start = partial(subprocess.Popen, [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    first, second = (start(env={**common, "RANK": rank}) for rank in ("0", "1"))
    errors = second.communicate(timeout=100)[1]
    assert "ConnectionError: another process has ended; its own message or torchrun's says why\n" in errors
    first.communicate(timeout=100)
    assert (first.returncode, second.returncode) == (1, 1)


def test_only_the_first_process_writes(shared):
    assert sorted(path.name for path in (shared / "rank0").iterdir()) == ["sum-00000004.safetensors", "sum.jsonl"]
    assert list((shared / "rank1").iterdir()) == []


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "1")
