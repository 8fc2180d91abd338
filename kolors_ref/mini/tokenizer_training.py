"""Stage one of training: a bilingual SentencePiece model with a byte for whatever it does not know."""

import re
from itertools import islice
from pathlib import Path

import sentencepiece

from .data import examples
from .recipe import PIECES, Recipe
from .vocabulary import CHINESE

SEPARATOR = "\t"
WORDS = re.compile("|".join(sorted({word for words in CHINESE.values() for word in words}, key=lambda w: (-len(w), w))))


def train_tokenizer(path: Path, recipe: Recipe) -> None:
    """Makes tokenizer.model from captions of the training data (BPE, Sennrich et al. 2016, with byte fallback).

    Chinese is written without spaces, so its words are set apart for the training: no piece then spans two of them, and
    a colour and a shape that were never seen together are cut like any other pair.
    """
    captions = (example.caption for example in islice(examples(recipe.seed), recipe.tokenizer_captions))
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(WORDS.sub(rf"{SEPARATOR}\g<0>{SEPARATOR}", caption) for caption in captions),
            model_writer=file,
            model_type="bpe",
            vocab_size=PIECES,
            byte_fallback=True,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            pretokenization_delimiter=SEPARATOR,
            num_threads=1,
            minloglevel=2,
        )
