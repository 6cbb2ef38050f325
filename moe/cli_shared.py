"""What the verbs of the command have in common."""

from __future__ import annotations

from typing import Annotated

import typer

_EXIT_CODES = """\
Exit codes:
  0  done
  1  anything else
  2  bad input or config
  3  corrupt data or checkpoint
  4  a rank was lost
  5  stopped on request, checkpoint written; start it again"""

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a sentence.")]


def epilog(example: str) -> str:
    """The end of a verb's help: an example, and what the command may exit with."""
    # A paragraph that begins with "\b" keeps its lines; others are filled.
    return f"\b\nExample:\n  {example}\n\n\b\n{_EXIT_CODES}"


def note(text: str) -> None:
    """A message for a person, beside the numbers."""
    typer.echo(text, err=True)
