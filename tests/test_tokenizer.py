"""The tokenizer against diffusers' ChatGLMTokenizer on the same SentencePiece model, and its errors.

The model is the official one or, where that is not at hand, the miniature's.
"""

import numpy as np
import pytest
import torch
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from parity.oracle import OFFICIAL_TOKENIZER, TOKENIZER, needs_official_tokenizer

from kolors_ref.tokenizer import SPECIAL_TOKENS, Tokenizer

LENGTHS = [2, 3, 16, 77, 256, 300]
PROMPTS = {
    "chinese": "一张瓢虫的照片，微距，变焦，高质量，电影，拿着一个牌子，写着“可图”",
    "english": "A photo of a ladybug, macro, zoom, high quality, film",
    "mixed": "一只穿着红色sweater的猫 sitting on the Great Wall，4K，夕阳",
    "empty": "",
    "blank": "   ",
    "blank-around": "  two  spaces   inside and around ",
    "ideographic-space": "　全角空格　",
    "emoji": "🐱🚀 family 👨‍👩‍👧‍👦 flag 🇨🇳",
    "tab": "a\tb\t\tc",
    "newline": "first\nsecond\r\nthird\n",
    "full-width": "ＡＢＣ　１２３！？（ｘ）",
    "control": "a\x00b\x01\x07\x1b[0m\x7f",
    "zero-width": "zero\u200bwidth\ufeffjoined\u2060\u202eback",
    "combining": "e\u0301 é ﬁ Å Ω ½ ①",
    "rare": "𠮷野家 𡃁 ꙮ ᚠᛇᚻ العربية हिन्दी ไทย",
    "special-tokens": "[gMASK]sop<|user|>hello<|assistant|>[MASK] eop <|observation|>",
    "sentencepiece-text": "<unk> <s> </s> <0x0A> ▁ <pad> <bos> <eos>",
    "numbers": "1234567890 3.14 1e-5 50% $9.99",
    "one-character": "我",
    "300-words": "cat " * 300,
    "300-characters": "猫狗鸟鱼" * 75,
}


@pytest.fixture(scope="module")
def official():
    return ChatGLMTokenizer(vocab_file=str(TOKENIZER))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOKENIZER)


def assert_same(batch, official, prompts, max_length):
    expected = official(prompts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "position_ids"):
        ours = getattr(batch, name)
        assert ours.dtype == torch.int64
        assert torch.equal(ours, expected[name]), name


@pytest.mark.parametrize("max_length", LENGTHS)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_prompt(prompt, max_length, tokenizer, official):
    assert_same(tokenizer([prompt], max_length), official, [prompt], max_length)


@pytest.mark.parametrize("max_length", [16, 256])
def test_batch(max_length, tokenizer, official):
    prompts = list(PROMPTS.values())
    batch = tokenizer(prompts, max_length)
    assert batch.input_ids.shape == (len(prompts), max_length)
    assert_same(batch, official, prompts, max_length)


def test_defaults(tokenizer, official):
    """A single string is a batch of one; the length is the one Kolors was trained with."""
    assert_same(tokenizer("a cat"), official, ["a cat"], 256)


def test_a_whole_number_of_numpy(tokenizer, official):
    assert_same(tokenizer("a cat", np.int64(16)), official, ["a cat"], 16)


@needs_official_tokenizer
def test_known_ids():
    tokenizer = Tokenizer(OFFICIAL_TOKENIZER)
    batch = tokenizer(["", "猫 cat"], max_length=8)
    assert batch.input_ids[0].tolist() == [0, 0, 0, 0, 0, 0, 64790, 64792]
    assert batch.attention_mask[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert batch.position_ids[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    count = int(batch.attention_mask[1].sum())
    assert 4 <= count < 8
    assert batch.position_ids[1].tolist() == [0] * (8 - count) + list(range(count))


def test_special_ids(tokenizer, official):
    assert tokenizer.vocab_size == official.vocab_size
    assert tokenizer.special_ids == {token: official.get_command(token) for token in SPECIAL_TOKENS}
    assert tokenizer.pad_id == official.pad_token_id


def test_long_prompt_keeps_its_beginning(tokenizer):
    ids = tokenizer.encode(PROMPTS["300-words"])
    assert len(ids) > 300
    assert tokenizer(PROMPTS["300-words"]).input_ids[0].tolist() == ids[:256]


@pytest.mark.parametrize(
    ("prompts", "max_length", "kind", "message"),
    [
        ([3], 256, TypeError, "a prompt must be a string, not int"),
        (["a", None], 256, TypeError, "a prompt must be a string, not NoneType"),
        ([b"a"], 256, TypeError, "a prompt must be a string, not bytes"),
        ("a", 16.0, TypeError, "max_length must be an integer, not float"),
        ("a", True, TypeError, "max_length must be an integer, not bool"),
        ("a", 1, ValueError, "max_length is 1; it must be at least 2"),
        ("a", -4, ValueError, "max_length is -4; it must be at least 2"),
        ([], 256, ValueError, "the list of prompts is empty"),
    ],
)
def test_wrong_calls(prompts, max_length, kind, message, tokenizer):
    with pytest.raises(kind, match=message) as error:
        tokenizer(prompts, max_length)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompts", [None, 3])
def test_neither_string_nor_list(prompts, tokenizer):
    with pytest.raises(TypeError, match="a prompt must be a string"):
        tokenizer(prompts)


def test_lone_surrogate(tokenizer):
    """Half a character, as broken input gives it, is refused in a sentence."""
    with pytest.raises(ValueError, match="prompt"):
        tokenizer("a \ud83d b")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no tokenizer model at .*tokenizer\.model"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no tokenizer model at"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100, b"version https://git-lfs\noid sha256:0\n"])
def test_not_a_model(content, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer(path)
