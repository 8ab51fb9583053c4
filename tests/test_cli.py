"""The command line answers without torch, names what was meant, and writes where it was told."""

import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from tiny import ROOT, run, save_tiny

from diffusion.cli import nearest_keys, quoted


@pytest.mark.parametrize("script", ["train", "sample"])
@pytest.mark.parametrize(
    "arguments", [["--help"], ["--cfg", "job"], ["--info", "defaults-tree"], ["trainer.max_stepz=3"]]
)
def test_questions_and_typing_errors_never_import_torch(script, arguments):
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('loaded', sorted({'torch', 'lightning', 'numpy', 'sklearn'} & set(sys.modules)))"
    )
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.argv = {[f'{script}.py', *arguments]!r}; sys.path.insert(0, '.')\n{code}",
    ]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.rstrip().endswith("loaded []")


def test_help_lists_every_group_with_its_options_and_the_examples(monkeypatch, capsys):
    status, out, _ = run("train", ["--help"], monkeypatch, capsys)
    assert status == 0
    for part in ("uv run train.py", "digits*", "shapes", "cosine*", "classifier_free*", "--cfg job", "experiment"):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("trainer.max_stepz=3", "did you mean trainer.max_steps?"),
        ("parameterization=v", "did you mean task.parameterization"),
        ("lr=1e-3", "did you mean optimizer.lr?"),
        ("optimiser.lr=1e-3", "did you mean optimizer.lr?"),
        ("schedul=cosine", "did you mean schedule"),
        ("schedule=cosin", "did you mean cosine? options: cosine, linear"),
        ("experiment=digit", "did you mean digits"),
        ("-m schedule=linear,cosinee seed=0,1", "schedule has no option 'cosinee'; did you mean cosine?"),
        ("-m seed=0,1 sampler.num_stepz=3", "did you mean sampler.num_steps?"),
        ("digits", "experiment=digits?"),
        ("--seed 3", "settings are written without dashes: seed=..."),
        ("--multirn seed=1", "did you mean --multirun?"),
        ("net.foo=1", "there is no 'foo' in net; it has channels"),
        ("data.rot=x", "did you mean data.root?"),
        ("stages=[1,2", "cannot read 'stages=[1,2'"),
        ("+seed=1", "'seed' is there already; change it without the plus: seed=1"),
        ("~nothing", "there is no key 'nothing'"),
        ("--cfg job trainer.max_stepz=3", "did you mean trainer.max_steps?"),
        ("experiment=image_folder", "data.root has no value; add data.root=..."),
        ("name=${foo}", "Interpolation key 'foo' not found"),
        ("trainer.max_steps=ten", "trainer.max_steps=ten does not fit; it must be of type int"),
        ("optimizer.lr=high", "optimizer.lr=high does not fit; it must be of type float"),
        ("sampler.eta=x", "sampler.eta=x does not fit"),
        ("seed=abc", "seed=abc does not fit; it must be of type int"),
        ("task.parameterization=banana", "parameterization must be one of eps, x0, v, mean, got 'banana'"),
        ("net.channels=33", "33 channels cannot be split into 8"),
        ("net.fooo=1 +net.bar=1", "there is no 'fooo' in net"),
        ("+net.bar=1", "unexpected keyword argument 'bar'"),
        ("out_channels=2", "set out_channels so"),
        ("task.variance=learned", "loss=hybrid"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_type(arguments, expected, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = arguments.split()
    if arguments[0].startswith("data.rot"):
        arguments.insert(0, "data=image_folder")
    status, _, err = run("train", arguments, monkeypatch, capsys)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2
    assert len(errors) == 1 and expected in errors[0]
    assert "Traceback" not in err


def test_a_traceback_is_there_for_the_asking(monkeypatch, capsys):
    monkeypatch.setenv("DIFFUSION_TRACEBACK", "1")
    with pytest.raises(Exception, match="max_stepz"):
        run("train", ["trainer.max_stepz=3"], monkeypatch, capsys)


def test_nothing_is_written_and_the_folder_stays_where_it_was(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run("train", ["--cfg", "job", "--resolve"], monkeypatch, capsys)
    assert status == 0 and "max_steps" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sweep_of_samples_goes_on_without_the_job_that_failed(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model.safetensors")
    words = ["-m", "checkpoint=model.safetensors", "num_samples=2", "sweep_dir=sweep", "sampler.num_steps=0,3"]
    status, _, err = run("sample", words, monkeypatch, capsys)
    assert status == 1 and "Traceback" not in err
    assert "[1/2] sampler.num_steps=0 failed" in err and "num_steps must be 1..100" in err
    assert (tmp_path / "sweep" / "sampler.num_steps=3" / "samples.npz").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "sweep"}
    before = (tmp_path / "sweep" / "sampler.num_steps=3" / "samples.npz").stat().st_mtime_ns
    status, _, err = run("sample", words, monkeypatch, capsys)
    assert status == 1 and "[2/2] sampler.num_steps=3 is finished already" in err
    assert (tmp_path / "sweep" / "sampler.num_steps=3" / "samples.npz").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("a.lrr", ["a.lr"]),  # a neighbour in the same place comes first
        ("lr", ["b.lr", "a.lr"][::-1]),  # then the same name elsewhere
        ("zzz", []),
    ],
)
def test_nearest_keys_prefer_the_same_place_then_the_same_name(key, nearest):
    assert nearest_keys(key, ["a", "b", "a.lr", "b.lr", "a.momentum"]) == nearest


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("prompt=a dog, running", "a dog, running"),
        ("prompt=half (of) a dog: x=1 [sic] {no}", "half (of) a dog: x=1 [sic] {no}"),
        ('prompt=say "yes" \\ no', 'say "yes" \\ no'),
        ("prompt='quoted, already'", "quoted, already"),
        ('prompt=["one, two",three]', ["one, two", "three"]),
        ("prompt=null", None),
        ("prompt=7", "7"),
        ("prompt=ends in \\", "ends in \\"),
        ("checkpoint=outputs/seed=1/model.safetensors", "outputs/seed=1/model.safetensors"),
        ("labels=[3,7]", [3, 7]),
        ("seed=7", 7),
    ],
)
def test_texts_and_paths_mean_themselves_to_hydra(argument, value):
    override = OverridesParser.create().parse_override(quoted(argument, ("prompt",)))
    assert not override.is_sweep_override()
    plain = lambda got: got.text if isinstance(got, QuotedString) else got  # noqa: E731
    got = override.value()
    assert ([plain(item) for item in got] if isinstance(got, list) else plain(got)) == value


@pytest.mark.parametrize(
    ("argument", "choices"),
    [
        ("checkpoint=a,b", ["a", "b"]),
        ("checkpoint=x/seed=1/model.safetensors,b", ['"x/seed=1/model.safetensors"', "b"]),
        ("guidance.guidance_scale=1,2", ["1", "2"]),
    ],
)
def test_choices_of_a_sweep_stay_choices(argument, choices):
    override = OverridesParser.create().parse_override(quoted(argument, ("prompt",)))
    assert list(override.sweep_string_iterator()) == choices


def test_the_folder_of_a_sweeps_job_is_a_path_not_a_choice(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = "sweep/schedule=linear,seed=0"
    (tmp_path / path).mkdir(parents=True)
    override = OverridesParser.create().parse_override(quoted(f"run_dir={path}"))
    assert not override.is_sweep_override() and override.value() == path
