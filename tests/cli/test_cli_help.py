"""What a newcomer sees first: help that answers at once, with an example and the exit codes."""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import sys

import pytest
import typer
from train_runs import command, environment

from moe import errors
from moe.cli import app

MAX_HELP_S = 0.5


def _verbs(group, path=()):
    for name, verb in group.commands.items():
        if hasattr(verb, "commands"):
            yield (*path, name), True
            yield from _verbs(verb, (*path, name))
        else:
            yield (*path, name), False


VERBS = dict(_verbs(typer.main.get_command(app)))
ONE_VERB = [verb for verb, is_group in VERBS.items() if not is_group]


def _help(*verb: str) -> str:
    width = {"COLUMNS": "80", "TERMINAL_WIDTH": "80"}
    done = subprocess.run(
        command(*verb, "--help"), env=environment() | width, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout


def test_every_verb_of_the_interface_exists():
    fixed = {("train",), ("resume",), ("verify",), ("plot",), ("data", "prepare"), ("data", "fetch")}
    assert fixed <= set(ONE_VERB)


@pytest.mark.parametrize("verb", [(), *VERBS], ids=" ".join)
def test_help_has_an_example_and_the_exit_codes_each_on_its_own_line(verb):
    lines = _help(*verb).splitlines()
    assert lines[0].startswith(f"Usage: {' '.join(['moe', *verb])} ")
    at = lines.index("  Example:")
    assert lines[at - 1] == ""
    assert lines[at + 1].startswith(f"    {' '.join(['moe', *verb])} ")
    assert lines[at + 2] == ""
    assert lines[at + 3] == "  Exit codes:"
    assert [line.split()[0] for line in lines[at + 4 :]] == ["0", "1", "2", "3", "4", "5"]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("verb", ONE_VERB, ids=" ".join)
def test_example_uses_what_the_verb_takes(verb):
    text = _help(*verb)
    example = shlex.split(text.partition("Example:\n")[2].splitlines()[0])
    options = [word for word in example if word.startswith("--")]
    documented = text.partition("Options:")[2].partition("Example:")[0]
    assert all(option in documented.split() for option in options)
    assert documented.count("--") > 1 or not options


def test_summary_lists_every_verb_in_one_whole_sentence():
    listed = _help().partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in listed] == [verb[0] for verb in VERBS if len(verb) == 1]
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


def test_documented_exit_codes_are_those_of_the_errors():
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    assert codes == {1, 2, 3, 4, 5}
    text = _help()
    assert "2  bad input or config" in text
    assert errors.InputError.exit_code == 2
    assert "3  corrupt data or checkpoint" in text
    assert errors.CorruptDataError.exit_code == errors.CorruptCheckpointError.exit_code == 3
    assert "4  a rank was lost" in text
    assert errors.RankLostError.exit_code == 4
    assert "5  stopped on request" in text
    assert errors.RunStoppedError.exit_code == 5


def test_help_answers_at_once():
    """CPU time of the process, not the clock: other work on the machine must not fail this."""

    def cpu_s() -> float:
        before = os.times()
        subprocess.run(command("--help"), env=environment(), capture_output=True, check=True)
        after = os.times()
        return (after.children_user + after.children_system) - (before.children_user + before.children_system)

    assert statistics.median(cpu_s() for _ in range(3)) <= MAX_HELP_S


def test_heavy_libraries_wait_for_the_verb_that_needs_them():
    heavy = ["torch", "numpy", "pydantic", "megatron", "matplotlib", "wandb"]
    script = f"import moe.cli, sys; print([name for name in {heavy} if name in sys.modules])"
    light = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert light.stdout.strip() == "[]"
    script = f"import moe.config, sys; print([name for name in {heavy} if name in sys.modules])"
    config = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert config.stdout.strip() == "['pydantic']"


def test_version():
    done = subprocess.run(command("--version"), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("moe 0.")


@pytest.mark.parametrize("group", [(), ("data",)], ids=["moe", "moe data"])
def test_group_without_a_verb_shows_its_help(group):
    done = subprocess.run(command(*group), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Commands:" in done.stdout + done.stderr
