"""The verbs of `moe data`. Heavy imports happen inside them, so that help answers at once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moe.cli_shared import AsJson, epilog, note
from moe.errors import InputError

data_app = typer.Typer(
    help="Prepare and fetch training text.",
    epilog=epilog("moe data prepare --input corpus/ --tokenizer bytes --out data/corpus"),
    no_args_is_help=True,
    rich_markup_mode=None,
)


@data_app.command(epilog=epilog("moe data prepare --input corpus/ --tokenizer bytes --out data/corpus"))
def prepare(
    inputs: Annotated[
        list[Path], typer.Option("--input", help="A text or JSONL file, or a directory; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="PREFIX of the PREFIX.bin and PREFIX.idx to write.")],
    tokenizer: Annotated[str, typer.Option(help="A tokenizer.json, or `bytes`.")],
    json_key: Annotated[str, typer.Option(help="Key of the text in JSONL lines.")] = "text",
    as_json: AsJson = False,
) -> None:
    """Tokenise text into the .bin/.idx files that training reads."""
    from moe.data.prepare import prepare as prepare_files
    from moe.data.tokenizer import Tokenizer

    report = prepare_files(inputs, Tokenizer.load(tokenizer), out, json_key=json_key, on_progress=note)
    sentence = (
        f"{out}: {report.documents:,} documents, {report.tokens:,} tokens, {report.bytes:,} bytes of text"
    )
    typer.echo(json.dumps(asdict(report)) if as_json else sentence)


@data_app.command(epilog=epilog("moe data fetch handbook --out data/handbook"))
def fetch(
    corpus: Annotated[str, typer.Argument(help="handbook: Japanese and English manuals of Debian.")],
    out: Annotated[Path, typer.Option(help="Directory to write to.")],
) -> None:
    """Fetch a known corpus.

    The only verb that uses the network.
    """
    from moe.data.fetch_handbook import fetch_handbook

    if corpus != "handbook":
        raise InputError(f"unknown corpus {corpus!r}; allowed: handbook")
    report = fetch_handbook(out, on_progress=note)
    for text in report.texts:
        typer.echo(f"{text.path}: {text.documents:,} documents, {text.text_bytes:,} bytes of text")
