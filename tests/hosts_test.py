"""Several processes on loopback, through the command a person types: one run, its ends and its accidents."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from aaconv import checkpoints, cli, config as configs, hosts, metrics, parallel, train
from aaconv.data import catalog

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = 33  # three epochs
CONFIG = f"""
from ml_collections import ConfigDict

def get_config(argument=""):
    c = ConfigDict()
    c.model = ConfigDict(dict(name="wrn", depth=10, width=1))
    c.data = ConfigDict(dict(name="digits", channels=1, mean=(0.3,), std=(0.4,), train_split="train[:704]"))
    c.data.placement = "device"
    c.data.augment = ConfigDict(dict(crop_padding=1))
    c.batch_size, c.eval_batch_size, c.num_steps = 64, 120, {STEPS}
    c.schedule = ConfigDict(dict(learning_rate=0.05))
    c.log_every_steps = 2
    c.checkpoint = ConfigDict(dict(every_steps=10))
    return c
"""
# The command, but for a note of the examples that this process was given.
NOTING_EXAMPLES = """
import sys
from aaconv import cli
from aaconv.data import pipeline

file, take = open(sys.argv.pop(1), "a", buffering=1), pipeline.TrainIterator.__next__

def noting(self):
    batch = take(self)
    print(*batch["index"], file=file)
    return batch

pipeline.TrainIterator.__next__ = noting
cli.run()
"""


class Launched:
    """Processes of one run; what each printed lies in files."""

    def __init__(self, commands, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self.processes = []
        for i, command in enumerate(commands):
            with (folder / f"{i}.out").open("w") as out, (folder / f"{i}.err").open("w") as err:
                self.processes.append(
                    subprocess.Popen(
                        [str(word) for word in command],
                        stdout=out,
                        stderr=err,
                        cwd=REPOSITORY,
                        env={**os.environ, **environment},
                    )  # fmt: skip
                )

    def wait(self, seconds: float = 240) -> list[int]:
        until = time.monotonic() + seconds
        return [process.wait(timeout=max(0.1, until - time.monotonic())) for process in self.processes]

    def out(self, i: int) -> str:
        return (self._folder / f"{i}.out").read_text()

    def err(self, i: int) -> str:
        return (self._folder / f"{i}.err").read_text()

    def wait_for_step(self, step: int) -> None:
        """Returns once process 0 has shown this step, or a later one."""
        until = time.monotonic() + 120
        while not any(int(shown) >= step for shown in re.findall(r"^step (\d+)/", self.err(0), re.MULTILINE)):
            assert time.monotonic() < until, self.err(0)
            time.sleep(0.02)

    def said(self, i: int) -> str:
        """What the command itself said last: libraries print before it."""
        (line,) = re.findall(r"^aaconv: .*(?:\n  .*)*", self.err(i), re.MULTILINE)
        return line


@pytest.fixture(scope="module")
def launch(tmp_path_factory, data_dir):
    """Starts processes with one device each."""
    launched = []
    environment = {"JAX_NUM_CPU_DEVICES": "1", "TFDS_DATA_DIR": str(data_dir)}
    # They compile the same programs every time.
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))

    def start(commands) -> Launched:
        launched.append(Launched(commands, tmp_path_factory.mktemp("printed"), environment))
        return launched[-1]

    yield start
    for one in launched:
        for process in one.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    catalog.prepare("digits", folder)  # once, not by several at the same time
    return folder


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "small.py"
    file.write_text(CONFIG)
    return file


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def commands(count: int, config_file, workdir, *words) -> list[list]:
    """The command line of each of `count` processes."""
    port = free_port()
    return [
        [
            sys.executable, "-m", "aaconv", "train", "--config", config_file, "--workdir", workdir,
            "--coordinator", f"localhost:{port}", "--processes", count, "--process", i, "--start-timeout", 60, *words,
        ]
        for i in range(count)
    ]  # fmt: skip


def rows(workdir) -> list[dict]:
    return [
        {name: value for name, value in row.items() if not name.startswith("perf/")}
        for row in metrics.read_rows(workdir)
    ]


def load(config_file, data_dir, **settings):
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return configs.load(str(config_file), [f"data.data_dir={data_dir}", *overrides])


# One run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, launch, config_file) -> Path:
    """The workdir of a run of two processes; ``examples0`` and ``examples1`` beside it tell what they were given."""
    home = tmp_path_factory.mktemp("undisturbed")
    run = launch(
        [
            [python, "-c", NOTING_EXAMPLES, home / f"examples{i}", *words]
            for i, (python, _, _, *words) in enumerate(commands(2, config_file, home / "run"))
        ]
    )
    assert run.wait() == [0, 0], run.err(0) + run.err(1)
    assert "trained" in run.out(0)
    assert run.out(1) == ""
    return home / "run"


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path, undisturbed, config_file, data_dir):
    """The losses of one process; each example once an epoch; process 0 alone writes."""
    train.train(load(config_file, data_dir, mesh__data=2), tmp_path, progress=metrics.Progress())
    for of_two, of_one in zip(rows(undisturbed), rows(tmp_path), strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-4, abs=1e-6)
    given = [np.loadtxt(undisturbed.parent / f"examples{i}", dtype=int) for i in range(2)]
    assert [part.shape for part in given] == [(STEPS, 32)] * 2
    epochs = np.concatenate(given, axis=1).reshape(3, -1)
    assert (np.sort(epochs, axis=1) == np.arange(704)).all()
    assert (epochs[0] != epochs[1]).any()
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()} | {"curves.png"}  # which the command draws
    assert len(list((undisturbed / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_what_two_processes_saved_one_continues_to_the_end(tmp_path, undisturbed, config_file, data_dir):
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints" / str(STEPS))
    said = io.StringIO()
    config = load(config_file, data_dir, mesh__data=1)
    result = train.train(config, tmp_path / "run", progress=metrics.Lines(said))
    assert f"from step 30 of {STEPS}" in said.getvalue() and result["step"] == STEPS
    for of_both, of_two in zip(rows(tmp_path / "run"), rows(undisturbed), strict=True):
        assert of_both == pytest.approx(of_two, rel=1e-4, abs=1e-6)
    states = [restored(config, workdir, 1) for workdir in (tmp_path / "run", undisturbed)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), *states)


# Accidents


@pytest.mark.slow
def test_a_full_disk_then_a_kill_then_the_end(tmp_path, launch, undisturbed, config_file):
    """The others stop with an error, nobody hangs, and the same command gives the bits of the undisturbed run."""
    started = commands(2, config_file, tmp_path / "run", "--heartbeat-timeout", 20)
    full = launch(started)
    full.wait_for_step(4)
    # More than its lines in this test's file take, less than a checkpoint.
    resource.prlimit(full.processes[0].pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert full.wait(60) == [2, hosts.LOST], full.err(0)
    assert "cannot be written (File too large); last good checkpoint" in full.said(0)
    assert "Traceback" not in full.err(0)
    assert_lost(full, 1)

    killed = launch(started)
    killed.wait_for_step(12)
    killed.processes[0].kill()
    assert killed.wait(60) == [-signal.SIGKILL, hosts.LOST]
    assert_lost(killed, 1)

    assert launch(started).wait() == [0, 0]
    assert rows(tmp_path / "run") == rows(undisturbed)
    for_both = [weights(workdir, STEPS) for workdir in (tmp_path / "run", undisturbed)]
    assert for_both[0] == for_both[1]


WITHOUT_A_WORD = """
import resource, sys, time
from aaconv import hosts

i = int(sys.argv[2])
hosts.start(sys.argv[1], 2, i, start_timeout=60, heartbeat_timeout=10)
with hosts.Watch() as others:
    hosts.exchange("ready")
    if i == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # a full disk, with standard error on it
        others.cannot_write(ValueError("the disk is full"))
        time.sleep(60)
    hosts.exchange("never")
"""


@pytest.mark.slow
def test_a_process_ends_even_where_its_last_words_cannot_be_written(launch):
    port = free_port()
    run = launch([[sys.executable, "-c", WITHOUT_A_WORD, f"localhost:{port}", i] for i in range(2)])
    assert run.processes[0].wait(60) == hosts.FAILED, run.err(0)
    assert "the disk is full" not in run.err(0)
    assert run.processes[1].wait(60) != 0
    assert "lost contact" in run.err(1)


def assert_lost(run: Launched, i: int) -> None:
    said = run.said(i)
    assert re.search(rf"process {i} of \d .* lost contact with the others at step \d+ of {STEPS}", said)
    assert "Run the same command again on all hosts" in said


def weights(workdir: Path, step: int) -> dict:
    """The checksums of all arrays of a checkpoint."""
    with checkpoints.Checkpoints(workdir, read_only=True) as saved:
        return saved.meta(step)["crc32"]


@pytest.mark.by_hand
def test_four_processes_stop_together_and_their_checkpoint_serves_any_devices(
    tmp_path, launch, undisturbed, config_file, data_dir
):
    stopped = launch(commands(4, config_file, tmp_path))
    stopped.wait_for_step(4)
    stopped.processes[2].send_signal(signal.SIGTERM)
    assert stopped.wait() == [75] * 4, stopped.err(0)
    (step,) = {re.search(rf"stopped by SIGTERM: saved step (\d+) of {STEPS}", stopped.said(i))[1] for i in range(4)}

    config = load(config_file, data_dir)
    on = {devices: restored(config, tmp_path, devices) for devices in (1, 2, 8)}
    for devices, state in on.items():
        assert state["step"] == int(step)
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(state["model"])} == {devices}
        jax.tree.map(np.testing.assert_array_equal, state, on[1])
    for of_four, of_two in zip(rows(tmp_path), rows(undisturbed), strict=False):
        assert of_four == pytest.approx(of_two, rel=1e-4, abs=1e-6)


def restored(config, workdir: Path, devices: int) -> dict:
    """The newest checkpoint, on so many devices of this process."""
    with config.unlocked():
        config.mesh.data = devices
    run = train.build(config, None, None, training=True)
    with checkpoints.Checkpoints(workdir, read_only=True) as saved:
        found = saved.restore(run.abstract_state().items())
    assert found is not None
    return {"step": found[0], **found[1]}


# What processes must agree on

AGREEING = """
import json, os, shutil, signal, sys, time
from pathlib import Path

port, i, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
os.environ |= {  # as in a step of Slurm's
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": str(i),
    "SLURM_LOCALID": str(i), "JAX_COORDINATOR_PORT": port,
}
import jax, numpy as np
from aaconv import checkpoints, hosts, parallel, train

hosts.start(start_timeout=60, heartbeat_timeout=4)
assert (jax.process_index(), jax.process_count()) == (i, 2)
said = []

def refused(check):
    try:
        check()
    except (ValueError, OSError) as error:
        said.append(str(error))

def only_in_1():
    if i == 1:
        raise OSError("no such disk")
    return "fine"

assert hosts.exchange({"i": i, "word": "x" * i}) == [{"i": 0, "word": ""}, {"i": 1, "word": "x"}]
assert hosts.together(lambda: i) == i
refused(lambda: hosts.together(only_in_1))
hosts.check_alike({"config seed": 3, "version jax": "1"})
refused(lambda: hosts.check_alike({"config seed": 3 + i, "version jax": "1", **({"code revision": "a"} if i else {})}))
hosts.check_same_folder(folder)
with checkpoints.Checkpoints(folder) as saver:
    mesh = parallel.make_mesh()
    split = parallel.to_global({"w": np.arange(4.0, dtype=np.float32) + 4 * i}, parallel.batch_sharding(mesh))
    saver.save(1, {"model": split, "training": split}, {})
    for sharding in (parallel.replicated(mesh), parallel.batch_sharding(mesh)):
        _, items, _ = saver.restore({"model": {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)}})
        assert items["model"]["w"].sharding == sharding
    saver.save(2, {"model": split, "training": split}, {})
    saver.wait()
    if i == 0:  # damage, and what keeps process 0 from moving it out of the way
        for file in (folder / "checkpoints/2").rglob("*"):
            file.is_dir() or file.write_bytes(b"")
        (folder / "damaged_checkpoints").write_text("in the way")
    hosts.exchange("damaged")
    refused(lambda: saver.restore({"model": {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)}}))
    if i == 0:
        shutil.rmtree(folder / "checkpoints/2")
(folder / str(i)).mkdir()
refused(lambda: hosts.check_same_folder(folder / str(i)))
print(json.dumps(said), flush=True)
# SIGTERM before the first step of a run that continues from far on: all stop, at the same step.
signals = train.Signals()
if i == 1:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)  # until jax has told the others
hosts.exchange("sent")
stops = [train.asked_to_stop(signals, steps) for steps in range(5)]
assert True in stops and hosts.exchange(stops) == [stops, stops], stops
hosts.at("step 3 of 9")
if i == 1:
    os.kill(os.getpid(), signal.SIGSTOP)  # silent, as behind a broken network
hosts.exchange("never")
"""


def test_what_two_processes_agree_on_save_together_and_that_a_silent_one_ends_the_other(tmp_path, launch):
    port = free_port()
    run = launch([[sys.executable, "-c", AGREEING, port, i, tmp_path] for i in range(2)])
    assert run.processes[0].wait(timeout=60) == hosts.LOST, run.err(0)
    assert re.search(r"^aaconv: error: process 0 of 2 .* lost contact .* at step 3 of 9", run.err(0), re.MULTILINE)
    host = socket.gethostname()
    failed, unlike, stuck, elsewhere = json.loads(run.out(0))
    assert "checkpoints/2 cannot be read, and process 0 cannot move it to" in stuck and "(FileExistsError: " in stuck
    assert failed == f"process 1 ({host}): no such disk"
    assert unlike.splitlines()[1:] == [
        f"  config seed: 4 in process 1 ({host}), 3 in process 0 ({host})",
        f"  code revision: 'a' in process 1 ({host}), None in process 0 ({host})",
    ]
    assert f"{tmp_path}/0 is not one folder for all hosts: process 1 ({host}) does not see" in elsewhere
    stuck = re.sub(r" \(FileExistsError: .*?\):", ":", stuck)  # known to process 0 alone
    said = ["no such disk", unlike, stuck, elsewhere]
    assert [text.replace("/1 is", "/0 is") for text in json.loads(run.out(1))] == said
    assert not list(tmp_path.rglob(".hosts*"))
    whole = np.arange(8, dtype=np.float32)
    with checkpoints.Checkpoints(tmp_path, read_only=True) as saved:
        assert saved.meta(1)["crc32"]["model"] == {"w": zlib.crc32(whole.tobytes())}
        for devices in (1, 8):
            sharding = parallel.batch_sharding(parallel.make_mesh(devices))
            found = saved.restore({"model": {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)}})
            assert found is not None
            np.testing.assert_array_equal(found[1]["model"]["w"], whole)


# Starting


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {f"SLURM_{name}": "1" for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
    ],
    ids=["laptop", "one Slurm task", "one MPI process", "a pod by itself", "one TPU host"],
)
def test_one_process_starts_as_ever(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hook, out = sys.excepthook, sys.stdout
    hosts.start()
    assert not jax.distributed.is_initialized()
    assert (sys.excepthook, sys.stdout) == (hook, out)
    assert hosts.exchange({"a": 1}) == [{"a": 1}]


def test_python_that_used_devices_before_is_alone_and_keeps_its_own_ends(monkeypatch, capfd):
    for name, value in {"JOB_ID": "1", "STEP_NODELIST": "n", "NTASKS": "2", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    jax.devices()
    hook, out, aborted = sys.excepthook, sys.stdout, signal.getsignal(signal.SIGABRT)
    hosts.start()
    assert (sys.excepthook, sys.stdout, signal.getsignal(signal.SIGABRT)) == (hook, out, aborted)
    os.write(1, b"a result")
    assert capfd.readouterr() == ("a result", "")


LONE_TPU = """
import os, jax
os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # jax sets it where there are no chips
from aaconv import hosts
try:
    hosts.start()
except ValueError as error:
    print(error)
"""


def test_a_machine_with_tpus_and_without_googles_cloud():
    environment = {**os.environ, "JAX_FORCE_TPU_INIT": "1", "GCE_METADATA_IP": f"localhost:{free_port()}"}
    environment.pop("JAX_PLATFORMS", None)
    command = [sys.executable, "-c", LONE_TPU]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert "no metadata server of Google's cloud tells whether it is one host of several" in done.stdout, done.stderr
    assert "if it is alone, set TPU_SKIP_MDS_QUERY=1" in done.stdout


# The roll call, before jax starts


def answers(*of_each, timeout=10.0) -> list[BaseException | None]:
    """What `hosts.start` raises in threads that stand for processes: (processes, process), and a delay in seconds."""
    port, found = free_port(), [None] * len(of_each)

    def come(place, processes, process):
        try:
            hosts.start(f"localhost:{port}", processes, process, start_timeout=timeout)
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=come, args=(place, *numbers)) for place, numbers in enumerate(of_each)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_process_that_never_comes_is_named():
    first, second = answers((3, 0), (3, 1), timeout=1.0)
    assert isinstance(first, hosts.LostError) and isinstance(second, hosts.LostError)
    assert re.search(
        r"process 0 \(.*\) waited 1 s for process 2 of 3; there came 0 .*, 1 .*--start-timeout", str(first)
    )
    assert str(second) == str(first)


def test_a_coordinator_that_cannot_be_reached_is_named():
    (error,) = answers((2, 1), timeout=1.0)
    assert isinstance(error, hosts.LostError)
    words = (
        r"process 1 of 2 \(.*\) waited 1 s for process 0 at localhost:\d+ \(Connection refused\). Check that --coord"
    )
    assert re.search(words, str(error))
    nowhere = f"{'a' * 64}.invalid"  # 63 letters are the most that a name's part may have
    with pytest.raises(ValueError, match=rf"'{nowhere}:80': .* does not know '{nowhere}' \(.+\), and waited 1 s; give"):
        hosts.start(f"{nowhere}:80", 2, 1, start_timeout=1)


def test_a_name_server_that_does_not_answer_is_no_wrong_input(monkeypatch):
    def ask(*_):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    with pytest.raises(hosts.LostError, match=r"for 1 s nobody told .* where 'first' is .* run the same command again"):
        hosts.start("first:80", 2, 1, start_timeout=1)


def test_something_else_at_the_coordinators_port():
    with socket.create_server(("localhost", 0)) as server:
        server.settimeout(5)
        port = server.getsockname()[1]

        def speak():
            line, _ = server.accept()
            line.sendall(b"220 mail server\n")
            line.close()

        thread = threading.Thread(target=speak)
        thread.start()
        with pytest.raises(hosts.LostError, match=f"at localhost:{port} "):
            hosts.start(f"localhost:{port}", 2, 1, start_timeout=1)
        thread.join()
        with pytest.raises(ValueError, match=f"process 0 .* cannot listen on port {port} .*another port"):
            hosts.start(f"localhost:{port}", 2, 0, start_timeout=1)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([(3, 0), (2, 1)], r"process 1 \(.*\) was started with --processes 2, process 0 \(.*\) with --processes 3"),
        ([(3, 0), (3, 1), (3, 1)], "two processes have the index 1, on .* number them from 0 to 2"),
    ],
)
def test_processes_that_contradict_each_other(numbers, words):
    for error in answers(*numbers):
        assert type(error) is ValueError
        assert re.search(words, str(error))


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--processes", 2], "--coordinator and --process missing: several processes need all of"),
        (["--coordinator", "a:1", "--process", 0], "--processes missing"),
        (["--coordinator", "a:1", "--processes", 2, "--process", 2], "--process 2 must lie between 0 and 1"),
        (["--coordinator", "a:1", "--processes", 2, "--process=-1"], "--process -1 must lie between 0 and 1"),
        (["--coordinator", "a:1", "--processes", 0, "--process", 0], "--processes 0 must be at least 1"),
        (["--coordinator", "a", "--processes", 2, "--process", 0], "--coordinator 'a' must be HOST:PORT"),
        (["--coordinator", "a:99999", "--processes", 2, "--process", 0], "a free port there from 1 to 65535"),
        (["--coordinator", "a:1", "--processes", "two", "--process", 0], "argument --processes: invalid int value"),
        (["--start-timeout", 0.1], "--start-timeout=0.1 must be at least 1 second"),
        (["--heartbeat-timeout", 0], "argument --heartbeat-timeout: 0 must be a number above 0"),
    ],
)
def test_flags_that_do_not_fit(tmp_path, config_file, capfd, words, answer):
    argv = ["train", "--config", config_file, "--workdir", tmp_path / "run", *words]
    assert cli.main([str(word) for word in argv]) == 2
    assert answer in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
