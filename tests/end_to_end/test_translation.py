"""examples/translate.py and the command line on a tiny NLLB-MoE with a tokenizer that knows two languages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from examples.translate import translate
from moec import runtime
from moec.cli import moec
from moec.errors import RequestError
from tests.support.compiling import compile_checkpoint
from tests.support.encoder_decoder_judge import Judge
from tests.support.tiny_models import save

SENTENCES = ["a b c d e f g", "h i", "j k l m n o p q r s t u v w x y z a b c"]
NEW = 9

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nllb")
    save("nllb_moe", folder / "checkpoint")
    tokenizer().save(str(folder / "checkpoint" / "tokenizer.json"))
    compile_checkpoint(folder / "checkpoint", folder / "model.moec", dtype="f32")
    return folder


def tokenizer() -> Tokenizer:
    """One word a letter; special tokens where NLLB has them, language codes last."""
    letters = [chr(ord("a") + number) for number in range(26)]
    words = ["<s>", "<pad>", "</s>", "<unk>", *letters, *(f"w{number}" for number in range(119))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [*words[:4], "eng_Latn", "fra_Latn"]
    made.add_special_tokens([AddedToken(word, special=True) for word in special])
    made.post_processor = processors.TemplateProcessing(
        single="eng_Latn $A </s>", special_tokens=[("eng_Latn", 149), ("</s>", 2)]
    )
    return made


def test_translation_begins_with_the_language_that_was_asked_for(folder: Path) -> None:
    judge, words = Judge("nllb_moe", folder / "checkpoint"), tokenizer()
    with runtime.load(folder / "model.moec") as model:
        found = translate(model, SENTENCES, "fra_Latn", "eng_Latn", NEW)
        for text, answer in zip(SENTENCES, found, strict=True):
            source = [150, *words.encode(text, add_special_tokens=False).ids, 2]
            expected = judge.greedy(source, NEW, forced=149)
            end = expected.index(2, 1) if 2 in expected[1:] else len(expected)
            assert answer == words.decode(expected[:end]).strip()
        with pytest.raises(RequestError, match="no token 'fr'"):
            translate(model, SENTENCES, "eng_Latn", "fr", NEW)


def test_the_command_line(folder: Path) -> None:
    bundle = str(folder / "model.moec")
    judge = Judge("nllb_moe", folder / "checkpoint")
    options = ["--max-new-tokens", str(NEW), "--greedy", "--forced-bos-token-id", "150", "--json"]
    result = CliRunner().invoke(moec, ["generate", bundle, SENTENCES[0], *options], catch_exceptions=False)
    found = json.loads(result.stdout)["token_ids"]
    source = tokenizer().encode(SENTENCES[0]).ids
    assert found == judge.greedy(source, NEW, forced=150)[1:][: len(found)]
    assert found[0] == 150
    measured = CliRunner().invoke(
        moec,
        ["bench", bundle, "--prompt-tokens", "40", "--new-tokens", "4", "--json"],
        catch_exceptions=False,
    )
    assert json.loads(measured.stdout)["decode_tokens_per_s"] > 0
    shown = CliRunner().invoke(moec, ["inspect", bundle], catch_exceptions=False)
    assert "its whole source" in shown.stdout
    with pytest.raises(RequestError, match="does not chat"):
        CliRunner().invoke(moec, ["chat", bundle], catch_exceptions=False)
