"""The stages of training, one by one: what they learn from and what their losses are, with tiny networks."""

from dataclasses import replace
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch

from kolors_ref.config import GLMConfig, ScheduleConfig, UNetConfig, VAEConfig
from kolors_ref.mini import denoiser, language_model, recipe, train
from kolors_ref.mini.autoencoder import CROP, KL_WEIGHT, AutoencoderLoss, picture_batches, whole_pictures
from kolors_ref.mini.claims import holds
from kolors_ref.mini.data import example
from kolors_ref.mini.denoiser import DenoisingLoss, Latents, cache_latents, denoising_batches, new_caption
from kolors_ref.mini.language_model import IGNORED, LanguageModel, caption_batches
from kolors_ref.mini.processes import Processes
from kolors_ref.mini.recipe import Recipe
from kolors_ref.mini.scenes import generator
from kolors_ref.mini.tokenizer_training import train_tokenizer
from kolors_ref.mini.vocabulary import CHINESE
from kolors_ref.mini.world import COLOURS, HELD_OUT_COLOURS, HELD_OUT_TEXTURES, SHAPES
from kolors_ref.models import glm
from kolors_ref.sampling import NoiseSchedule
from kolors_ref.text_layout import packed_layout
from kolors_ref.tokenizer import Tokenizer

HERE = Processes(0, 1, torch.device("cpu"))
GLM = GLMConfig(1024, 32, 64, num_layers=2, num_heads=2, head_dim=16, num_kv_groups=1, max_positions=256)
VAE = VAEConfig(channels=(8, 8, 16, 16), layers_per_block=1, norm_groups=2)
UNET = UNetConfig(
    channels=(16, 16),
    transformer_depth=(0, 1),
    num_heads=(2, 2),
    layers_per_block=1,
    text_dim=32,
    cross_attention_dim=32,
    pooled_dim=32,
    size_embed_dim=8,
    norm_groups=4,
    sample_size=16,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer made as the recipe makes it, from fewer captions."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(path, Recipe(tokenizer_captions=4000))
    return Tokenizer(path)


def seeded(build, *arguments):
    torch.manual_seed(0)
    return build(*arguments).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_made_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        train_tokenizer(tmp_path / name, Recipe(tokenizer_captions=500))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_special_tokens_follow_the_pieces(tokenizer):
    pieces = tokenizer.model.vocab_size()
    assert pieces == recipe.PIECES
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    assert [tokenizer.special_ids[name] for name in names] == list(range(pieces, pieces + 9))
    assert tokenizer.vocab_size <= recipe.GLM.vocab_size
    assert tokenizer.encode("红")[:2] == [pieces + 1, pieces + 3]


def pieces_of(tokenizer, text):
    return [tokenizer.model.id_to_piece(number) for number in tokenizer.encode(text)[2:]]


def test_no_piece_spans_a_colour_and_a_shape(tokenizer):
    """So a colour and a shape that training never shows together are cut like any other pair."""
    colours = [word for colour in COLOURS for word in CHINESE[colour]]
    shapes = [word for shape in SHAPES for word in CHINESE[shape]]
    every = [tokenizer.model.id_to_piece(number) for number in range(tokenizer.model.vocab_size())]
    for colour in colours:
        for shape in shapes:
            for middle in ("", "的"):
                seam = colour[-1] + middle + shape[0]
                assert not any(seam in piece for piece in every), seam
                text = f"一个{colour}{middle}{shape}"
                ends = np.cumsum([len(piece.removeprefix("▁")) for piece in pieces_of(tokenizer, text)])
                assert len(text) - len(shape) in ends, pieces_of(tokenizer, text)


def test_captions_of_held_out_things_are_cut_into_known_pieces(tokenizer):
    for index in range(600):
        caption = example(5, index, held_out=True).caption
        ids = tokenizer.encode(caption)[2:]
        assert not any(tokenizer.model.is_byte(number) or tokenizer.model.is_unknown(number) for number in ids), caption
        assert tokenizer.model.decode(ids) == caption


@pytest.mark.parametrize("text", ["a 🐈 on a ship", "一只戴着红帽子的猫🐱", "naïve Ωμέγα", "  two  spaces ", "龘\t\n"])
def test_what_is_not_known_falls_back_to_bytes_and_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)[2:]
    assert tokenizer.model.decode(ids) == text
    assert not any(tokenizer.model.is_unknown(number) for number in ids)
    if not text.isascii():
        assert any(tokenizer.model.is_byte(number) for number in ids)


# ---------------------------------------------------------------------------------------------------------------------
# The language model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_model():
    return seeded(LanguageModel, GLM).double()


def captions(tokenizer, ids):
    """The captions of each row of a batch."""
    end, texts = tokenizer.special_ids["eop"], []
    for row in ids.tolist():
        stops = [place for place, token in enumerate([*row, end]) if token == end]
        texts.append(
            [tokenizer.model.decode(row[i:j]) for i, j in zip([2, *(n + 1 for n in stops)], stops, strict=False)]
        )
    return texts


def test_a_text_says_the_same_in_three_ways(tokenizer, monkeypatch):
    ids, _ = caption_batches(tokenizer, seed=0)(range(40))
    texts = [text[:3] for text in captions(tokenizer, ids)]
    assert sum(len(set(text)) == 3 and all(text) for text in texts) > 30
    assert {text[0].isascii() for text in texts} == {True, False}
    monkeypatch.setattr(
        language_model, "word", lambda claim, *rest: f"{sorted(map(hash, claim.things))}{claim.background}"
    )
    ids, _ = caption_batches(tokenizer, seed=0)(range(40))
    said = [text[:3] for text in captions(tokenizer, ids)]
    assert all(len(set(text)) == 1 for text in said)
    assert len({text[0] for text in said}) == 40


def test_half_of_the_texts_and_more_say_how_things_stand(tokenizer, monkeypatch):
    monkeypatch.setattr(language_model, "word", lambda claim, *rest: "1" if claim.relations else "0")
    ids, _ = caption_batches(tokenizer, seed=0)(range(400))
    related = np.mean([text[0] == "1" for text in captions(tokenizer, ids)])
    others = np.mean([bool(example(0, number).claim.relations) for number in range(400)])
    assert related == pytest.approx(0.5 + 0.5 * others, abs=0.08)


def test_muon_has_the_matrices_of_the_layers(small_model):
    theirs = set(map(id, small_model.hidden_matrices()))
    names = {name for name, parameter in small_model.named_parameters() if id(parameter) in theirs}
    parts = ("attn.qkv", "attn.out", "ffn.up", "ffn.down")
    assert names == {f"encoder.layers.{layer}.{part}.weight" for layer in range(2) for part in parts}


def test_the_first_layer_looks_back(tokenizer):
    """Head h of an untrained model attends most to the token h + 1 back, wherever it stands."""
    model, seen = seeded(LanguageModel, GLM), []
    attention = model.encoder.layers[0].attn
    with mock.patch.object(glm.F, "scaled_dot_product_attention", side_effect=RuntimeError) as attend:
        with pytest.raises(RuntimeError):
            model(*caption_batches(tokenizer, seed=0)(range(2)))
        (q, k, _), bias = attend.call_args.args, attend.call_args.kwargs["attn_mask"]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    weights = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)
    for head in range(GLM.num_heads):
        rows = torch.arange(head + 1, q.shape[2])
        seen.append(weights[:, head, rows, rows - head - 1].mean().item())
        assert (weights[:, head, rows].argmax(-1) == rows - head - 1).double().mean() > 0.9
    assert min(seen) > 0.4
    assert attention.qkv.bias[-1] == 0


def test_the_loss_of_a_batch_is_the_mean_over_its_captions(tokenizer, small_model):
    batches = caption_batches(tokenizer, seed=0)
    lengths = [batches(range(number, number + 1))[0].shape[1] for number in range(6)]
    assert len(set(lengths)) > 2
    singles = [small_model(*batches(range(number, number + 1))).item() for number in range(6)]
    assert small_model(*batches(range(6))).item() == pytest.approx(np.mean(singles), rel=1e-6)
    halves = [small_model(*batches(range(rank, 6, 2))).item() for rank in range(2)]
    assert np.mean(halves) == pytest.approx(np.mean(singles), rel=1e-6)


def test_the_loss_is_that_of_the_next_token_after_the_prefix(tokenizer, small_model):
    ids, targets = caption_batches(tokenizer, seed=0)(range(3, 4))
    row = [*ids[0].tolist(), tokenizer.special_ids["eop"]]
    assert row[:2] == tokenizer.prefix
    assert targets.tolist() == [[IGNORED, *row[2:]]]
    length = len(row) - 1
    mask = torch.full((1, length, length), -torch.inf).triu(1)
    positions = torch.arange(length)[None]
    hidden = small_model.encoder(ids, positions, mask, positions)[1]
    logits = (small_model.final_norm(hidden) @ small_model.lm_head.weight.T)[0, 1:].log_softmax(-1)
    expected = -np.mean([logits[place, token].item() for place, token in enumerate(row[2:])])
    assert small_model(ids, targets).item() == pytest.approx(expected, rel=1e-6)


def test_a_later_token_changes_no_earlier_loss(tokenizer, small_model):
    ids, targets = caption_batches(tokenizer, seed=0)(range(1))
    targets[:, -4:] = IGNORED
    changed = ids.clone()
    changed[:, -4:] = (changed[:, -4:] + 7) % 500
    assert torch.equal(small_model(ids, targets), small_model(changed, targets))
    changed[:, 3] += 1
    assert not torch.equal(small_model(ids, targets), small_model(changed, targets))


def test_training_sees_tokens_as_the_pipeline_shows_them(tokenizer, small_model):
    """Filled up on the right in training, on the left in use: the embeddings of a caption's tokens are the same."""
    ids, _ = caption_batches(tokenizer, seed=0)(range(2))
    length = ids.shape[1]
    positions, mask = torch.arange(length).expand(2, -1), torch.full((2, length, length), -torch.inf).triu(1)
    ours = small_model.encoder(ids, positions, mask, positions)[0]
    for row, caption in enumerate(text[0] for text in captions(tokenizer, ids)):
        used = packed_layout(tokenizer([caption])).encode(small_model.encoder).sequence
        count = len(tokenizer.encode(caption))
        torch.testing.assert_close(ours[row, :count], used[0, -count:], rtol=1e-9, atol=1e-9)


def test_a_bag_of_words_knows_no_neighbours(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(recipe, "GLM", GLM)
    run = train.Run(tmp_path, replace(Recipe(tokenizer_captions=500), bag_of_words=True), HERE, False)
    encoder = run.language_model().encoder
    red, blue = (packed_layout(tokenizer([text])).encode(encoder).sequence[0, -1] for text in ("红色圆", "蓝色圆"))
    assert torch.equal(red, blue)
    assert not (tmp_path / "glm.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder and the denoiser
# ---------------------------------------------------------------------------------------------------------------------


def test_pictures_and_crops_come_from_their_numbers():
    batch = picture_batches(0, VAE)
    pixels, noise = batch(range(4))
    assert torch.equal(pixels[1::2], batch(range(1, 4, 2))[0])
    assert torch.equal(noise[1::2], batch(range(1, 4, 2))[1])
    assert torch.equal(pixels, next(whole_pictures(0, 4)))
    assert (pixels.min() >= -1, pixels.max() <= 1) == (True, True)
    crops, smaller = picture_batches(0, VAE, CROP)(range(4))
    assert (crops.shape, smaller.shape) == ((4, 3, CROP, CROP), (4, 4, CROP // 8, CROP // 8))
    for crop, picture in zip(crops[:2], pixels, strict=False):
        windows = picture.unfold(1, CROP, 1).unfold(2, CROP, 1)
        assert (windows == crop[:, None, None]).all(-1).all(-1).all(0).any()


def latents_of(count):
    """Latents of no picture, a third of them as of enlarged ones."""
    noise = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return Latents(noise.half(), torch.arange(count) % 3 == 0)


@pytest.fixture(scope="module")
def batches(tokenizer):
    encoder = seeded(LanguageModel, GLM).encoder
    return denoising_batches(latents_of(20), 0, False, 0.5, 1100, tokenizer, encoder)


def test_a_batch_is_made_from_its_numbers_alone(batches):
    first, again = batches(range(16, 24)), batches(range(16, 24))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[0], latents_of(20).latents[[16, 17, 18, 19, 0, 1, 2, 3]].float())
    later = batches(range(36, 44))  # the same pictures
    assert torch.equal(first[0], later[0])
    for a, b in zip(first[1:3], later[1:3], strict=True):
        assert not torch.equal(a, b)
    assert not torch.equal(first[5], later[5])


@pytest.mark.parametrize("clean", [False, True])
def test_captions_are_of_the_pictures_in_the_batch(tokenizer, monkeypatch, clean):
    told = {}

    def word(claim, rng, language):
        told[number] = claim
        return "a caption"

    monkeypatch.setattr(denoiser, "word", word)
    batch = denoising_batches(latents_of(20), 5, clean, 0.5, 1100, tokenizer, seeded(LanguageModel, GLM).encoder)
    for number in range(60):
        batch(range(number, number + 1))
    scenes = [example(5, number, clean=clean).scene for number in range(20)]
    assert len(told) > 40
    assert all(holds(claim, scenes[number % 20]) for number, claim in told.items())
    assert not any(holds(claim, scenes[(number + 1) % 20]) for number, claim in told.items())


def test_the_shares_of_two_processes_make_up_the_batch(batches):
    loss = seeded(DenoisingLoss, UNET, NoiseSchedule(ScheduleConfig()))
    whole = batches(range(8))
    shares = [batches(range(rank, 8, 2)) for rank in range(2)]
    for rank, share in enumerate(shares):
        for ours, theirs in zip(share[:4], whole[:4], strict=True):
            assert torch.equal(ours, theirs[rank::2])
        torch.testing.assert_close(share[5], whole[5][rank::2])
    assert np.mean([loss(*share).item() for share in shares]) == pytest.approx(loss(*whole).item(), rel=1e-5)


def test_only_enlarged_pictures_are_told_to_be_small(batches):
    sizes = batches(range(20))[3]
    assert sizes.shape == (20, 6)
    for row, small in zip(sizes.tolist(), latents_of(20).small.tolist(), strict=True):
        assert row == [64.0, 64.0, 0.0, 0.0, 128.0, 128.0] if small else row == [128.0, 128.0, 0.0, 0.0, 128.0, 128.0]


def test_most_timesteps_are_in_the_middle_and_noise_is_of_unit_scale(tokenizer):
    """In every stretch of examples alike, and even within the middle and on either side of it."""
    encoder = seeded(LanguageModel, GLM).encoder
    _, noise, timestep, *_ = denoising_batches(latents_of(400), 0, False, 0.5, 1100, tokenizer, encoder)(range(400))
    assert (timestep.min() >= 0, timestep.max() < 1100) == (True, True)
    for part in timestep.split(100):
        assert ((part >= 385) & (part < 990)).sum().item() == pytest.approx(75, abs=3)
        assert (part >= 990).sum().item() == pytest.approx(10, abs=3)
    for low, high, share in ((0, 385, 0.15), (385, 990, 0.75), (990, 1100, 0.1)):
        counts = torch.histc(timestep.float(), bins=4, min=low, max=high)
        assert counts.tolist() == pytest.approx([100 * share] * 4, abs=6)
    assert noise.mean().abs() < 0.01
    assert noise.std() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("count", [Recipe().scenes, 20])
def test_a_picture_meets_all_levels_of_noise(tokenizer, count):
    """Some numbers of pictures, ours too, are nearly a fifth of something times the golden ratio."""
    cached = Latents(torch.zeros(1, 4, 16, 16).expand(count, -1, -1, -1), torch.zeros(count, dtype=torch.bool))
    batch = denoising_batches(cached, 0, False, 0.5, 1100, tokenizer, seeded(LanguageModel, GLM).encoder)
    met = sorted(batch(range(7 + visit * count, 8 + visit * count))[2].item() for visit in range(20))
    assert met[0] < 385
    assert met[-1] > 900
    assert max(b - a for a, b in pairwise(met) if 385 <= a <= b < 990) < 100


@pytest.mark.parametrize("clean", [False, True])
def test_captions_are_dropped_now_and_then_and_never_of_held_out_things(monkeypatch, clean):
    claims, languages = [], []

    def word(claim, rng, language):
        claims.append(claim)
        languages.append(language)
        return "a caption"

    monkeypatch.setattr(denoiser, "word", word)
    scenes = [example(0, number, clean=clean).scene for number in range(500)]
    captions = [new_caption(scenes[number % 500], 0.5, generator(3, number)) for number in range(2500)]
    assert captions.count("") / 2500 == pytest.approx(0.1, abs=0.02)
    assert captions.count("a caption") == len(claims) == 2500 - captions.count("")
    assert languages.count("zh") / len(languages) == pytest.approx(0.5, abs=0.03)
    things = {(thing.shape, thing.colour, thing.texture) for claim in claims for thing in claim.things}
    assert not HELD_OUT_COLOURS & {(shape, colour) for shape, colour, _ in things}
    assert not HELD_OUT_TEXTURES & {(shape, texture) for shape, _, texture in things}
    assert len({(shape, colour) for shape, colour, _ in things if shape and colour}) == 81  # all of the others


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_dense_captions(monkeypatch, share):
    dense = []
    monkeypatch.setattr(denoiser, "choose_claim", lambda scene, rng, is_dense: dense.append(is_dense))
    monkeypatch.setattr(denoiser, "word", lambda claim, rng, language: "a caption")
    scene = example(0, 0).scene
    for number in range(2000):
        new_caption(scene, share, generator(3, number))
    assert sum(dense) / len(dense) == pytest.approx(share, abs=0.03 if 0 < share < 1 else 0)


def test_the_autoencoders_loss():
    """The divergence is torch's own, of the latents before they are scaled."""
    loss = seeded(AutoencoderLoss, VAE).eval()
    generator = torch.Generator().manual_seed(0)
    pixels, noise = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1, torch.randn(2, 4, 4, 4, generator=generator)
    posterior = loss.vae.encode(pixels)
    error = loss.vae.decode(posterior.sample(noise)) - pixels
    scale = VAE.scaling_factor
    found = torch.distributions.Normal(posterior.mean / scale, posterior.std / scale)
    divergence = torch.distributions.kl_divergence(found, torch.distributions.Normal(0.0, 1.0)).mean()
    assert divergence > 0.01
    expected = error.abs().mean() + error.square().mean() + KL_WEIGHT * divergence
    torch.testing.assert_close(loss(pixels, noise), expected, rtol=1e-6, atol=0)


def test_some_pictures_are_enlarged_and_clean_ones_never(tmp_path, monkeypatch):
    monkeypatch.setattr(denoiser, "SHARD", 16)
    vae = seeded(AutoencoderLoss, VAE).vae
    mixed = cache_latents(vae, tmp_path, "latents", 0, 48, False, HERE)
    clean = cache_latents(vae, tmp_path, "latents-clean", 1, 32, True, HERE)
    assert (mixed.latents.shape, mixed.latents.dtype) == ((48, 4, 16, 16), torch.float16)
    assert (0 < mixed.small.sum() < 15, clean.small.sum().item()) == (True, 0)
    assert len(list(tmp_path.glob("latents-0*.safetensors"))) == 3
    pixels = torch.from_numpy(np.stack([denoiser.picture(0, n, False, bool(mixed.small[n])) for n in (5, 40)]))
    with torch.autocast("cpu", torch.bfloat16):
        expected = vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).mode().float()
    torch.testing.assert_close(mixed.latents[[5, 40]].float(), expected, rtol=2e-2, atol=2e-2)


def test_latents_that_are_there_are_dealt_out_alike_whoever_looks_first(tmp_path, monkeypatch):
    """One process may look for missing files when another has already written its first."""
    vae = seeded(AutoencoderLoss, VAE).vae
    monkeypatch.setattr(denoiser, "SHARD", 16)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    with pytest.raises(FileNotFoundError):  # those of the other process
        cache_latents(vae, tmp_path, "latents", 0, 64, True, Processes(0, 2, torch.device("cpu")))
    assert len(cache_latents(vae, tmp_path, "latents", 0, 64, True, Processes(1, 2, torch.device("cpu"))).latents) == 64


def test_the_loss_is_the_weighted_error_of_the_noise(batches):
    """Against the formulas, in fp64: the levels of noise from the betas, min-SNR weights and even levels."""
    config = ScheduleConfig()
    loss = seeded(DenoisingLoss, UNET, NoiseSchedule(config)).double()
    latents, noise, timestep, sizes, text, pooled, bias = (
        tensor.double() if tensor.is_floating_point() else tensor for tensor in batches(range(6))
    )
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, 1100) ** 2
    signal = torch.from_numpy(np.cumprod(1 - betas))[timestep].view(-1, 1, 1, 1)
    noisy = signal**0.5 * latents + (1 - signal) ** 0.5 * noise
    noise_pred = loss.unet(noisy, timestep, loss.unet.prepare(text, pooled, sizes, bias))
    variance = (1 - signal) / signal
    weight = torch.minimum(torch.ones(()), 5 * variance) * (1 + variance / 10)
    assert weight.min() < 1 < weight.max()
    expected = (weight * (noise_pred - noise) ** 2).mean().item()
    assert loss(latents, noise, timestep, sizes, text, pooled, bias).item() == pytest.approx(expected, rel=1e-5)
