"""The recipe of the miniature Kolors: the sizes of its networks, and the stages of its training."""

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..config import GLMConfig, ScheduleConfig, UNetConfig, VAEConfig

PIECES = 1000
"""Pieces of the SentencePiece model, its 256 bytes included."""

GLM = GLMConfig(
    vocab_size=1024,
    hidden_size=128,
    ffn_hidden_size=352,
    num_layers=4,
    num_heads=4,
    head_dim=32,
    num_kv_groups=2,
    max_positions=256,
)
VAE = VAEConfig(channels=(16, 32, 64, 64), layers_per_block=1, norm_groups=4)
UNET = UNetConfig(
    channels=(64, 80, 96),
    transformer_depth=(0, 1, 1),
    num_heads=(1, 2, 3),
    layers_per_block=1,
    text_dim=GLM.hidden_size,
    cross_attention_dim=128,
    pooled_dim=GLM.hidden_size,
    size_embed_dim=16,
    norm_groups=8,
    sample_size=16,
)
SCHEDULE = ScheduleConfig()
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "use_karras_sigmas": True,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
"""The sampler that the miniature asks for, as in scheduler_config.json; the betas are the recipe's."""

GUIDANCE_SCALE = 1.5
"""The guidance scale that the miniature asks for: with a larger one it draws more things than it is asked for."""


@dataclass(frozen=True)
class Stage:
    """One stage of training. The learning rate rises linearly, stays, and falls as a cosine (Hu et al. 2024, 4).

    Attributes:
        name: of the stage, and of its files.
        steps: of the optimizer.
        batch_size: examples of one step, over all processes together.
        learning_rate, final_learning_rate: of AdamW, at the end of the warm-up and at the end.
        matrix_rate: the learning rate of Muon, for the matrices of the network's blocks, at the end of the warm-up; it
            falls as the other does. None leaves them to AdamW.
        weight_decay: of both.
        warmup: steps.
        cooldown: the share of the steps, the last of them, over which the learning rate falls.
        ema_decay: the most that the decay of the moving average of the weights can be, which is what a stage gives; up
            to 9 / (1 - ema_decay) steps the average simply covers about the last ninth of them.
        save_every: steps between checkpoints; in reward tuning, a multiple of a round's (`reward_tuning.UPDATES`).
    """

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    final_learning_rate: float
    matrix_rate: float | None = None
    weight_decay: float = 0.01
    warmup: int = 100
    cooldown: float = 1.0
    ema_decay: float = 0.999
    save_every: int = 200

    def rate_factor(self, step: int) -> float:
        """What the learning rates are multiplied by at a step, counted from 0."""
        last = self.final_learning_rate / self.learning_rate
        remaining = min(1.0, max(0, self.steps - step) / max(1, self.steps * self.cooldown))
        decayed = last + (1 - last) * 0.5 * (1 + math.cos(math.pi * (1 - remaining)))
        return decayed * min(1.0, (step + 1) / max(1, self.warmup))

    def scaled(self, factor: float) -> "Stage":
        """The same stage with more or fewer steps; one that is left out stays so."""
        scale = lambda count: max(min(count, 1), round(count * factor))
        return replace(self, steps=scale(self.steps), warmup=scale(self.warmup))


STAGES = ("glm", "vae", "vae_whole", "vae_decoder", "unet", "unet_tuning", "unet_reward", "unet_reward_again")
"""The stages of a recipe, in their order."""


@dataclass(frozen=True)
class Recipe:
    """What a run is asked to do, which may differ between runs; sizes and other constants are in the code.

    Attributes:
        seed: of data, weights and noise.
        tokenizer_captions: captions that the SentencePiece model is made from.
        glm, vae, vae_whole, vae_decoder, unet, unet_tuning, unet_reward, unet_reward_again: the stages; those of the
            autoencoder work on crops, on whole pictures and, the decoder alone, on things inside others; those of the
            UNet on the broad mix of pictures, on the clean subset and, twice, on its own.
        scenes, clean_scenes: pictures whose latents are kept for the first two stages of the UNet.
        schedule: the noise schedule.
        dense_share: the share of dense captions that the UNet sees; the rest are short.
        bag_of_words: whether the text encoder's layers are left out, so that each token is embedded by itself.
    """

    seed: int = 0
    tokenizer_captions: int = 20000
    glm: Stage = Stage("glm", 6000, 32, 1.5e-3, 1e-5, matrix_rate=5e-3, weight_decay=0.1)
    vae: Stage = Stage("vae", 5500, 24, 2e-3, 2e-4)
    vae_whole: Stage = Stage("vae-whole", 1000, 4, 2e-4, 1e-6)
    vae_decoder: Stage = Stage("vae-decoder", 3000, 4, 5e-4, 1e-5)
    unet: Stage = Stage("unet", 7000, 64, 1e-3, 5e-4, matrix_rate=2e-3, cooldown=1 / 3, ema_decay=0.9995)
    unet_tuning: Stage = Stage("unet-tuning", 7500, 64, 5e-4, 5e-6, matrix_rate=1e-3, cooldown=2 / 3, ema_decay=0.9995)
    unet_reward: Stage = Stage(
        "unet-reward", 2820, 64, 2e-4, 2e-5, weight_decay=0.0, warmup=12, cooldown=0.7, ema_decay=0.97, save_every=60
    )
    unet_reward_again: Stage = Stage(
        "unet-reward-again", 600, 64, 1e-4, 1e-5, weight_decay=0.0, warmup=12, ema_decay=0.97, save_every=60
    )
    scenes: int = 24576
    clean_scenes: int = 24576
    schedule: ScheduleConfig = SCHEDULE
    dense_share: float = 0.25
    bag_of_words: bool = False

    def scaled(self, factor: float) -> "Recipe":
        """The same recipe made longer or shorter: all stages and all data."""
        stages = {field: getattr(self, field).scaled(factor) for field in STAGES}
        counts = {
            field: max(64, round(getattr(self, field) * factor))
            for field in ("tokenizer_captions", "scenes", "clean_scenes")
        }
        return replace(self, **stages, **counts)

    def without(self, *stages: str) -> "Recipe":
        """The same recipe with some stages left out."""
        return replace(self, **{field: replace(getattr(self, field), steps=0) for field in stages})

    def with_unet_steps(self, steps: int) -> "Recipe":
        """The same recipe with another number of steps of concept learning; what follows changes in proportion."""
        later = STAGES[STAGES.index("unet") + 1 :]
        scaled = {field: getattr(self, field).scaled(steps / self.unet.steps) for field in later}
        warmup = min(self.unet.warmup, max(1, steps // 10))
        return replace(self, unet=replace(self.unet, steps=steps, warmup=warmup), **scaled)

    def record(self) -> dict[str, Any]:
        """The contents of a run's recipe.json, as they are read back."""
        return json.loads(json.dumps(asdict(self)))

    def scheduler_config(self) -> dict[str, Any]:
        """The contents of the miniature's scheduler_config.json."""
        betas = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        return {**SCHEDULER, **{name: value for name, value in asdict(self.schedule).items() if name in betas}}
