"""Checkpoints of a training run: whole or not there, refused when anything in them changed, the last two kept."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kolors_ref.mini.training_state import (
    TrainingState,
    load_state,
    read_result,
    read_tensors,
    save_state,
    state_files,
    write_tensors,
)

SETTINGS = '{"name": "tiny"}'
TENSORS = {
    "module.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "average.n_averaged": torch.tensor(7),
    "optimizer.0.exp_avg": torch.tensor([0.5, -1.0], dtype=torch.bfloat16),
    "small": torch.tensor([True, False, True]),
    "none": torch.empty(0, 4),
}


def save(folder, step, value=0.0):
    save_state(folder, "tiny", TrainingState(step, SETTINGS, {**TENSORS, "value": torch.tensor(value)}))


def load(folder, settings=SETTINGS, previous=False):
    return load_state(folder, "tiny", settings, previous)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flipped(path, position):
    """Turns over one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def shortened(path):
    path.write_bytes(path.read_bytes()[:-3])


def emptied(path):
    path.write_bytes(b"")


def replaced(path):
    path.write_bytes(b"not a checkpoint, but long enough to be taken for the beginning of one")


def rewritten(path):
    """A sound file of the same format by another hand, so without the digest."""
    save_file(TENSORS, path, {"step": "20", "settings": SETTINGS})


@pytest.fixture
def two(tmp_path):
    """A folder with checkpoints of steps 10 and 20."""
    save(tmp_path, 10, 1.0)
    save(tmp_path, 20, 2.0)
    return tmp_path


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    save(tmp_path, 10)
    state = load(tmp_path)
    assert (state.step, state.settings) == (10, SETTINGS)
    assert state.tensors.keys() == {*TENSORS, "value"}
    for name, tensor in TENSORS.items():
        assert state.tensors[name].dtype == tensor.dtype
        assert torch.equal(state.tensors[name], tensor)


def test_views_and_gradients_are_written_as_plain_tensors(tmp_path):
    weight = torch.arange(6.0).view(2, 3).requires_grad_()
    write_tensors(tmp_path / "file.safetensors", {"turned": weight.T, "part": weight[:, 1]})
    tensors, facts = read_tensors(tmp_path / "file.safetensors")
    assert torch.equal(tensors["turned"], weight.detach().T)
    assert torch.equal(tensors["part"], weight.detach()[:, 1])
    assert facts == {}


def test_no_checkpoint_is_no_state(tmp_path):
    assert load(tmp_path) is None
    assert load(tmp_path, previous=True) is None


def test_the_last_two_are_kept_whatever_their_number_of_digits(tmp_path):
    for step in (9, 10, 100, 99_999, 100_000):
        save(tmp_path, step, float(step))
    assert names(tmp_path) == ["tiny-00099999.safetensors", "tiny-00100000.safetensors"]
    assert load(tmp_path).step == 100_000
    assert load(tmp_path, previous=True).tensors["value"] == 99_999


def test_only_checkpoints_of_the_stage_count(two):
    save_state(two, "tiny-tuning", TrainingState(30, SETTINGS, TENSORS))
    write_tensors(two / "tiny.safetensors", TENSORS)
    write_tensors(two / "tiny-1.safetensors", TENSORS)
    assert [path.name for path in state_files(two, "tiny")] == [
        "tiny-00000010.safetensors",
        "tiny-00000020.safetensors",
    ]
    assert load(two).step == 20


def full_while_writing(path, content):
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_at_the_end(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [(Path, "write_bytes", full_while_writing), (os, "fsync", full_at_the_end)],
    ids=["while writing", "at the end"],
)
def test_a_full_disk_costs_nothing_that_was_saved(two, monkeypatch, owner, name, fault):
    before = {path.name: path.read_bytes() for path in two.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fault)
        with pytest.raises(OSError, match=r"tiny-00000030\.safetensors cannot be written: No space left on device$"):
            save(two, 30)
        with pytest.raises(OSError, match="No space left"):
            save(two, 20, 3.0)  # the one there stays, too
    assert {path.name: path.read_bytes() for path in two.iterdir()} == before


def test_an_interruption_while_writing_leaves_nothing(two, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(two, 30)
    assert names(two) == ["tiny-00000010.safetensors", "tiny-00000020.safetensors"]


def test_a_folder_that_is_gone_is_one_sentence(tmp_path):
    with pytest.raises(OSError, match=r"tiny-00000010\.safetensors cannot be written: No such file or directory$"):
        save(tmp_path / "gone", 10)


@pytest.mark.parametrize("damage", [shortened, emptied, replaced, rewritten])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_taken_on_request(two, damage):
    damage(two / "tiny-00000020.safetensors")
    with pytest.raises(ValueError, match=r"tiny-00000020\.safetensors is damaged: .*; --previous goes back"):
        load(two)
    state = load(two, previous=True)
    assert (state.step, state.tensors["value"].item()) == (10, 1.0)


def test_with_both_damaged_the_advice_is_another(two):
    for path in two.iterdir():
        shortened(path)
    with pytest.raises(ValueError, match=r"tiny-00000010\.safetensors is damaged: .*; remove it to go on without it$"):
        load(two, previous=True)


def test_there_is_no_other_to_go_back_to(tmp_path):
    save(tmp_path, 10)
    shortened(tmp_path / "tiny-00000010.safetensors")
    with pytest.raises(ValueError, match=r"tiny-00000010\.safetensors is damaged: .*; remove it to go on without it$"):
        load(tmp_path)


def test_there_is_none_before_the_only_one(tmp_path):
    """To begin anew without a word would be to throw away what was learnt."""
    assert load(tmp_path, previous=True) is None
    save(tmp_path, 10)
    with pytest.raises(
        ValueError,
        match=r"no checkpoint before .*tiny-00000010\.safetensors; remove this one to start the stage again$",
    ):
        load(tmp_path, previous=True)


def test_any_byte_that_changed_is_noticed(tmp_path):
    """In the header as well: there the step and the settings stand, which the digest does not cover."""
    save_state(tmp_path, "tiny", TrainingState(10, SETTINGS, {"value": torch.tensor([1.0, 2.0])}))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped(path, position)
        with pytest.raises(ValueError, match=r"is damaged|with other settings") as caught:
            load(tmp_path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    assert load(tmp_path).step == 10


def test_other_settings_are_refused(two):
    with pytest.raises(ValueError, match=r"tiny-00000020\.safetensors was made with other settings; train in another"):
        load(two, settings='{"name": "tiny", "steps": 5}')


def test_a_damaged_result_says_how_to_make_it_again(tmp_path):
    path = tmp_path / "tiny.safetensors"
    write_tensors(path, TENSORS)
    assert torch.equal(read_result(path)["module.weight"], TENSORS["module.weight"])
    flipped(path, -1)
    with pytest.raises(
        ValueError, match=r"tiny\.safetensors is damaged: .*; remove it, and the next run makes it again"
    ):
        read_result(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*tiny\.safetensors"):
        read_result(path)
