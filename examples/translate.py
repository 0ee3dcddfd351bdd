"""Translate with a bundle of NLLB-MoE, by the codes of its languages.

    moec compile facebook/nllb-moe-54b -o nllb.moec
    python examples/translate.py nllb.moec --source eng_Latn --target fra_Latn "The library closes at six."

Sentences come as arguments, or one a line on standard input; each is translated by itself, several at once. The codes
are FLORES-200's, listed on the model's page: eng_Latn, fra_Latn, deu_Latn, zho_Hans, ...
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moec import runtime
from moec.errors import MoecError, RequestError


def translate(
    model: runtime.Model, sentences: list[str], source: str, target: str, max_new_tokens: int
) -> list[str]:
    """Translate sentences from the language ``source`` to ``target``.

    The encoder reads the code of the source language, the sentence and an end token; the decoder begins with its start
    token and, forced, the code of the target language.

    Raises:
        RequestError: the tokenizer does not know a code, or a sentence is too long.
    """
    tokenizer = model.tokenizer
    begin, forced = tokenizer.token_id(source), tokenizer.token_id(target)
    (end, *_) = model.record.generation.eos_token_id
    rows = [[begin, *tokenizer.encode(text, add_special_tokens=False), end] for text in sentences]
    answers = model.generate(rows, max_new_tokens=max_new_tokens, do_sample=False, forced_bos_token_id=forced)
    # The decoder's start token and the language are special tokens, as is what fills up shorter rows.
    return [model.decode(row).strip() for row in answers]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options; sentences may come before them or after."""
    parser = argparse.ArgumentParser(description="Translate with a bundle of NLLB-MoE.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("sentences", nargs="*", help="default: the lines of standard input")
    parser.add_argument("--source", default="eng_Latn", metavar="CODE")
    parser.add_argument("--target", required=True, metavar="CODE")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0")
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    """Parse, translate, print."""
    options = parse()
    sentences = options.sentences or [line.strip() for line in sys.stdin if line.strip()]
    try:
        with runtime.load(options.bundle, device=options.device) as model:
            if not model.has_encoder:
                raise RequestError(
                    "This model does not translate.", "It has no encoder.", "Give one of NLLB-MoE."
                )
            found = translate(model, sentences, options.source, options.target, options.max_new_tokens)
    except MoecError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("\n".join(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
