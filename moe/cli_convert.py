"""The verbs of `moe convert`. Heavy imports happen inside them, so that help answers at once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe.cli_shared import AsJson, epilog, note

if TYPE_CHECKING:
    from moe.convert.logits import LogitCheck

convert_app = typer.Typer(
    help="Bring Hugging Face weights in and out, bit for bit.",
    epilog=epilog("moe convert import Qwen3-30B-A3B/ checkpoints/qwen3"),
    no_args_is_help=True,
    rich_markup_mode=None,
)
Unchecked = Annotated[
    bool, typer.Option("--unchecked", help="Leave out the logit check, which holds both models in memory.")
]


@convert_app.command("import", epilog=epilog("moe convert import Qwen3-30B-A3B/ checkpoints/qwen3"))
def import_verb(
    hf_dir: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of safetensors.")],
    checkpoint: Annotated[Path, typer.Argument(help="Folder to write; train.init_from takes it.")],
    unchecked: Unchecked = False,
    as_json: AsJson = False,
) -> None:
    """Turn a Hugging Face model into a checkpoint."""
    from moe.quiet import quiet_third_party

    quiet_third_party()
    from moe.convert.import_hf import import_hf

    found = import_hf(hf_dir, checkpoint, check_logits=not unchecked, note=note)
    _say_converted(checkpoint, found, as_json)


@convert_app.command("export", epilog=epilog("moe convert export runs/a/checkpoints/step_00000200 hf/a"))
def export_verb(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="An intact checkpoint.")],
    hf_dir: Annotated[Path, typer.Argument(help="Folder to write; from_pretrained takes it.")],
    family: Annotated[
        str | None, typer.Option(help="A model_type; by default the one it came from or the only one.")
    ] = None,
    unchecked: Unchecked = False,
    as_json: AsJson = False,
) -> None:
    """Turn a checkpoint into a Hugging Face model."""
    from moe.quiet import quiet_third_party

    quiet_third_party()
    from moe.convert.export_hf import export_hf

    found = export_hf(checkpoint, hf_dir, family=family, check_logits=not unchecked, note=note)
    _say_converted(hf_dir, found, as_json)


@convert_app.command("check", epilog=epilog("moe convert check Qwen3-30B-A3B/ checkpoints/qwen3"))
def check_verb(
    one: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A folder of either kind.")],
    other: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Another.")],
    unchecked: Unchecked = False,
    as_json: AsJson = False,
) -> None:
    """Compare two models: every tensor bit for bit, then the logits of a folder of each kind."""
    from moe.quiet import quiet_third_party

    quiet_third_party()
    from moe.convert.check import check

    result = check(one, other, check_logits=not unchecked)
    sentence = f"{result.tensors:,} tensors, equal bit for bit; {_logits_in_words(result.logits)}"
    typer.echo(json.dumps(asdict(result)) if as_json else sentence)


def _say_converted(written: Path, found: LogitCheck | None, as_json: bool) -> None:
    facts = {"written": str(written), "logits": None if found is None else asdict(found)}
    typer.echo(json.dumps(facts) if as_json else f"{written}: written, {_logits_in_words(found)}")


def _logits_in_words(found: LogitCheck | None) -> str:
    if found is None:
        return "logits unchecked"
    return f"logits of {found.tokens} tokens equal those of transformers to {found.relative_error:.1e}"
