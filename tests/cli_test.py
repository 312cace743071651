"""The command as a person types it: results, exit codes and every wrong input's one-line answer."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aaconv import cli

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = """
from ml_collections import ConfigDict

def get_config(argument=""):
    c = ConfigDict()
    c.model = ConfigDict(dict(name=argument or "aa_wrn", depth=10, width=1))
    if not argument:
        c.model.update(dict(kappa=0.5, upsilon=0.25, num_heads=2, min_key_depth=4))
    c.data = ConfigDict(dict(name="digits", channels=1, mean=(0.3,), std=(0.4,)))
    c.batch_size, c.eval_batch_size, c.num_steps = 64, 120, 2
    c.mesh = ConfigDict(dict(data=1))
    c.log_every_steps = 1
    return c
"""


class Answer:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def config(folder) -> str:
    (folder / "tiny.py").write_text(CONFIG)
    return str(folder / "tiny.py")


@pytest.fixture(scope="module", autouse=True)
def data_dir(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        patch.delenv("AACONV_DEBUG", raising=False)
        yield


@pytest.fixture
def aaconv(capfd):
    def call(*argv: str | Path) -> Answer:
        code = cli.main([str(word) for word in argv])
        return Answer(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="module")
def trained(folder, config) -> Path:
    """The workdir of a run of two steps, with what the command printed beside it."""
    workdir = folder / "run"
    words = [sys.executable, "-m", "aaconv", "train", "--config", config, "--workdir", workdir, "--maps", "3"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return workdir


@pytest.fixture
def images(tmp_path) -> Path:
    from sklearn.datasets import load_digits

    pictures = load_digits().images[:3] * (255 / 16)
    for index, picture in enumerate(pictures.astype(np.uint8)):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    (tmp_path / "again").mkdir()
    Image.fromarray(picture).resize((40, 30)).convert("RGB").save(tmp_path / "again" / "0.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("words, not pixels")
    (tmp_path / "empty.jpg").touch()
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.5
    Image.fromarray(picture).save(tmp_path / "exif.jpg", exif=exif)
    broken = (tmp_path / "exif.jpg").read_bytes().replace(b"\x01\x1a\x00\x05", b"\x01\x00\x00\x05")
    (tmp_path / "exif.jpg").write_bytes(broken)  # a fraction in the place of the width
    return tmp_path


# train, eval


def test_train_ends_with_metrics_and_paths_that_exist(trained, folder):
    printed = (folder / "printed").read_text()
    assert re.search(r"^trained +2 steps", printed, re.M) and re.search(r"^test accuracy +\d+\.\d\d%$", printed, re.M)
    for name in ("checkpoint", "metrics", "curves", "attention maps"):
        found = re.search(rf"^{name} +(\S+)$", printed, re.M)
        assert found and Path(found.group(1)).exists(), name
    with Image.open(trained / "attention.png") as picture:
        assert min(picture.size) > 300


def test_train_again_finds_the_run_complete(trained, config, aaconv):
    answer = aaconv("train", "--config", config, "--workdir", trained)
    assert answer.code == cli.OK and "the run is complete" in answer.err and "test accuracy" in answer.out


@pytest.mark.parametrize("with_config", [True, False])
def test_eval_agrees_with_the_end_of_training(trained, config, aaconv, with_config):
    answer = aaconv("eval", *(["--config", config] if with_config else []), "--workdir", trained)
    last = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()][-1]
    assert answer.code == cli.OK
    assert f"{100 * last['eval/accuracy']:.2f}%" in answer.out and f"{last['eval/loss']:.4f}" in answer.out


def test_another_config_in_a_workdir_is_refused_and_nothing_changes(trained, config, aaconv):

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.name != ".lock"}

    before = files()
    answer = aaconv("train", "--config", config, "--workdir", trained, "--config.seed=5")
    assert answer.code == cli.WRONG_INPUT and "seed was 0, is 5" in answer.err
    answer = aaconv("eval", "--config", config, "--workdir", trained, "--config.model.width=2")
    assert answer.code == cli.WRONG_INPUT and "+ params" in answer.err and "model.width was 1, is 2" in answer.err
    assert files() == before


def test_sigterm_saves_and_ends_with_its_own_code(folder, config):
    words = [sys.executable, "-m", "aaconv", "train", "--config", config, "--workdir", folder / "stopped"]
    words += ["--config.num_steps=100000", "--config.eval_every_epochs=10000"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == cli.STOPPED, "".join(lines)
    assert "SIGTERM" in lines[-1] and "saved step" in lines[-1]
    assert any((folder / "stopped" / "checkpoints").iterdir())


def test_infinite_loss_ends_with_its_own_code(folder, config, aaconv):
    answer = aaconv(
        *("train", "--config", config, "--workdir", folder / "nan"),
        *("--config.schedule.learning_rate=1e30", "--config.num_steps=4"),
    )
    assert answer.code == cli.NOT_FINITE and "within steps [" in answer.err and "Traceback" not in answer.err


# show


def test_show_prints_config_counts_and_attention(config, aaconv):
    answer = aaconv("show", "--config", config, "--config.model.num_heads", "4", "--config.data.augment.flip=true")
    assert answer.code == cli.OK
    assert re.search(r"num_heads = 4 +# the network's own is 8", answer.out)
    assert re.search(r"flip = True +# default False", answer.out)
    assert re.search(r"position_encoding = None +# the network's own 'relative'", answer.out)
    stages = dict(re.findall(r"^(stem|stage\d|head|all) .*?([\d,]+) +\d+\.\d%", answer.out, re.M))
    counts = {stage: int(count.replace(",", "")) for stage, count in stages.items()}
    assert counts.pop("all") == sum(counts.values()) and len(counts) == 5
    assert re.search(r"^stage2_block1/conv1 +8x8 +4x4 +4x4 +4 ", answer.out, re.M)


def test_show_knows_a_plain_network_and_every_layer(config, aaconv):
    answer = aaconv("show", "--config", f"{config}:wrn", "--layers")
    assert answer.code == cli.OK and "nothing attends" in answer.out
    assert re.search(r"^stage3_block1/conv2 +conv +2x2x64 +36,864 ", answer.out, re.M)


def test_show_needs_no_prepared_data(config, aaconv, tmp_path):
    words = "--config.data.name=cifar100 --config.data.channels=3 --config.data.mean=0,0,0 --config.data.std=1,1,1"
    answer = aaconv("show", "--config", config, *words.split(), f"--config.data.data_dir={tmp_path}")
    assert answer.code == cli.OK and "32x32x3 images, 100 classes" in answer.out
    assert "`aaconv prepare cifar100` does that" in answer.out


def test_show_of_a_workdir(trained, aaconv):
    answer = aaconv("show", "--workdir", trained)
    assert answer.code == cli.OK and "aa_wrn for 8x8x1 images, 10 classes" in answer.out


# predict


def test_predict_classifies_files_of_any_size(trained, images, aaconv):
    answer = aaconv("predict", "--workdir", trained, images / "0.png", images / "again" / "0.png", "--top", "3")
    assert answer.code == cli.OK
    blocks = answer.out.split(str(images))[1:]
    assert len(blocks) == 2
    for block in blocks:
        shares = [float(share) for share in re.findall(r"([\d.]+)%  \d$", block, re.M)]
        assert len(shares) == 3 and shares == sorted(shares, reverse=True)


def test_all_probabilities_add_up(trained, images, aaconv):
    answer = aaconv("predict", "--workdir", trained, images / "1.png", "--top", "99")
    assert abs(sum(map(float, re.findall(r"([\d.]+)%", answer.out))) - 100) < 1


def test_corrupt_image_is_named_and_the_others_classified(trained, images, aaconv):
    corrupt = [images / name for name in ("cut.png", "text.png", "empty.jpg", "exif.jpg")]
    missing, whole = images / "missing.png", images / "1.png"
    answer = aaconv("predict", "--workdir", trained, *corrupt, missing, whole)
    assert answer.code == cli.WRONG_INPUT and "Traceback" not in answer.err
    assert all(f"{file}' is corrupt" in answer.err for file in corrupt) and f"{missing}' does not exist" in answer.err
    assert "5 of 6 images could not be read; 1 classified" in answer.err and str(whole) in answer.out


def test_maps_of_each_image_or_of_all(trained, images, aaconv, tmp_path):
    files = [images / "0.png", images / "again" / "0.png"]
    answer = aaconv("predict", "--workdir", trained, *files, "--maps", tmp_path / "maps")
    assert answer.code == cli.OK
    pictures = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert pictures == ["0_attention_1.png", "0_attention_2.png"]
    answer = aaconv(
        *("predict", "--workdir", trained, *files, "--maps", tmp_path / "all.png"),
        *("--layer", "stage2_block1/conv1", "--query", "0.1,0.9"),
    )
    assert answer.code == cli.OK and f"attention maps  {tmp_path / 'all.png'}" in answer.out
    assert (tmp_path / "all.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layer", "stage9"], "--layer chooses what --maps draws: add --maps"),
        (["--maps", "x.png", "--layer", "stage2_block1/conv9"], "did you mean 'stage2_block1/conv1/attention'"),
        (["--maps", "x.png", "--query", "1,2"], "must be two numbers from 0 to 1"),
        (["--maps", "/proc/none/x.png"], "cannot be written"),
        (["--top", "0"], "must be a whole number of at least 1"),
        (["--checkpoint", "oldest"], "invalid choice: 'oldest'"),
    ],
)
def test_wrong_predict_flags(trained, images, aaconv, flags, words):
    answer = aaconv("predict", "--workdir", trained, images / "0.png", *flags)
    assert answer.code == cli.WRONG_INPUT and words in answer.err and "Traceback" not in answer.err


def test_maps_of_a_network_without_attention(config, aaconv, tmp_path):
    answer = aaconv("train", "--config", f"{config}:wrn", "--workdir", tmp_path / "run", "--maps", "2")
    assert answer.code == cli.WRONG_INPUT and "no attention to draw: leave --maps out" in answer.err
    assert not (tmp_path / "run").exists()


def test_folder_without_checkpoint(trained, images, aaconv, tmp_path):
    shutil.copy(trained / "config.json", tmp_path)
    for command in (["eval"], ["predict", images / "0.png"]):
        answer = aaconv(*command, "--workdir", tmp_path)
        assert answer.code == cli.WRONG_INPUT and "no checkpoint in" in answer.err


# The command line itself


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "",
            "no command: give one of train, eval, show, models, predict, prepare, sweep, launch, bench, ",
        ),
        ("trian", "unknown command 'trian'; did you mean 'train'"),
        ("xyz", "unknown command 'xyz': give one of train"),
        ("train", "--config is missing"),
        ("train --config CONFIG", "--workdir is missing"),
        ("train CONFIG", "did you mean --config"),
        ("train --confg CONFIG", "unknown flag --confg of `aaconv train`; did you mean --config?"),
        ("train --config CONFIG --kappa=0.2", "unknown flag --kappa; did you mean --config.model.kappa?"),
        ("train --config CONFIG --batch_size 2", "did you mean --config.batch_size?"),
        ("train --config CONFIG --workdir DIR --config.seed", "--config.seed has no value"),
        ("train --config CONFIG --workdir DIR --config.seed --debug", "--config.seed has no value"),
        ("train --config CONFIG --workdir DIR --config.sed=1", "did you mean 'seed'"),
        ("train --config CONFIG --workdir DIR --config.model.upsilon -1", "upsilon=-1.0 must lie between 0"),
        ("train --config CONFIG --workdir DIR --config.model.name aa_wnr", "did you mean 'aa_wrn'"),
        ("train --config CONFIG --workdir DIR --config.data.train_split=trai", "data.train_split='trai'"),
        ("train --config CONFIG --workdir DIR --config.data.eval_split=test[:0]", "is empty"),
        ("train --config CONFIG --workdir DIR --config.data.name=cifar100", "run `aaconv prepare cifar100"),
        ("train --config CONFIG --workdir DIR --config.data.channels=3", "data.channels=3"),
        ("train --config CONFIG --workdir DIR --config.data.image_size=3", "must be at least 4"),
        ("train --config CONFIG --workdir /proc/none", "cannot be written"),
        ("train --config CONFIG --workdir DIR --maps x", "x must be a whole number"),
        ("train --config tiny.pi --workdir DIR", "config file 'tiny.pi' does not exist"),
        ("eval --workdir DIR", "has no config.json: name the folder of a run, or a --config"),
        ("show", "--config is missing: name a config file or --workdir DIR"),
        ("predict --workdir DIR x.png", "has no config.json"),
        ("predict --config CONFIG --workdir DIR", "no image files"),
        ("prepare", "NAME is missing"),
        ("prepare cifr100", "did you mean 'cifar100'"),
        ("prepare digits --config.seed=1", "takes no config: leave out --config.seed=1"),
        ("version now", "`aaconv version` does not take 'now'"),
        ("bench", "nothing to measure: give one of attention, step"),
        ("bench atention", "`aaconv bench` does not measure 'atention'; did you mean 'attention'"),
        ("bench --seconds 3", "`aaconv bench` does not measure '--seconds': give one of attention, step"),
        (
            "bench attention --shap 1,2,3,4,5,6",
            "unknown flag --shap of `aaconv bench attention`; did you mean --shape",
        ),
        ("bench attention --shape 4,8,28", "--shape '4,8,28' must be six whole numbers of at least 1, B,n,H,W,d,e"),
        ("bench attention --shape 4,8,0,28,20,4", "must be six whole numbers of at least 1"),
        ("bench attention --implementation skwe", "--implementation 'skwe' is not one of factorised, "),
        ("bench attention --seconds 0", "0 must be a number above 0"),
        ("bench attention --dtype int8", "invalid choice: 'int8'"),
        ("bench attention --output /proc/none", "--output /proc/none cannot be written"),
        ("bench attention --config.seed=1", "`aaconv bench attention` takes no config: leave out --config.seed=1"),
        ("bench step --models resnet5", "unknown model 'resnet5'; did you mean 'resnet50'"),
        ("models --names zz*", "no network matches 'zz*': `aaconv models --names` lists them all"),
        ("bench step --models ,", "--models is empty: name networks"),
        ("bench step --implementation skwe", "did you mean 'skew'"),
        ("bench step --config CONFIG", "data.image_size is not set in the config: add --size"),
        ("bench step --size 8 --output DIR", "both must be at least 32"),
        ("bench step --config.batchsize=3", "unknown config key 'batchsize'"),
    ],
)
def test_wrong_command_line_is_answered_in_one_line(config, aaconv, tmp_path, line, words):
    answer = aaconv(*line.replace("CONFIG", config).replace("DIR", str(tmp_path / "run")).split())
    assert answer.code == cli.WRONG_INPUT
    last = answer.err.strip().splitlines()[-1]
    assert last.startswith("aaconv: error: ") and words in last
    assert "Traceback" not in answer.err and answer.out == ""
    assert not list(tmp_path.rglob("checkpoints/*"))


def test_names_of_networks(aaconv):
    answer = aaconv("models", "--names", "aa_resnet5?")
    assert (answer.code, answer.out) == (cli.OK, "aa_resnet50\n")


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_shows_where_an_error_comes_from(config, aaconv, how, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("AACONV_DEBUG", "1")
    flags = ["--debug"] if how == "flag" else []
    answer = aaconv("show", "--config", config, "--config.batch_size=0", *flags)
    assert answer.code == cli.WRONG_INPUT and "Traceback" in answer.err and "batch_size=0" in answer.err


def test_prepare_prints_the_folder(aaconv, tmp_path):
    answer = aaconv("prepare", "digits", "--data-dir", tmp_path)
    assert answer.code == cli.OK and (Path(answer.out.strip()) / "dataset_info.json").is_file()


@pytest.mark.parametrize("words", [["version"], ["--version"]])
def test_version(aaconv, words):
    import jax

    import aaconv as package

    answer = aaconv(*words)
    assert answer.code == cli.OK
    assert f"aaconv {package.__version__}\n" in answer.out and f"jax {jax.__version__}\n" in answer.out


@pytest.mark.parametrize(
    "command",
    [
        "",
        "train",
        "eval",
        "show",
        "predict",
        "prepare",
        "sweep",
        "sweep status",
        "sweep report",
        "bench",
        "bench attention",
        "bench step",
        "bench input",
        "bench loop",
        "version",
    ],
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command.split(), "--help"])
    assert stopped.value.code == 0 and "usage: aaconv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("package", "extra", "words"),
    [
        ("ml_collections", "train", ["show", "--config", "CONFIG"]),
        ("optax", "train", ["train", "--config", "CONFIG", "--workdir", "DIR"]),
        ("matplotlib", "plots", ["train", "--config", "CONFIG", "--workdir", "DIR", "--maps", "1"]),
    ],
)
def test_missing_package_is_answered_with_what_to_install(config, tmp_path, package, extra, words):
    words = [word.replace("CONFIG", config).replace("DIR", str(tmp_path / "run")) for word in words]
    # None in sys.modules is Python's own way to say that a module cannot be imported.
    code = f"import sys; sys.modules[{package!r}] = None; from aaconv import cli; sys.exit(cli.main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == cli.WRONG_INPUT, done.stderr
    assert f"this needs {package}, which is not installed: run  pip install 'aaconv[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_closed_pipe_is_no_error(config):
    line = f"{sys.executable} -m aaconv show --config {config} --layers | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ})
    assert done.stdout.startswith("config ") and done.stderr == ""
