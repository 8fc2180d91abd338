"""The first weights of the UNet: the identity, text of even scale, and pads that say nothing."""

import pytest
import torch
from test_train_stages import GLM, UNET

from kolors_ref.mini import first_weights as first
from kolors_ref.mini.language_model import LanguageModel
from kolors_ref.mini.recipe import Recipe
from kolors_ref.mini.tokenizer_training import train_tokenizer
from kolors_ref.models.unet import TransformerBlock, UNet
from kolors_ref.text_layout import packed_layout
from kolors_ref.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tokenizer, a text encoder, and a UNet with the weights that training starts from."""
    path = tmp_path_factory.mktemp("first") / "tokenizer.model"
    train_tokenizer(path, Recipe(tokenizer_captions=2000))
    tokenizer = Tokenizer(path)
    torch.manual_seed(0)
    encoder, unet = LanguageModel(GLM).eval().encoder, UNet(UNET).eval()
    first.first_weights(unet, tokenizer, encoder, seed=0)
    return tokenizer, encoder, unet.requires_grad_(False)


def test_the_unet_starts_as_the_identity(parts):
    tokenizer, encoder, unet = parts
    text = packed_layout(tokenizer(["a red circle", "一个蓝色的方块"])).encode(encoder)
    context = unet.prepare(text.sequence, text.pooled, torch.full((2, 6), 128.0), text.key_bias)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for timestep in (0, 500, 1099):
        assert (unet(noise, timestep, context) - noise).square().mean() < 1e-4
    assert torch.allclose(unet(2 * noise, 500, context), 2 * noise, rtol=0.2, atol=0.1)  # no norm makes them even


def test_words_have_unit_variance_in_every_direction(parts):
    tokenizer, encoder, unet = parts
    words, _, pooled = first.sample_embeddings(tokenizer, encoder, seed=0)
    seen = torch.cov(unet.text_proj(words).T)
    assert torch.linalg.eigvalsh(seen)[8:].sub(1).abs().max() < 0.2
    assert unet.text_proj(words).mean(0).abs().max() < 1e-3
    assert len(pooled) == first.CAPTIONS


def test_pooled_embeddings_are_as_noise_to_the_size_embedding(parts):
    """Of mean 0 and unit variance: what its first layer makes of them beside the bias that it had."""
    tokenizer, encoder, unet = parts
    _, _, pooled = first.sample_embeddings(tokenizer, encoder, seed=0)
    torch.manual_seed(0)
    LanguageModel(GLM)  # takes the numbers that come before those of the UNet in `parts`
    before, layer, dim = UNet(UNET).size_embed[0], unet.size_embed[0], pooled.shape[1]
    seen = pooled @ layer.weight[:, :dim].T + layer.bias - before.bias
    assert seen.mean(0).abs().max() < 1e-3
    variance = before.weight[:, :dim].square().sum(1).mean().item()
    assert seen.var(0).mean().item() == pytest.approx(variance, rel=0.2)


def test_a_pad_has_no_value_and_a_low_score(parts):
    tokenizer, encoder, unet = parts
    words, pads, _ = first.sample_embeddings(tokenizer, encoder, seed=0)
    pad = unet.text_proj(pads.mean(0))
    pixels = torch.randn(500, UNET.channels[-1], generator=torch.Generator().manual_seed(0))
    for block in (module for module in unet.modules() if isinstance(module, TransformerBlock)):
        attn = block.cross_attn
        assert attn.v(pad).abs().max() < 1e-3 * attn.v(unet.text_proj(words)).std()
        query, key = (x.unflatten(-1, (attn.num_heads, -1)) for x in (attn.q(block.norm2(pixels)), attn.k(pad)))
        score = (query * key).sum(-1).mean(0) / query.shape[-1] ** 0.5
        torch.testing.assert_close(score, torch.full_like(score, first.PAD_SCORE), rtol=0.3, atol=0)
