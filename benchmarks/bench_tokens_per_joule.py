"""Tokens per joule of a recipe, measured on real training, and whether another recipe is better.

python -m benchmarks.bench_tokens_per_joule configs/quickstart.yaml --against-override model.top_k=8
torchrun --nproc-per-node 8 -m benchmarks.bench_tokens_per_joule CONFIG --against CONFIG2 --report out

Both sides train in turn (A, B, A, B, ...), each time from the start, in a steady window that a rule finds
(moe/energy/steady_state.py). Energy is gross. Natural routing is the headline; forced balance is an upper
bound and called one. KEY=VALUE overrides apply to both sides. Statistics: benchmarks/ab_statistics.py. Lines
of the result file: benchmarks/tokens_per_joule.schema.json. Power limits are read and reported; they are
changed only with --power-caps and --allow-power-changes, and always put back.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks import joules_to_loss
from benchmarks.harness import progress
from benchmarks.rendezvous import Rendezvous
from benchmarks.tokens_per_joule_legs import Case, Session, run_leg, uncapped
from benchmarks.tokens_per_joule_record import Leg, Record, TargetLoss, write_lines
from benchmarks.tokens_per_joule_summary import judge, summarize
from benchmarks.tokens_per_joule_text import as_text
from moe.config import load_config
from moe.energy.power_control import open_nvml, power_capped
from moe.energy.steady_state import FULL, RULES, SHORT
from moe.errors import InputError, MoeError
from moe.quiet import quiet_third_party

CAPS_NEED = "--power-caps changes settings of the GPUs; ask for it with --allow-power-changes"
EVAL_EVERY = 10  # steps between evaluations on the way to a loss, where the recipe names none


def main() -> int:
    """Parse argv, measure, print, write."""
    args = parse(sys.argv[1:])
    quiet_third_party()
    try:
        records = measure(args)
    except MoeError as error:
        progress(f"error: {error}")
        return error.exit_code
    if _rank() == 0:
        print(as_text(records))
        if args.json:
            write_lines(args.json, records)
        if args.report:
            from benchmarks.tokens_per_joule_page import write_page

            for path in write_page(records, args.report):
                print(path)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments; leaves with a message and exit code 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_tokens_per_joule",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="the recipe that the verdict is on")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of both recipes")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--against", type=Path, metavar="CONFIG2", help="a recipe to compare with")
    other.add_argument("--against-override", action="append", metavar="KEY=VALUE", help="or one with this")
    parser.add_argument("--repeats", type=int, default=5, help="windows of each side; 0: none")
    parser.add_argument("--forced-repeats", type=int, default=1, help="under forced balance; 0: none")
    parser.add_argument("--mode", choices=RULES, help="default: full on a GPU, short on a CPU")
    parser.add_argument("--target-loss", type=float, help="also joules until this held-out loss (nats)")
    parser.add_argument("--seeds", type=int, default=3, help="of --target-loss")
    parser.add_argument("--power-caps", type=_watts, default=(), metavar="W,W", help="repeat all under each")
    parser.add_argument("--allow-power-changes", action="store_true", help="what --power-caps needs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write JSON lines")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write a page, HTML and PNG")
    args = parser.parse_intermixed_args(argv)
    if args.power_caps and not args.allow_power_changes:
        parser.error(CAPS_NEED)
    if min(args.repeats, args.forced_repeats, args.seeds - 1) < 0:
        parser.error("--repeats and --forced-repeats are at least 0, --seeds at least 1")
    if not args.repeats and args.target_loss is None:
        parser.error("--repeats 0 leaves nothing to measure without --target-loss")
    if args.power_caps and not args.repeats:
        parser.error("--power-caps is for windows, and --repeats 0 leaves none")
    return args


def _watts(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def measure(args: argparse.Namespace) -> list[Record]:
    """All records of one call; collective. Empty on other ranks than 0.

    Raises:
        MoeError: a recipe is wrong, a window could not be completed, or the meter failed.
    """
    cases = _cases(args)
    rule = RULES[args.mode or _mode(cases)]
    capped = _capping(allowed=args.allow_power_changes) if args.power_caps else uncapped
    session = Session(uuid.uuid4().hex[:12], rule, _note, Rendezvous(), capped)
    records: list[Record] = []
    if args.repeats:
        for cap_w in args.power_caps or (None,):
            records += _windows(cases, session, args, cap_w)
    if args.target_loss is not None:
        records += _losses(cases, session, args)
    return records


def _cases(args: argparse.Namespace) -> list[Case]:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))

    def case(role: str, path: Path, more: Sequence[str]) -> Case:
        overrides = (*args.overrides, *more)
        config = load_config(path, list(overrides), world_size=world_size)
        return Case(role, " ".join([str(path), *more]), str(path), overrides, config)

    cases = [case("a", args.config, ())]
    if args.against or args.against_override:
        cases.append(case("b", args.against or args.config, args.against_override or ()))
    return cases


def _mode(cases: Sequence[Case]) -> str:
    import torch

    on_gpu = torch.cuda.is_available() and all(case.config.engine.device != "cpu" for case in cases)
    return (FULL if on_gpu else SHORT).name


def _windows(
    cases: Sequence[Case], session: Session, args: argparse.Namespace, cap_w: float | None
) -> list[Record]:
    """Natural legs in turn, then those under forced balance; their summaries and the verdict."""
    legs: dict[tuple[str, bool], list[Leg]] = {}
    turns = [
        (case, repeat, forced)
        for forced, repeats in ((False, args.repeats), (True, args.forced_repeats))
        for repeat in range(repeats)
        for case in cases
    ]
    for case, repeat, forced in turns:
        session.rendezvous.renew()
        leg = run_leg(case, session, repeat=repeat, forced=forced, power_cap_w=cap_w)
        if leg is not None:
            legs.setdefault((case.role, forced), []).append(leg)
            _say(leg)
    names = {case.role: case.name for case in cases}
    records: list[Record] = [leg for group in legs.values() for leg in group]
    records += [summarize(group, names[role]) for (role, _), group in legs.items()]
    if "b" in names and ("a", False) in legs:
        verdict = judge(legs["a", False], legs["b", False], (names["a"], names["b"]))
        records += [verdict] if verdict else []
    return records


def _losses(cases: Sequence[Case], session: Session, args: argparse.Namespace) -> list[Record]:
    """Joules to the target loss, seed by seed, the sides in turn."""
    found: dict[str, list[TargetLoss]] = {}
    for seed in range(args.seeds):
        for case in cases:
            session.rendezvous.renew()
            result = joules_to_loss.run_to_loss(_seeded(case, seed), session, args.target_loss)
            if result is not None:
                found.setdefault(case.role, []).append(result)
    records: list[Record] = [each for group in found.values() for each in group]
    records += [joules_to_loss.summarize(group) for group in found.values()]
    if "b" in found:
        verdict = joules_to_loss.judge(found["a"], found["b"])
        records += [verdict] if verdict else []
    return records


def _seeded(case: Case, seed: int) -> Case:
    config = case.config
    train = config.train.model_copy(update={"eval_interval": config.train.eval_interval or EVAL_EVERY})
    run = config.run.model_copy(update={"seed": config.run.seed + seed})
    return replace(case, config=config.model_copy(update={"run": run, "train": train}))


def _capping(*, allowed: bool) -> Callable[[float], AbstractContextManager[None]]:
    """What caps the GPUs of this machine for a leg; of one machine only, for rank 0 reaches no other.

    Raises:
        InputError: it may or can not be done; on every rank, before any of them trains.
    """
    import torch

    if not allowed:
        raise InputError(CAPS_NEED)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if int(os.environ.get("WORLD_SIZE", "1")) != ranks_here:
        raise InputError("--power-caps works on one machine: set the caps of several with their scheduler")
    if not torch.cuda.is_available():
        raise InputError("--power-caps needs GPUs; torch sees none here")
    if _rank() != 0:
        return uncapped
    uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(ranks_here)]
    note_once = functools.cache(_note)  # how to undo a cap is the same for every leg

    @contextmanager
    def capped(watts: float) -> Iterator[None]:
        with open_nvml() as nvml, power_capped(nvml, uuids, watts, allowed=allowed, note=note_once):
            yield

    return capped


def _say(leg: Leg) -> None:
    bound = ", forced balance (upper bound)" if leg.is_upper_bound else ""
    progress(
        f"  {leg.role}{leg.repeat + 1}: {leg.tokens_per_j:.4g} tokens/J, {leg.tokens_per_s:,.0f} tokens/s, "
        f"steps {leg.first_step} to {leg.last_step}{bound}"
    )


def _note(text: str) -> None:
    if _rank() == 0:
        progress(f"  {text}")


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    sys.exit(main())
