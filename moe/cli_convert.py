"""The verbs of `moe convert`. Heavy imports happen inside them, so that help answers at once."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe.cli_shared import AsJson, epilog, note
from moe.errors import InputError

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
    """Turn a Hugging Face model into a checkpoint.

    Tensors are told by name and shape. A square matrix that stands transposed in the folder, or values that
    are others, cannot be seen: transformers loads the same file, and agrees.
    """
    _prepare(check_logits=not unchecked)
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
    _prepare(check_logits=not unchecked)
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
    _prepare(check_logits=not unchecked)
    from moe.convert.check import check

    result = check(one, other, check_logits=not unchecked)
    sentence = f"{result.tensors:,} tensors, equal bit for bit; {_logits_in_words(result.logits)}"
    typer.echo(json.dumps(asdict(result)) if as_json else sentence)


@convert_app.command("upcycle", epilog=epilog("moe convert upcycle Qwen3-8B/ ckpt --experts 8 --top-k 2"))
def upcycle_verb(
    dense_dir: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Folder of a Llama or dense Qwen3 model.")
    ],
    checkpoint: Annotated[Path, typer.Argument(help="Folder to write; train.init_from takes it.")],
    *,
    experts: Annotated[int, typer.Option(help="Experts in each layer.")],
    top_k: Annotated[int, typer.Option(help="Experts that a token meets.")],
    slices: Annotated[
        int, typer.Option(help="Experts that one copy of the feed-forward is cut into: 1, 2, 4, ...")
    ] = 1,
    noise: Annotated[
        float, typer.Option(help="Noise on each expert's weights, over their own deviation; 0 adds none.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the routers and the noise.")] = 1234,
    unchecked: Unchecked = False,
    as_json: AsJson = False,
) -> None:
    """Turn a dense Hugging Face model into a mixture of experts that begins with the same outputs."""
    _prepare(check_logits=not unchecked)
    from moe.convert.upcycle import Upcycling, upcycle

    upcycling = Upcycling(experts, top_k, slices, noise, seed)
    found = upcycle(dense_dir, checkpoint, upcycling, check_logits=not unchecked, note=note)
    if found is None or noise == 0 or as_json:
        _say_converted(checkpoint, found, as_json)
    else:
        typer.echo(
            f"{checkpoint}: written, noise moved the logits of {found.tokens} tokens "
            f"by {found.relative_error:.1e} of the largest"
        )


def _prepare(*, check_logits: bool) -> None:
    """Say at once, not after hours of streaming, what is not installed; then quiet what is."""
    needed = ["megatron", "xxhash", *(["transformers"] if check_logits else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise InputError(
            f"moe convert needs {' and '.join(missing)}: pip install 'joulemoe[convert]'"
            + ("; without transformers, --unchecked converts" if missing == ["transformers"] else "")
        )
    from moe.quiet import quiet_third_party

    quiet_third_party()


def _say_converted(written: Path, found: LogitCheck | None, as_json: bool) -> None:
    facts = {"written": str(written), "logits": None if found is None else asdict(found)}
    typer.echo(json.dumps(facts) if as_json else f"{written}: written, {_logits_in_words(found)}")


def _logits_in_words(found: LogitCheck | None) -> str:
    if found is None:
        return "logits unchecked"
    return f"logits of {found.tokens} tokens equal those of transformers to {found.relative_error:.1e}"
