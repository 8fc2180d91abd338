"""Training the miniature Kolors from nothing: every stage in turn, each from where it stopped, then the checkpoint."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from weights_conversion.files import read_json, write_json, write_safetensors

from ..allocator import keep_freed_memory
from ..config import VAEConfig
from ..models.glm import GLMEncoder
from ..models.vae import VAE
from ..sampling import NoiseSchedule, read_scheduler_config
from ..tokenizer import Tokenizer
from ..whole_files import remove_unfinished, written
from . import recipe as sizes
from .autoencoder import CROP, AutoencoderLoss, DecoderLoss, decoder_batches, measured_scale, picture_batches
from .denoiser import DenoisingLoss, Latents, cache_latents, denoising_batches
from .first_weights import first_weights
from .language_model import LanguageModel, bag_of_words, caption_batches
from .loop import average_of, train
from .processes import Processes
from .recipe import STAGES, Recipe, Stage
from .reward_tuning import CAPTIONS, RewardLoss, judged_drawing, reward_batches, some_way_back
from .tokenizer_training import train_tokenizer
from .training_state import read_result, write_tensors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CLEAN_SEED, REWARD_SEED = 1, 100
"""Added to the recipe's seed for the pictures of quality tuning, and for the captions of reward tuning."""


def train_mini(folder: Path, recipe: Recipe, here: Processes, previous: bool = False) -> Path:
    """Trains a miniature, going on where an interrupted run stopped.

    Args:
        folder: for everything that is written: checkpoints, curves, latents, and finally the model.
        recipe: what is done.
        here: this process.
        previous: for the stage that is under way, go on from the last checkpoint but one.

    Returns:
        The folder of the model: a checkpoint in this project's layout.

    Raises:
        ValueError: a checkpoint is damaged, the folder holds a run of another recipe or one that is under way, or the
            processes cannot share the batches of some stage evenly.
        OSError: something cannot be written.
    """
    check_shares(recipe, here)
    folder.mkdir(parents=True, exist_ok=True)
    if here.device.type == "cpu":
        keep_freed_memory()
    run, model = Run(folder, recipe, here, previous), folder / "model"
    with ExitStack() as locks:
        here.first_does(lambda: locks.enter_context(held(folder)))
        run.begin()
        run.tokenizer()
        language_model = run.language_model()
        vae = run.autoencoder()
        unet = run.rewarded(run.denoiser(language_model.encoder, vae), language_model.encoder, vae)
        here.first_does(lambda: export(model, folder / "tokenizer.model", recipe, language_model, unet, vae))
    return model


class Run:
    """A training run in a folder: its stages, each of which is done once and then read from its file."""

    def __init__(self, folder: Path, recipe: Recipe, here: Processes, previous: bool) -> None:
        self.folder, self.recipe, self.here, self.previous = folder, recipe, here, previous

    def begin(self) -> None:
        """Notes the recipe, or raises ValueError if the folder holds a run of another; clears up after a killed run."""

        def begin() -> None:
            note_recipe(self.folder, self.recipe)
            for folder in (self.folder, self.folder / "model"):
                remove_unfinished(folder)

        self.here.first_does(begin)

    def tokenizer(self) -> Tokenizer:
        """The SentencePiece model."""
        path = self.folder / "tokenizer.model"

        def make() -> None:
            if not path.is_file():
                with written(path) as beside:
                    train_tokenizer(beside, self.recipe)

        self.here.first_does(make)
        return Tokenizer(path)

    def language_model(self) -> LanguageModel:
        """The text encoder, trained as a language model and then frozen."""
        model = self.seeded(lambda: LanguageModel(sizes.GLM))
        if self.recipe.bag_of_words:
            return bag_of_words(model).eval().requires_grad_(False)
        return self.stage(self.recipe.glm, model, caption_batches(self.tokenizer(), self.recipe.seed))

    def autoencoder(self) -> VAE:
        """The autoencoder, with the scale of its latents measured and in its config."""
        seed = self.recipe.seed
        loss = self.seeded(lambda: AutoencoderLoss(sizes.VAE))
        loss = self.stage(self.recipe.vae, loss, picture_batches(seed, sizes.VAE, CROP))
        loss = self.stage(self.recipe.vae_whole, loss, picture_batches(seed, sizes.VAE))
        path = self.folder / "vae-scale.json"

        def measure() -> None:
            if not path.is_file():
                scale = round(measured_scale(loss.vae, seed, self.here.device), 5)
                with written(path) as beside:
                    write_json(beside, {"scaling_factor": scale})

        self.here.first_does(measure)
        vae = with_config(loss.vae, replace(sizes.VAE, scaling_factor=read_scale(path)))
        if self.recipe.vae_decoder.steps:
            alone = self.stage(self.recipe.vae_decoder, DecoderLoss(vae), decoder_batches(seed, vae, self.here))
            vae.post_quant_conv, vae.decoder = alone.post_quant_conv, alone.decoder
        return vae

    def denoiser(self, text_encoder: GLMEncoder, vae: VAE) -> DenoisingLoss:
        """The UNet: concept learning on the broad mix, then quality tuning on the clean subset."""
        schedule, tokenizer = NoiseSchedule(self.recipe.schedule), self.tokenizer()
        loss = self.seeded(lambda: DenoisingLoss(sizes.UNET, schedule))
        if not self.weights(self.recipe.unet).is_file():
            first_weights(loss.unet, tokenizer, text_encoder, self.recipe.seed)
        for stage, clean, count in (
            (self.recipe.unet, False, self.recipe.scenes),
            (self.recipe.unet_tuning, True, self.recipe.clean_scenes),
        ):
            if not stage.steps:
                continue
            seed = self.recipe.seed + CLEAN_SEED * clean
            empty = Latents(torch.empty(0), torch.empty(0))
            done = self.weights(stage).is_file()
            name = "latents-clean" if clean else "latents"
            cached = empty if done else cache_latents(vae, self.folder, name, seed, count, clean, self.here)
            batches = denoising_batches(
                cached,
                seed,
                clean,
                self.recipe.dense_share,
                self.recipe.schedule.num_train_timesteps,
                tokenizer,
                text_encoder,
            )
            loss = self.stage(stage, loss, batches)
        return loss

    def rewarded(self, tuned: DenoisingLoss, text_encoder: GLMEncoder, vae: VAE) -> nn.Module:
        """The UNet after two stages of reward tuning, each followed by moving its weights some way back."""
        schedule, unet = NoiseSchedule(self.recipe.schedule), tuned.unet
        _, sampler = read_scheduler_config(self.recipe.scheduler_config())
        for count, stage in enumerate((self.recipe.unet_reward, self.recipe.unet_reward_again), 1):
            if not stage.steps:
                continue
            seed = self.recipe.seed + REWARD_SEED * count
            loss = RewardLoss(sizes.UNET, schedule).to(self.here.device)
            loss.unet.load_state_dict(unet.state_dict())
            draw = judged_drawing(vae, self.tokenizer(), text_encoder, schedule, sampler, seed, self.here)
            average = average_of(stage, loss)
            batches = reward_batches(average.module, draw, seed + 1, stage.batch_size, self.here)
            unet = some_way_back(self.stage(stage, loss, batches, average).unet, unet)
        return unet

    def stage(
        self,
        stage: Stage,
        module: nn.Module,
        batches: Callable[[range], tuple[Tensor, ...]],
        average: AveragedModel | None = None,
    ) -> nn.Module:
        """Trains a module, unless that was done before; gives it with the average of its weights, frozen."""
        path = self.weights(stage)
        if not path.is_file():
            module = module.to(self.here.device).train().requires_grad_(True)
            module = train(stage, module, batches, self.folder, self.here, self.previous, average)
            self.here.first_does(lambda: write_tensors(path, module.state_dict()))
        try:
            module.load_state_dict(read_result(path))
        except RuntimeError as error:
            raise ValueError(f"{path} is of other sizes; train in another folder") from error
        return module.to(self.here.device).eval().requires_grad_(False)

    def weights(self, stage: Stage) -> Path:
        """The file of a stage that is done."""
        return self.folder / f"{stage.name}.safetensors"

    def seeded(self, build: Callable[[], nn.Module]) -> nn.Module:
        """Builds a network with the first weights that the seed decides."""
        torch.manual_seed(self.recipe.seed)
        return build().to(self.here.device)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Locks a folder against other runs, where system and disk can; raises ValueError if one is under way there."""
    if fcntl is None:
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"a training is under way in {folder}; give another folder with --folder") from None
        except OSError:
            pass  # some disks in a network have none
        yield
    finally:
        os.close(lock)  # as the system does when a process is killed


def note_recipe(folder: Path, recipe: Recipe) -> None:
    """Writes a run's recipe into its folder, unless it is there; raises ValueError if another one is."""
    path = folder / "recipe.json"
    if not path.is_file():
        with written(path) as beside:
            write_json(beside, recipe.record())
    elif read_json(path) != recipe.record():
        raise ValueError(f"{folder} holds a run of another recipe; give another folder with --folder")


def check_shares(recipe: Recipe, here: Processes) -> None:
    """Raises ValueError, before hours have gone by, unless the processes can share all batches evenly."""
    for stage in (getattr(recipe, name) for name in STAGES):
        if stage.steps:
            here.check_shares(stage.batch_size, f"examples of a batch of {stage.name}")
    if recipe.unet_reward.steps or recipe.unet_reward_again.steps:
        here.check_shares(CAPTIONS, "captions of a round of reward tuning")


def read_scale(path: Path) -> float:
    """Reads the scale of latents that a run measured; raises ValueError if there is none in the file."""
    scale = read_json(path).get("scaling_factor")
    if not isinstance(scale, float) or not 0 < scale < float("inf"):
        raise ValueError(f"{path} is damaged: it holds no scale; remove it, and the next run makes it again")
    return scale


def with_config(vae: VAE, config: VAEConfig) -> VAE:
    """The same autoencoder under a config of the same sizes."""
    other = VAE(config).to(vae.quant_conv.weight.device)
    other.load_state_dict(vae.state_dict())
    return other.eval().requires_grad_(False)


def export(
    folder: Path, tokenizer: Path, recipe: Recipe, language_model: LanguageModel, unet: nn.Module, vae: VAE
) -> None:
    """Writes a checkpoint in this project's layout, in fp16: all files whole before the first gets its name."""
    folder.mkdir(exist_ok=True)
    tensors = {
        "text_encoder": language_model.checkpoint(),
        "unet": unet.state_dict(),
        "vae": vae.state_dict(),
    }
    configs = {"text_encoder": language_model.encoder.config, "unet": unet.config, "vae": vae.config}
    index = {
        "format": "kolors-ref",
        "version": 1,
        **{name: asdict(config) for name, config in configs.items()},
        "scheduler": recipe.scheduler_config(),
        "pipeline": {"force_zeros_for_empty_prompt": False, "guidance_scale": sizes.GUIDANCE_SCALE},
    }
    with ExitStack() as files:
        beside = lambda name: files.enter_context(written(folder / name))
        write_json(beside("kolors-ref.json"), index)  # gets its name last, and makes a checkpoint of the others
        for name, state in tensors.items():
            numbers = {key: tensor.cpu() for key, tensor in state.items()}
            write_safetensors(beside(f"{name}.safetensors"), numbers, torch.float16)
        beside(tokenizer.name).write_bytes(tokenizer.read_bytes())
