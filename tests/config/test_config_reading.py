"""YAML and overrides: what is read, what is refused, and that a refusal names the place and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe.config import ConfigError, load_config
from moe.errors import InputError

# ---- every problem at once -----------------------------------------------------------------------------


def test_every_problem_is_reported_at_once_with_its_place(problems, sound_text):
    text = sound_text.replace("num_layers: 4", "num_layer: 4").replace("steps: 10", "steps: 10\n  steps: 11")
    found = problems("optim.lr=fast", "model.top_k=9", "model.top_k.deep=1", "oops", text=text)
    steps = _line_of(text, "steps: 11")
    expected = [
        (f"sound.yaml:{steps}: train.steps stands twice (first at ", f"sound.yaml:{steps - 1}); remove"),
        ("override 'model.top_k.deep=1': model.top_k is a value, not a section",),
        ("override 'oops': write key=value",),
        (f"sound.yaml:{_line_of(text, 'num_layer:')}: unknown key model.num_layer;", "model.num_layers?"),
        (f"sound.yaml:{_line_of(text, 'model:')}: model.num_layers is missing; add it",),
        ("override 'optim.lr=fast': optim.lr=\"fast\": input should be a valid number",),
        ("override 'model.top_k=9': model.top_k=9 is more than model.num_experts=8",),
    ]
    assert len(found) == len(expected), found
    for words in expected:
        assert any(all(word in problem for word in words) for problem in found), words


def test_error_text_counts_the_problems_and_says_that_nothing_runs(sound):
    with pytest.raises(ConfigError) as caught:
        load_config(sound, ["a=1", "b=2"])
    first, *lines = str(caught.value).splitlines()
    assert first == "2 problems in the config, nothing was started:"
    assert tuple(lines) == caught.value.problems
    assert caught.value.exit_code == 2


# ---- unknown keys --------------------------------------------------------------------------------------

NEAREST = {
    "optim.learning_rate=1": "optim takes name, lr, min_lr, schedule",
    "optim.betas=1": "did you mean optim.beta",
    "optim.warmup=1": "did you mean optim.warmup_steps?",
    "optm={lr: 1}": "did you mean optim?",
    "model.num_expert=1": "did you mean model.num_experts?",
    "model.num_heads=4": "did you mean model.attention.num_heads?",
    "lr=3": "did you mean optim.lr?",
    "train.keep=3": "did you mean checkpoint.keep?",
    "model.aux_los=batch": "did you mean model.router.aux_loss?",
    "name=x": "did you mean run.name or optim.name or engine.name?",
    "data.train=[{prefix: a, wieght: 2}]": "data.train.0.wieght; did you mean data.train.weight?",
    "zzz=1": "a config takes run, model, data,",
    "zzz.deep=1": "unknown key zzz; a config takes run, model, data,",
}


@pytest.mark.parametrize("override", NEAREST)
def test_unknown_key_comes_with_the_nearest_valid_one(problems, override):
    unknown = [problem for problem in problems(override) if "unknown key" in problem]
    assert len(unknown) == 1
    assert unknown[0].startswith(f"override {override!r}: ")
    assert NEAREST[override] in unknown[0]


def test_dotted_key_in_a_file_is_told_to_nest(problems, sound_text):
    text = sound_text + '"optim.eps": 1\n'
    (found,) = problems(text=text)
    line = _line_of(text, "optim.eps")
    assert f"sound.yaml:{line}: unknown key optim.eps; in a file, sections are nested" in found


# ---- types ---------------------------------------------------------------------------------------------

WRONG_TYPES = {
    'train.steps="16"': 'train.steps="16": input should be a valid integer',
    "train.steps=true": "train.steps=true: input should be a valid integer",
    "train.steps=1.0": "train.steps=1.0: input should be a valid integer",
    "train.steps=017": 'train.steps="017": input should be a valid integer',
    "train.steps=": "train.steps=null: input should be a valid integer",
    "train.steps=0": "train.steps=0: input should be greater than or equal to 1",
    "train.steps=1e3": "train.steps=1000.0: input should be a valid integer",
    'optim.lr="1e-4"': 'optim.lr="1e-4": input should be a valid number',
    "optim.lr=.nan": "optim.lr=NaN: input should be a finite number",
    "optim.lr=.inf": "optim.lr=Infinity: input should be a finite number",
    "optim.eps=1e999": "optim.eps=Infinity: input should be a finite number",
    "optim.eps=0": "optim.eps=0: input should be greater than 0",
    "run.seed=4294967296": "run.seed=4294967296: input should be less than 4294967296",
    "run.deterministic=yes": 'run.deterministic="yes": input should be a valid boolean',
    "run.name=../up": 'run.name="../up": string should match pattern',
    "run.name=5": "run.name=5: input should be a valid string",
    "tracking.wandb=off": "tracking.wandb=\"off\": input should be 'offline', 'online' or 'disabled'",
    "parallel=": "parallel=null must be a section",
    "parallel=[1]": "parallel=[1] must be a section",
    "data.train=a": 'data.train="a": input should be a valid array',
    "model.attention.head_dim=31": "head_dim=31: input should be a multiple of 2",
    "engine.timeout_s=1e300": "engine.timeout_s=1e+300: input should be less than",
}


@pytest.mark.parametrize("override", WRONG_TYPES)
def test_wrong_value_is_refused_and_shown_as_it_was_written(problems, override):
    found = problems(override)
    assert len(found) == 1, found
    assert found[0].startswith(f"override {override!r}: ")
    assert WRONG_TYPES[override] in found[0]


def test_number_forms(sound):
    config = load_config(sound, ["optim.lr=1e-4", "optim.min_lr=1E-5", "optim.eps=+.5e-8", "run.seed=1_000"])
    assert (config.optim.lr, config.optim.min_lr, config.optim.eps) == (1e-4, 1e-5, 5e-9)
    assert config.run.seed == 1000


def test_plain_text_stays_text(sound):
    for text in ("${oc.env:HOME}", "$HOME", "~user", "2024-01-01", "12:30", "on", "0x10", "017", "1e", "<<"):
        assert load_config(sound, [f"tracking.project={text}"]).tracking.project == text
    assert load_config(sound, ["run.root=~/runs"]).run.root == Path("~/runs")


def test_config_is_frozen(sound):
    config = load_config(sound)
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0
    with pytest.raises(ValueError, match="frozen"):
        config.run = config.run
    assert hash(config) == hash(load_config(sound))


# ---- overrides -----------------------------------------------------------------------------------------


def test_override_reaches_values_sections_and_items_of_lists(sound):
    blend = "[{prefix: a}, {prefix: b, weight: 3}]"
    config = load_config(
        sound,
        [
            f"data.train={blend}",
            "data.heldout=[{prefix: c}]",
            "data.tokenizer=bytes",
            "data.train.0.weight=2",
            "data.train.1={prefix: d}",
            "checkpoint={interval: 5}",
            "checkpoint.keep=7",
            "optim.lr=1",
            "optim.lr=2",
        ],
    )
    assert [(str(part.prefix), part.weight) for part in config.data.train] == [("a", 2.0), ("d", 1.0)]
    assert (config.checkpoint.interval, config.checkpoint.keep) == (5, 7)
    assert config.optim.lr == 2.0


UNUSABLE = {
    "optim.lr": "write key=value",
    "=1": "write key=value",
    "optim..lr=1": "write key=value",
    "optim.lr =1": "write key=value",
    "optim.lr.x=1": "optim.lr is a value, not a section",
    "data.train.2.weight=1": "data.train has the items 0, 1, not 2",
    "data.train.²=1": "data.train has the items 0, 1, not ²",
    "data.heldout.0=1": "data.heldout has the items (none), not 0",
    "data.cache_dir.0=1": "data.cache_dir is a value, not a section, so 0 cannot be set in it",
    "optim.lr=[1": "the value is not YAML: while parsing a flow sequence",
    "optim.lr=&a [*a]": "aliases are not read",
    "optim.lr=!!python/object/apply:os.getcwd []": "could not determine a constructor",
    "checkpoint={keep: 1, keep: 2}": "checkpoint.keep stands twice",
}


@pytest.mark.parametrize("override", UNUSABLE)
def test_unusable_override_is_a_problem_among_others(problems, override):
    data = "data={seq_length: 8, train: [{prefix: a}, {prefix: b}], heldout: [], cache_dir: c}"
    found = problems(data, override, "model.top_k=9")
    about = [problem for problem in found if problem.startswith(f"override {override!r}: ")]
    assert any(UNUSABLE[override] in problem for problem in about), found
    assert any("model.top_k=9" in problem for problem in found)


def test_override_of_a_section_takes_its_place_in_messages(problems):
    found = problems("optim={lr: -1}", "energy.meter=none")
    assert found[0].startswith("override 'optim={lr: -1}': optim.lr=-1: input should be greater than 0")
    assert found[1].startswith("override 'energy.meter=none': energy.meter=\"none\"")


# ---- files that are no config --------------------------------------------------------------------------

NO_CONFIG = {
    "empty": (b"", "a config is a mapping of the sections run, model, data"),
    "comment only": (b"# nothing\n", "a config is a mapping"),
    "list": (b"- run\n- model\n", "a config is a mapping"),
    "scalar": (b"run\n", "a config is a mapping"),
    "not UTF-8": (b"run: {name: caf\xe9}\n", "position 15"),
    "control character": (b"run: \x00\n", "unacceptable character"),
    "unclosed": (b"run:\n  name: [a\nmodel: 1\n", "expected ',' or ']'"),
    "tab": (b"run:\n\tname: a\n", "no.yaml:2: "),
    "two documents": (b"run: 1\n---\nrun: 2\n", "no.yaml:2: "),
    "object": (b"run: !!python/object/apply:os.system ['true']\n", "no.yaml:1: "),
    "object in a list": (b"a:\n- !!python/name:os.system x\n", "no.yaml:2: "),
    "binary": (b"run: !!binary aGk=\n", "could not determine a constructor"),
    "unknown tag": (b"run: !mine x\n", "could not determine a constructor"),
    "aliases": (b"a: &a [1]\nb: *a\n", "no.yaml:2: cannot be read as YAML: aliases are not read"),
    "too deep": (b"a: " + b"[" * 5000, "nested too deeply"),
    "too long a number": (b"a: " + b"9" * 5000, "4300 digits"),
    "unhashable key": (b"? [a]\n: 1\n", "unhashable key"),
}


@pytest.mark.parametrize("case", NO_CONFIG.values(), ids=NO_CONFIG)
def test_file_that_is_no_config_is_refused_by_name(tmp_path, case):
    content, word = case
    path = tmp_path / "no.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value) or word == "unacceptable character"


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: no such config file; see configs/"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="Is a directory"):
        load_config(tmp_path)


def test_deep_but_readable_nesting_is_a_problem_not_a_crash(problems):
    assert problems("run.name=" + "[" * 150 + "]" * 150)
    assert problems('run.name="\\ud800"')


def _line_of(text: str, start: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), 1) if line.strip(' "').startswith(start))
