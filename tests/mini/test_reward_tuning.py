"""Reward tuning: what is asked for, how pictures are compared, what the loss is, and that rewards grow."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train_stages import GLM, HERE, UNET, VAE, seeded

from kolors_ref import KolorsPipeline
from kolors_ref.config import ScheduleConfig
from kolors_ref.mini import reward_tuning
from kolors_ref.mini.autoencoder import AutoencoderLoss
from kolors_ref.mini.judge import Verdict
from kolors_ref.mini.language_model import LanguageModel
from kolors_ref.mini.loop import average_of, train
from kolors_ref.mini.processes import Processes
from kolors_ref.mini.prompts import mini_prompts
from kolors_ref.mini.recipe import Recipe, Stage
from kolors_ref.mini.reward_tuning import (
    BACK,
    BENCHMARK,
    GROUP,
    UPDATES,
    RewardLoss,
    Round,
    asked_for,
    compared,
    judged_drawing,
    learnt_from,
    reward_batches,
    some_way_back,
)
from kolors_ref.mini.scenes import generator
from kolors_ref.mini.tokenizer_training import train_tokenizer
from kolors_ref.mini.world import HELD_OUT_COLOURS, HELD_OUT_TEXTURES, Scene
from kolors_ref.sampling import NoiseSchedule, get_sampler
from kolors_ref.tokenizer import Tokenizer

SCHEDULE = NoiseSchedule(ScheduleConfig())
NO_SCENE = Scene("white", ())


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """An autoencoder, a tokenizer and a text encoder that know nothing."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(path, Recipe(tokenizer_captions=500))
    return seeded(AutoencoderLoss, VAE).vae, Tokenizer(path), seeded(LanguageModel, GLM).encoder


@pytest.fixture
def policy():
    """A UNet with random weights."""
    torch.manual_seed(0)
    return RewardLoss(UNET, SCHEDULE)


def drawing(parts, here=HERE):
    return judged_drawing(*parts, SCHEDULE, get_sampler("dpmpp-2m-karras"), 5, here)


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for
# ---------------------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_for_that_the_benchmark_asks():
    asked = [asked_for(0, number) for number in range(3000)]
    assert asked[:3] == [asked_for(0, number) for number in range(3)]
    assert not {claim for claim, _ in asked} & {prompt.claim for prompt in mini_prompts()}
    assert len({caption for _, caption in asked}) > 2800
    things = [thing for claim, _ in asked for thing in claim.things]
    assert not HELD_OUT_COLOURS & {(thing.shape, thing.colour) for thing in things}
    assert not HELD_OUT_TEXTURES & {(thing.shape, thing.texture) for thing in things}


def test_the_benchmark_would_be_asked_for_otherwise(monkeypatch):
    monkeypatch.setattr(reward_tuning, "BENCHMARK", set())
    assert {asked_for(0, number)[0] for number in range(3000)} & BENCHMARK


def test_most_captions_are_of_several_things_and_many_leave_their_places_open():
    claims = [asked_for(1, number)[0] for number in range(2000)]
    several = [claim for claim in claims if sum(thing.count for thing in claim.things) > 1]
    assert len(several) / len(claims) == pytest.approx(0.65 / (0.65 + 0.8 * 0.35), abs=0.04)
    bare = [claim for claim in several if not claim.relations and not any(thing.places for thing in claim.things)]
    assert len(bare) / len(several) > 0.6


def test_some_captions_tell_things_by_their_shapes_alone():
    claims = [asked_for(1, number)[0] for number in range(2000)]
    different = [claim for claim in claims if len({thing.shape for thing in claim.things}) == len(claim.things) > 1]
    uncoloured = [claim for claim in different if not any(thing.colour for thing in claim.things)]
    assert 0.15 < len(uncoloured) / len(different) < 0.35
    alike = [claim for claim in claims if len({thing.shape for thing in claim.things}) < len(claim.things)]
    assert alike
    assert all(any(thing.colour for thing in claim.things) for claim in alike)


def test_weights_go_some_of_the_way_back(policy):
    before, rewarded = (type(policy.unet)(policy.unet.config) for _ in range(2))
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.fill_(1.0)
        for parameter in rewarded.parameters():
            parameter.fill_(2.0)
    moved = some_way_back(rewarded, before)
    assert all(torch.allclose(parameter, torch.tensor(2 - BACK)) for parameter in moved.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# How pictures are compared
# ---------------------------------------------------------------------------------------------------------------------


def test_pictures_are_compared_with_those_of_their_caption():
    right = torch.zeros(5, GROUP)
    right[0] = 1
    right[2, :4] = 1
    right[3, 0] = 1
    right[4, 1:] = 1
    groups = compared(right.flatten()).view(5, GROUP)
    assert (groups[:2] == 0.5).all()  # all right, all wrong: nothing to be learnt
    assert groups[2].tolist() == [0.75] * 4 + [0.25] * 4
    assert groups[3, 0] == 1  # the only right one
    assert groups[3, 1:].tolist() == pytest.approx([0.5 - 0.25 * 7**-0.5] * 7)
    torch.testing.assert_close(groups[4], 1 - groups[3])


def test_three_pictures_that_tell_something_come_with_one_that_is_always_right():
    right = [1.0] * 4 + [0.0] * 4 + [1.0, 0.0] * 8
    rightness = [0.5] * 8 + [1.0, 0.3] * 8
    order = learnt_from(right, rightness, generator(0, 0))
    assert sorted(row for row in order if row > 7) == list(range(8, 24))
    assert [rightness[row] == 0.5 for row in order] == ([True] + [False] * 3) * 5 + [True, False]
    assert {row for row in order if row < 8} == {0, 1, 2, 3}
    assert order == learnt_from(right, rightness, generator(0, 0)) != learnt_from(right, rightness, generator(0, 1))
    assert sorted(learnt_from([1.0] * 3, [0.5] * 3, generator(0, 0))) == [0, 1, 2]
    assert sorted(learnt_from([0.0] * 3, [0.5] * 3, generator(0, 0))) == [0, 1, 2]  # nothing else to learn from
    assert sorted(learnt_from([1.0, 0.0], [1.0, 0.0], generator(0, 0))) == [0, 1]


def test_a_round_is_drawn_from_its_number_and_shared_out(parts, policy, monkeypatch):
    """Two processes draw what one does, each its captions; and those that tell something are known."""
    monkeypatch.setattr(reward_tuning, "CAPTIONS", 4)
    monkeypatch.setattr(reward_tuning, "judge", lambda picture, claim: Verdict(picture[0, 0, 0] > 0.5, NO_SCENE))
    whole = drawing(parts)(policy.unet, 3)
    again, other = drawing(parts)(policy.unet, 3), drawing(parts)(policy.unet, 4)
    assert torch.equal(whole.latents, again.latents)
    assert whole.order == again.order
    assert not torch.allclose(whole.latents, other.latents)
    assert whole.latents.shape == (4 * GROUP, 4, 16, 16)
    told = (whole.rightness != 0.5).nonzero().flatten().tolist()
    assert sorted({*whole.order} & {*told}) == told
    for rank in range(2):
        share = drawing(parts, Processes(rank, 2, torch.device("cpu")))(policy.unet, 3)
        theirs = whole.latents.view(4, GROUP, 4, 16, 16)[rank::2].flatten(0, 1)
        torch.testing.assert_close(share.latents, theirs, rtol=0.05, atol=0.05)


def test_captions_that_cannot_be_shared_evenly_are_refused(parts):
    with pytest.raises(ValueError, match=r"the 24 captions of a round .* shared evenly by 16 processes"):
        drawing(parts, Processes(0, 16, torch.device("cpu")))


def test_where_all_pictures_are_alike_a_batch_is_made_all_the_same(parts, policy, monkeypatch):
    monkeypatch.setattr(reward_tuning, "CAPTIONS", 2)
    monkeypatch.setattr(reward_tuning, "judge", lambda picture, claim: Verdict(False, NO_SCENE))
    batch = reward_batches(policy, drawing(parts), 0, 4, HERE)(range(4))
    assert batch[7].tolist() == [0.5] * 4
    assert batch[9] == 1
    assert policy(*batch) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def round_of_noise(parts):
    """A round of pictures that are nothing but noise, half of which tell something."""
    captions = [f"a red circle {i}" for i in range(6)]
    text = reward_tuning.packed_layout(parts[1](captions)).encode(parts[2])
    latents = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    rightness = torch.tensor([0.5, 1.0, 0.5, 0.2, 0.5, 0.7])
    return Round(latents, text, rightness, [5, 1, 3], torch.tensor(0.4))


def test_batches_are_made_of_the_telling_pictures_until_the_round_is_over(policy, round_of_noise):
    drawn = []

    def draw(unet, number):
        drawn.append((number, [parameter.clone() for parameter in unet.parameters()]))
        return round_of_noise

    batches = reward_batches(policy, draw, 9, 6, HERE)
    first = batches(range(6))
    assert torch.equal(first[0], round_of_noise.latents[[5, 1, 3, 5, 1, 3]])
    assert first[7].tolist() == pytest.approx([0.7, 1.0, 0.2] * 2)
    assert (first[2].min() >= 0, first[2].max() < 1100, len(set(first[2].tolist()))) == (True, True, 6)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    second = batches(range(6, 12))
    assert not torch.equal(first[1], second[1])
    with torch.no_grad():  # what the UNet predicted when the round began
        now = policy.unet(policy.noisy(*second[:3]), second[2], policy.unet.prepare(*second[4:6], second[3], second[6]))
    assert not torch.allclose(now, second[8], rtol=0.02, atol=0.02)
    batches(range(6 * UPDATES - 6, 6 * UPDATES))
    assert [number for number, _ in drawn] == [0]
    batches(range(6 * UPDATES, 6 * UPDATES + 6))
    assert [number for number, _ in drawn] == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(drawn[1][1], policy.unet.parameters(), strict=True))


def test_pictures_that_tell_nothing_hold_the_unet_to_what_it_predicted_before_the_stage(policy, round_of_noise):
    drawn = replace(round_of_noise, order=[0, 1, 2, 3, 4, 5])
    before, after = (reward_batches(network, lambda *_: drawn, 9, 6, HERE) for network in (deepcopy(policy), policy))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    batch, moved = before(range(6)), after(range(6))
    held = batch[7] == 0.5
    assert held.tolist() == [True, False] * 2 + [True, False]
    torch.testing.assert_close(moved[8][held], batch[8][held])
    assert ((moved[8] - batch[8])[~held].abs().amax((1, 2, 3)) > 0.02).all()


def test_the_loss_is_the_share_of_wrong_pictures_and_leads_from_them(policy, round_of_noise):
    """Where a round begins its gradient is that of the denoising error, weighted by how right a picture is."""
    policy = policy.double()
    batch = reward_batches(policy, lambda *_: round_of_noise, 9, 6, HERE)(range(6))
    batch = [tensor.double() if tensor.is_floating_point() else tensor for tensor in batch]
    latents, noise, timestep, sizes, text, pooled, bias, rightness, _, wrong = batch
    context = policy.unet.prepare(text, pooled, sizes, bias)
    noise_pred = policy.unet(policy.noisy(latents, noise, timestep), timestep, context)
    loss = policy(*batch[:8], noise_pred.detach(), wrong)
    assert loss.item() == pytest.approx(0.4)
    gradient = torch.autograd.grad(loss, list(policy.parameters()))
    context = policy.unet.prepare(text, pooled, sizes, bias)
    noise_pred = policy.unet(policy.noisy(latents, noise, timestep), timestep, context)
    advantage = (2 * rightness - 1).view(-1, 1, 1, 1)
    weighted = (policy.weight(timestep) * advantage * (noise_pred - noise).square()).mean()
    theirs = torch.autograd.grad(weighted, list(policy.parameters()))
    ours, theirs = (torch.cat([part.flatten() for part in parts]) for parts in (gradient, theirs))
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()  # predictions are rounded to fp32


def test_the_loss_has_its_least_where_wrong_pictures_are_mirrored(policy, round_of_noise):
    """Towards the noise in right pictures; in wrong ones to the other side of what was predicted, and no further."""
    batch = list(reward_batches(policy, lambda *_: round_of_noise, 9, 6, HERE)(range(6)))
    noise = batch[1]
    rightness = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5, 0.5])
    right = rightness.view(-1, 1, 1, 1)
    best = right * noise + (1 - right) * (2 * batch[8] - noise)
    noise_pred = best.clone().requires_grad_(True)
    policy.unet = replace_forward(policy.unet, noise_pred)
    policy(*batch[:7], rightness, *batch[8:]).backward()
    rounding = noise_pred.grad.abs().amax((1, 2, 3))
    with torch.no_grad():
        noise_pred += 1
    noise_pred.grad = None
    policy(*batch[:7], rightness, *batch[8:]).backward()
    assert (noise_pred.grad.amin((1, 2, 3)) > 1e5 * rounding).all()


def replace_forward(unet, noise_pred):
    """A UNet that predicts what it is told to."""

    class Told(type(unet)):
        def forward(self, latents, timestep, context):
            return noise_pred

    unet.__class__ = Told
    return unet


LATER = (100, 101)
"""Rounds that nothing is learnt from: 48 pictures each."""


def test_rewards_grow(monkeypatch, tmp_path):
    """With a judge who likes the brighter half of the pictures, the miniature draws more such after four rounds."""
    pipe = KolorsPipeline.from_pretrained("mini", dtype=torch.float32)
    policy = RewardLoss(pipe.unet.config, SCHEDULE)
    policy.unet.load_state_dict(pipe.unet.state_dict())
    draw = drawing((pipe.vae, pipe.tokenizer, pipe.text_encoder))
    monkeypatch.setattr(reward_tuning, "CAPTIONS", 6)
    monkeypatch.setattr(reward_tuning, "STEPS", 4)
    seen = []
    monkeypatch.setattr(
        reward_tuning, "judge", lambda picture, claim: seen.append(picture.mean()) or Verdict(False, NO_SCENE)
    )
    for number in LATER:
        draw(policy.unet, number)
    middle = np.median(seen)
    monkeypatch.setattr(reward_tuning, "judge", lambda picture, claim: Verdict(picture.mean() > middle, NO_SCENE))
    wrong = [draw(policy.unet, number).wrong.item() for number in LATER]
    assert np.mean(wrong) == pytest.approx(0.5, abs=0.03)
    stage = Stage("reward", 4 * UPDATES, 32, 5e-4, 2.5e-4, weight_decay=0.0, warmup=6, ema_decay=0.9)
    average = average_of(stage, policy)
    batches = reward_batches(average.module, draw, 0, stage.batch_size, HERE)
    trained = train(stage, policy, batches, tmp_path, HERE, average=average)
    wrong = [draw(trained.unet, number).wrong.item() for number in LATER]
    assert np.mean(wrong) < 0.33
