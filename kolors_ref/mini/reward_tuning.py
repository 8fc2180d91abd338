"""Stage five of training: the UNet draws, the judge says what is right, and it learns to draw more of that.

Reinforcement learning in the forward process (DiffusionNFT, Zheng et al. 2025): no step of a sampler is
differentiated. Right and wrong pictures are noised anew, as in any training of a denoiser, and what the UNet predicts
of them moves towards the noise in the right ones and away from that in the wrong ones. The policy is the UNet without
guidance.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain, cycle

import numpy as np
import torch
from torch import Tensor

from ..denoising import Denoising
from ..images import from_pixels
from ..models.glm import GLMEncoder
from ..models.unet import UNet
from ..models.vae import VAE
from ..sampling import NoiseSchedule, Sampler
from ..text_layout import TextEmbeddings, packed_layout
from ..tokenizer import Tokenizer
from .autoencoder import unit_noise
from .captions import LANGUAGES, word
from .claims import Claim, choose_claim
from .denoiser import DenoisingLoss, draw_timesteps, size_conditions
from .judge import judge
from .processes import Processes
from .prompts import mini_prompts
from .scenes import generator, pick, sample_scene, shuffle
from .world import CANVAS

GROUP, CAPTIONS = 8, 24
"""Pictures of a caption, which are compared with each other, and captions of a round."""
UPDATES = 6
"""Steps of the optimizer on the pictures of a round; then new ones are drawn."""
STEPS = 10
"""Sampling steps of a picture: enough to see what stands where."""
DECODED = 24
"""Pictures decoded at a time: a fifth faster than all at once on a CPU."""
BACK = 0.3
"""How far the weights go back, at the end of a stage, towards those it began with: 1 would be all the way."""
TO_ONE = 3
"""Informative pictures to every one whose caption is always drawn right."""
CLIP = 2.0
"""The advantage, in standard deviations of its group, at which it is clipped."""
ALONE, DENSE = 0.8, 0.1
"""The share of scenes with one thing that are kept, since these are drawn well already, and that of dense captions."""
BARE, COLOURED = 0.5, 0.6
"""The share of captions that say nothing of places and relations, which are harder to draw; of these, the share that
may state colours."""
BENCHMARK = {prompt.claim for prompt in mini_prompts("en")}
"""The claims of MiniPrompts, which this stage never makes; the same things in another order are another claim."""


class RewardLoss(DenoisingLoss):
    """The UNet with a loss whose value is the share of wrong pictures, and whose gradient leads to fewer of them."""

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timestep: Tensor,
        sizes: Tensor,
        text: Tensor,
        pooled: Tensor,
        bias: Tensor,
        rightness: Tensor,
        before: Tensor,
        wrong: Tensor,
    ) -> Tensor:
        """Returns the loss: the error of the prediction in right pictures, that of its mirror image in wrong ones.

        Args:
            latents, noise, timestep, sizes, text, pooled, bias: see `DenoisingLoss.forward`.
            rightness: (B,) in [0, 1], from the worst of its group to the best; 0.5 is neither.
            before: (B, 4, H/8, W/8), the mirror: the noise that the UNet predicted when the round began or, where
                rightness is 0.5, before the stage.
            wrong: (), the share of wrong pictures among this process's in the round.
        """
        noise_pred = self.predict(latents, noise, timestep, sizes, text, pooled, bias)
        rightness = rightness[:, None, None, None]
        towards = rightness * (noise_pred - noise).square()
        away = (1 - rightness) * (2 * before - noise_pred - noise).square()
        loss = (self.weight(timestep) * (towards + away)).mean()
        return loss - loss.detach() + wrong


@dataclass(frozen=True)
class Round:
    """Pictures that one process drew, and what the judge said of them.

    Attributes:
        latents: (N, 4, H/8, W/8).
        text: what they were drawn from, N rows.
        rightness: (N,), see `RewardLoss.forward`.
        order: the rows to learn from, in turn; see `learnt_from`.
        wrong: (), the share of wrong ones.
    """

    latents: Tensor
    text: TextEmbeddings
    rightness: Tensor
    order: list[int]
    wrong: Tensor


def reward_batches(
    policy: RewardLoss, draw: Callable[[UNet, int], Round], seed: int, batch_size: int, here: Processes
) -> Callable[[range], tuple[Tensor, ...]]:
    """Returns the function that makes batches of what the policy itself draws, anew every `UPDATES` steps.

    The policy is the moving average of the weights (soft updates, in the paper's terms): nothing restrains weights
    that are compared with themselves, and after some hundred steps everything that they draw is wrong. Where all
    pictures of a caption are alike, the mirror is what the UNet predicted before the stage: otherwise what is always
    right would be forgotten until it is always wrong, and neither teaches anything.

    Resuming from a checkpoint between two rounds is exact; within a round, new pictures are drawn for the rest of it.
    """
    before, start = (deepcopy(policy).eval().requires_grad_(False) for _ in range(2))
    begun, drawn = -1, None

    @torch.no_grad()
    def batch(numbers: range) -> tuple[Tensor, ...]:
        """The arguments of `RewardLoss.forward`."""
        nonlocal begun, drawn
        if numbers[0] // batch_size // UPDATES != begun:
            begun = numbers[0] // batch_size // UPDATES
            before.load_state_dict(policy.state_dict())
            drawn = draw(before.unet, begun)
        rows = [drawn.order[number // here.count % len(drawn.order)] for number in numbers]
        latents, text = drawn.latents[rows], drawn.text[rows]
        noise = torch.stack([unit_noise(seed, number, tuple(latents.shape[1:])) for number in numbers])
        timestep, sizes = draw_timesteps(numbers, len(policy.signal)), whole_sizes(len(rows))
        noised = (latents, *(tensor.to(here.device) for tensor in (noise, timestep, sizes)))
        told = (text.sequence, text.pooled, text.key_bias)
        with here.autocast():
            held, noise_pred = drawn.rightness[rows] == 0.5, torch.empty_like(latents)
            for network, some in ((before, ~held), (start, held)):
                if some.any():
                    noise_pred[some] = network.predict(*(tensor[some] for tensor in (*noised, *told)))
        return *noised, *told, drawn.rightness[rows], noise_pred, drawn.wrong

    return batch


def judged_drawing(
    vae: VAE,
    tokenizer: Tokenizer,
    text_encoder: GLMEncoder,
    schedule: NoiseSchedule,
    sampler: Sampler,
    seed: int,
    here: Processes,
) -> Callable[[UNet, int], Round]:
    """Returns the function that draws this process's pictures of a round with a UNet, and has them judged.

    Raises ValueError for a number of processes that cannot share the captions of a round evenly.
    """
    here.check_shares(CAPTIONS, "captions of a round of reward tuning")

    @torch.no_grad()
    def draw(unet: UNet, index: int) -> Round:
        """Draws and judges this process's part of a round."""
        numbers = range(index * CAPTIONS + here.rank, (index + 1) * CAPTIONS, here.count)
        claims, captions = zip(*(asked_for(seed, number) for number in numbers), strict=True)
        caption_of = [i for i in range(len(captions)) for _ in range(GROUP)]
        text = packed_layout(tokenizer(captions)).encode(text_encoder)[caption_of]
        shape = (unet.config.in_channels, *[unet.config.sample_size] * 2)
        noise = [unit_noise(seed, number * GROUP + i, shape) for number in numbers for i in range(GROUP)]
        plan = sampler.plan(schedule, STEPS)
        with here.autocast():
            sizes = whole_sizes(len(noise)).to(here.device)
            context = unet.prepare(text.sequence, text.pooled, sizes, text.key_bias)
            start = torch.stack(noise).to(here.device) * plan.initial_scale
            *_, last = Denoising(unet, [context], sampler, plan, start, 1.0, None, lambda: torch.randn_like(start))
            pictures = [from_pixels(vae.decode(latents), "np") for latents in last.latents.split(DECODED)]
        verdicts = [judge(picture, claims[i]).holds for picture, i in zip(chain(*pictures), caption_of, strict=True)]
        right = torch.tensor(verdicts, dtype=torch.float32, device=here.device)
        rightness = compared(right)
        order = learnt_from(right.tolist(), rightness.tolist(), generator(seed + 2, index))
        return Round(last.latents.float(), text, rightness, order, 1 - right.mean())

    return draw


def asked_for(seed: int, number: int) -> tuple[Claim, str]:
    """Draws a claim that MiniPrompts does not make, and its caption."""
    rng = generator(seed, number)
    while True:
        scene = sample_scene(rng)
        claim = choose_claim(scene, rng, rng.random() < DENSE)
        if rng.random() < BARE:
            claim = bare(claim, colours=rng.random() < COLOURED)
        wanted = len(scene.things) > 1 or rng.random() < ALONE
        if wanted and claim not in BENCHMARK:
            return claim, word(claim, rng, pick(rng, LANGUAGES))


def bare(claim: Claim, colours: bool) -> Claim:
    """The claim without places and relations; also without colours, unless `colours` or its shapes are not distinct."""
    shapes = {thing.shape for thing in claim.things}
    apart = len(shapes) == len(claim.things) and None not in shapes
    open_facts = {} if colours or not apart else {"colour": None}
    things = tuple(replace(thing, places=(), **open_facts) for thing in claim.things)
    return replace(claim, things=things, relations=())


def whole_sizes(count: int) -> Tensor:
    """The size conditions (B, 6) of pictures that were not enlarged."""
    return size_conditions(torch.full((count,), float(CANVAS)))


def some_way_back(rewarded: UNet, before: UNet) -> UNet:
    """Returns the rewarded UNet, its weights moved back towards those before (Ramé et al. 2024, WARP, its third stage).

    What rewards made it forget comes back sooner than what they taught it is lost.
    """
    weights = before.state_dict()
    moved = {name: weight.lerp(weights[name], BACK) for name, weight in rewarded.state_dict().items()}
    rewarded.load_state_dict(moved)
    return rewarded


def learnt_from(right: list[float], rightness: list[float], rng: np.random.Generator) -> list[int]:
    """The rows of a round to learn from, shuffled: informative ones, and to `TO_ONE` of these one always right.

    Informative rows are better or worse than others of their caption; where all are wrong, there is nothing to hold on
    to.

    Args:
        right, rightness: of each row, see `compared`.
        rng: determines the order.
    """
    rows = shuffle(rng, range(len(rightness)))
    rest = [row for row in rows if rightness[row] == 0.5 and right[row]]
    telling = [row for row in rows if rightness[row] != 0.5]
    order, fillers = [], cycle(rest)
    for i, row in enumerate(telling):
        if rest and i % TO_ONE == 0:
            order.append(next(fillers))
        order.append(row)
    return order or rest or rows


def compared(right: Tensor) -> Tensor:
    """How right each picture is beside those of its caption: (N,) in [0, 1]; 0.5 where all of them are alike.

    Args:
        right: (N,), 1 for right and 0 for wrong, `GROUP` pictures of each caption in turn.
    """
    groups = right.view(-1, GROUP)
    spread = groups.std(1, correction=0, keepdim=True)
    advantage = (groups - groups.mean(1, keepdim=True)) / spread.clamp(min=1e-3)
    return (0.5 + 0.5 * (advantage / CLIP).clamp(-1, 1)).flatten()
