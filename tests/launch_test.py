"""What `aaconv launch` prints is run where it can be: by a real Slurm, and by bash with a gcloud that only listens."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aaconv import cli, launch, metrics, slices

REPOSITORY = Path(__file__).resolve().parents[1]


# Slurm


CONFIG = """
from ml_collections import ConfigDict

def get_config():
    c = ConfigDict()
    c.model = ConfigDict(dict(name="aa_wrn", depth=10, width=1, kappa=0.5, upsilon=0.25, num_heads=2, min_key_depth=4))
    c.data = ConfigDict(dict(name="digits", channels=1, mean=(0.3,), std=(0.4,), data_dir="{data_dir}"))
    c.batch_size, c.eval_batch_size, c.num_steps = 64, 120, {num_steps}
    c.log_every_steps = 1
    c.eval_every_epochs = 1000.0
    return c
"""
# In the place of training: saves when it is told to, and is done when it runs again.
PATIENT = """#!/bin/bash
echo "task $SLURM_PROCID, restart ${SLURM_RESTART_COUNT:-0}: $*"
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && exit 0
trap 'sleep 1; echo saved; exit 75' TERM
while true; do sleep 0.1; done
"""


@pytest.fixture(scope="module")
def patient(slurm) -> launch.Training:
    # Not a space in the name itself: Slurm without control groups (proctrack/linuxproc) would lose sight of it.
    program = slurm.folder / "a folder/patient"
    program.parent.mkdir()
    program.write_text(PATIENT)
    program.chmod(0o755)
    return launch.Training("digits.py", "it's $HOME", ['a="x, y"'], [str(program)])


def running_job(slurm, training: launch.Training, **options) -> str:
    job = slurm.submit(launch.slurm(training, nodes=2, save_seconds=60, **options))
    slurm.wait_for(lambda: slurm.log(job).count("restart 0") == 2, 60, "output of both tasks")
    return job


@pytest.mark.slow
def test_slurm_runs_one_task_a_node_with_the_arguments_as_they_are(slurm, patient):
    job = running_job(slurm, patient, setup=["echo set up"])
    slurm.call("scancel", "--signal=TERM", job)
    slurm.wait_for(lambda: slurm.field(job, "JobState") == "COMPLETED", 60, "end of the job that ran again")
    assert slurm.field(job, "Restarts") == "1"
    lines = slurm.log(job).splitlines()
    assert lines.count("set up") == 2 and lines.count("saved") == 2
    said = 'train --config digits.py --workdir it\'s $HOME --config.a="x, y"'
    for restart in (0, 1):
        for task in (0, 1):
            assert f"task {task}, restart {restart}: {said}" in lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "state", "restarts"),
    [(("scancel",), "CANCELLED", "0"), (("scontrol", "requeue"), "COMPLETED", "1")],
    ids=["cancelled", "taken away by Slurm"],
)
def test_slurm_jobs_that_are_stopped_by_others_start_again_only_if_they_should(
    slurm, patient, command, state, restarts
):
    """Cancelling sends SIGTERM too, the tasks leave with 75, and the script must not bring the job back."""
    job = running_job(slurm, patient)
    slurm.call(*command, job)
    slurm.wait_for(lambda: slurm.field(job, "JobState") == state, 60, f"job that is {state}")
    assert slurm.log(job).count("saved") == 2
    # Not merely between two runs.
    slurm.wait_for(lambda: slurm.field(job, "EndTime") != "Unknown", 60, "end")
    assert (slurm.field(job, "JobState"), slurm.field(job, "Restarts")) == (state, restarts)


@pytest.mark.slow
def test_slurm_training_is_stopped_goes_on_and_gives_what_one_process_gives(slurm, tmp_path):
    config = tmp_path / "digits.py"
    config.write_text(CONFIG.format(data_dir=tmp_path / "tfds", num_steps=12))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}

    def aaconv(*words: str, devices: int = 2) -> None:
        command = [sys.executable, "-m", "aaconv", *words]
        subprocess.run(command, env={**environment, "JAX_NUM_CPU_DEVICES": str(devices)}, check=True, timeout=300)

    aaconv("prepare", "digits", "--data-dir", str(tmp_path / "tfds"))
    aaconv("train", "--config", str(config), "--workdir", str(tmp_path / "one"))
    training = launch.Training(str(config), str(tmp_path / "two"), (), [sys.executable, "-m", "aaconv"])
    setup = [
        f"export {name}={shlex.quote(value)}"
        for name, value in environment.items()
        if name.startswith(("JAX", "PYTHONP"))
    ]
    job = slurm.submit(launch.slurm(training, nodes=2, setup=[*setup, "export JAX_NUM_CPU_DEVICES=1", "set -e"]))
    try:
        slurm.wait_for(lambda: metrics.read_rows(tmp_path / "two") or "exit code" in slurm.log(job), 240, "first step")
        slurm.call("scancel", "--signal=TERM", job)
        slurm.wait_for(lambda: slurm.field(job, "JobState") not in ("RUNNING", "COMPLETING", "PENDING"), 300, "end")
    finally:
        print(slurm.log(job))
    assert (slurm.field(job, "JobState"), slurm.field(job, "Restarts")) == ("COMPLETED", "1")
    one, two = (metrics.read_rows(tmp_path / name) for name in ("one", "two"))
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for name in ("train/loss", "eval/loss"):
        values = [[row[name] for row in rows if name in row] for rows in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_slurm_options_and_what_cannot_be_one():
    script = launch.slurm(
        launch.Training("c.py", "runs/a b"), nodes=2, gpus_per_node=8, cpus_per_task=12, time="4:00:00"
    )
    lines = script.splitlines()
    for option in ("job-name='a b'", "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "time=4:00:00"):
        assert f"#SBATCH --{option}" in lines
    # Slurm's srun does not take the number of cores over from the job.
    assert "srun --kill-on-bad-exit=0 --wait=300 --cpus-per-task=12 \\" in lines
    with pytest.raises(ValueError, match=r"line break in 'a\\nb'"):
        launch.slurm(launch.Training("c.py", "a\nb"), nodes=1)


# Kubernetes


REQUIRED, INTEGER, STRING, BOOLEAN = object(), int, str, bool
COUNT = {"google.com/tpu": INTEGER}
CONTAINER = {
    "name": (REQUIRED, STRING),
    "image": (REQUIRED, STRING),
    "command": [STRING],
    "resources": {"requests": COUNT, "limits": COUNT},
    "volumeMounts": [{"name": (REQUIRED, STRING), "mountPath": (REQUIRED, STRING)}],
}
POD = {
    "restartPolicy": ("Never",),  # the only one that goes with a podFailurePolicy
    "terminationGracePeriodSeconds": INTEGER,
    "serviceAccountName": STRING,
    "nodeSelector": {
        "cloud.google.com/gke-tpu-accelerator": STRING,
        "cloud.google.com/gke-tpu-topology": STRING,
        "cloud.google.com/gke-spot": STRING,
    },
    "containers": (REQUIRED, [CONTAINER]),
    "volumes": [{"name": (REQUIRED, STRING), "emptyDir": {"medium": ("Memory",)}}],
}
EXIT_CODES = {"containerName": STRING, "operator": (REQUIRED, ("In", "NotIn")), "values": (REQUIRED, [INTEGER])}
JOB = {
    "parallelism": INTEGER,
    "completions": INTEGER,
    "completionMode": ("Indexed", "NonIndexed"),
    "backoffLimit": INTEGER,
    "podFailurePolicy": {
        "rules": (
            REQUIRED,
            [
                {
                    "action": (REQUIRED, ("FailJob", "FailIndex", "Ignore", "Count")),
                    "onExitCodes": EXIT_CODES,
                    "onPodConditions": [{"type": (REQUIRED, STRING), "status": STRING}],
                }
            ],
        )
    },
    "template": (REQUIRED, {"spec": POD}),
}
JOB_SET = {  # what we use of JobSet v1alpha2 and of the Jobs within; keys, kinds and choices as of their definition
    "apiVersion": (REQUIRED, ("jobset.x-k8s.io/v1alpha2",)),
    "kind": (REQUIRED, ("JobSet",)),
    "metadata": (REQUIRED, {"name": (REQUIRED, STRING), "namespace": STRING, "annotations": dict}),
    "spec": (
        REQUIRED,
        {
            "failurePolicy": {
                "maxRestarts": INTEGER,
                "rules": [
                    {
                        "name": (REQUIRED, STRING),
                        "action": (
                            REQUIRED,
                            ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                        ),
                        "onJobFailureReasons": [
                            ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded")
                            + ("PodFailurePolicy",)
                        ],
                        "targetReplicatedJobs": [STRING],
                    }
                ],
            },
            "replicatedJobs": [
                {"name": (REQUIRED, STRING), "replicas": INTEGER, "template": (REQUIRED, {"spec": (REQUIRED, JOB)})}
            ],
        },
    ),
}


def faults(value, schema, where: str = "manifest") -> list[str]:
    """Says where `value` departs from `schema`, strictly: a key that is not in it is a fault."""
    if isinstance(schema, tuple):
        if schema[0] is REQUIRED:
            return faults(value, schema[1], where)
        return [] if value in schema else [f"{where} is {value!r}, none of {schema}"]
    if isinstance(schema, type):
        right = isinstance(value, schema) and not (schema is int and isinstance(value, bool))
        return [] if right else [f"{where} is {value!r}, no {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{where} is {value!r}, no list of something"]
        return [fault for i, one in enumerate(value) for fault in faults(one, schema[0], f"{where}[{i}]")]
    if not isinstance(value, dict):
        return [f"{where} is {value!r}, no object"]
    found = [f"{where} has no key {key}" for key in value.keys() - schema.keys()]
    needed = {key for key, one in schema.items() if isinstance(one, tuple) and one[0] is REQUIRED}
    found += [f"{where} lacks {key}" for key in needed - value.keys()]
    return found + [
        f for key in value.keys() & schema.keys() for f in faults(value[key], schema[key], f"{where}.{key}")
    ]


TRAINING = launch.Training("configs/digits.py", "gs://bucket/my_Run", ["data.name=$(HOME) $HOME 'x, \"y\"'"])


def manifest(**options):
    return yaml.safe_load(launch.gke(TRAINING, **{"topology": "v5e:4x4", "image": "image:1", **options}))


def kubernetes_expands(word: str, variables: dict[str, str]) -> str:
    """Puts in values as Kubernetes does in a command: $(NAME) where it knows it, and $$ for one $."""
    known = lambda m: "$" if m[0] == "$$" else str(variables.get(m[1], m[0]))
    return re.sub(r"\$\$|\$\((\w+)\)", known, word)


@pytest.mark.parametrize(
    ("options", "hosts", "chips", "selector"),
    [
        ({}, 4, 4, ("tpu-v5-lite-podslice", "4x4")),
        ({"topology": "v5e:2x4", "spot": True}, 1, 8, ("tpu-v5-lite-podslice", "2x4")),
        ({"topology": "v4:2x2x2", "slices": 2, "namespace": "ml"}, 2, 4, ("tpu-v4-podslice", "2x2x2")),
        ({"topology": "v5p:4x4x4", "service_account": "writer"}, 16, 4, ("tpu-v5p-slice", "4x4x4")),
        ({"topology": "v6e:16x16"}, 64, 4, ("tpu-v6e-slice", "16x16")),
        ({"topology": "v6e:1x1"}, 1, 1, ("tpu-v6e-slice", "1x1")),
    ],
    ids=str,
)
def test_gke_manifest(options, hosts, chips, selector):
    made = manifest(**options)
    assert faults(made, JOB_SET) == []
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", made["metadata"]["name"])
    replicated = made["spec"]["replicatedJobs"][0]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] == options.get("slices", 1)
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    assert container["resources"]["requests"] == container["resources"]["limits"] == {"google.com/tpu": chips}
    chosen = pod["nodeSelector"]
    assert (
        chosen["cloud.google.com/gke-tpu-accelerator"],
        chosen["cloud.google.com/gke-tpu-topology"],
    ) == selector
    assert ("cloud.google.com/gke-spot" in chosen) == options.get("spot", False)


def test_gke_runs_the_command_word_by_word():
    made = manifest()
    container = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert [kubernetes_expands(word, {"HOME": "/root"}) for word in container["command"]] == TRAINING.words()


def test_gke_starts_again_after_a_save_without_counting_it():
    spec = manifest(max_restarts=5, save_seconds=99)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    saved, evicted = job["podFailurePolicy"]["rules"]
    assert saved["onExitCodes"]["values"] == [75]
    assert saved["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] == 99
    assert spec["failurePolicy"]["maxRestarts"] == 5
    rule = spec["failurePolicy"]["rules"][0]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda job: job.update(completion=4), "has no key completion"),
        (lambda job: job.pop("template"), "lacks template"),
        (lambda job: job.update(completions="4"), "completions is '4', no int"),
        (lambda job: job["template"]["spec"].update(restartPolicy="OnFailure"), "restartPolicy is 'OnFailure'"),
        (lambda job: job["template"]["spec"].update(containers=[]), "no list of something"),
    ],
)
def test_the_check_of_manifests_finds_faults(change, fault):
    made = manifest()
    change(made["spec"]["replicatedJobs"][0]["template"]["spec"])
    found = faults(made, JOB_SET)
    assert len(found) == 1 and fault in found[0]


# Cloud TPU


GCLOUD = """#!{python}
import json, os, subprocess, sys
with open({log!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
for word in sys.argv:
    if word.startswith("--command="):
        subprocess.run(["bash", "-c", word.removeprefix("--command=")], check=True)  # as ssh does
"""
RECORD = """#!{python}
import json, sys
with open({log!r}, "a") as file:
    file.write(json.dumps(["python3", *sys.argv[1:]]) + "\\n")
"""


def run_with_fake_gcloud(script: str, folder: Path) -> list[list[str]]:
    """Returns the arguments of each program that bash starts when it reads `script`."""
    log = folder / "calls"
    for name, text in (("gcloud", GCLOUD), ("python3", RECORD)):
        (folder / name).write_text(text.format(python=sys.executable, log=str(log)))
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": "/nowhere"}
    done = subprocess.run(["bash", "-eu"], input=script, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in log.read_text().splitlines()]


HARD_VALUES = ["a b", "it's", 'say "x"', "$HOME", "`id`", "$(id)", "2,3", "a\\b", "", "!", "*", "# no", "; exit 3", "é"]


@pytest.mark.parametrize("spot", [False, True], ids=["on demand", "spot"])
def test_tpu_vm_commands_survive_two_shells(tmp_path, spot):
    overrides = [f"data.name={value}" for value in HARD_VALUES]
    training = launch.Training("configs/my file.py:it's", "gs://bucket/a $run", overrides, ["python3", "-m", "aaconv"])
    script = launch.tpu_vm(training, name="train-1", zone="us-west4-a", topology="v5e:4x4", spot=spot)
    calls = run_with_fake_gcloud(script, tmp_path)
    there = [call for call in calls if call[0] == "python3"]
    assert there[0] == ["python3", "-m", "pip", "install", "--quiet", "--upgrade", "uv"]
    assert there[1][:4] == ["python3", "-m", "uv", "venv"] and "--python=>=3.11,<3.13" in there[1]
    assert there[2][:5] == ["python3", "-m", "uv", "pip", "install"] and there[2][-2:] == [
        "aaconv[train,gcs]",
        "jax[tpu]",
    ]
    words = ["--config", "my file.py:it's", "--workdir", "gs://bucket/a $run"]
    assert there[3] == ["python3", "-m", "aaconv", "train", *words, *(f"--config.{o}" for o in overrides)]
    clouds = [call for call in calls if call[0] != "python3"]
    for call in clouds:
        assert "--zone=us-west4-a" in call and "train-1" in [word.rstrip(":") for word in call]
    verbs = [" ".join(call[2:4]) for call in clouds]
    begin, end = ("queued-resources create", "queued-resources delete") if spot else ("tpu-vm create", "tpu-vm delete")
    wait = ["queued-resources describe"] if spot else []
    assert verbs == [begin, *wait, "tpu-vm ssh", "tpu-vm scp", "tpu-vm ssh", end]
    assert ("--spot" in clouds[0]) == spot
    assert "--accelerator-type=v5litepod-16" in clouds[0]
    assert f"--{'runtime-version' if spot else 'version'}=v2-alpha-tpuv5-lite" in clouds[0]
    assert all("--worker=all" in call for call in clouds if call[3] in ("ssh", "scp"))
    assert "configs/my file.py" in next(call for call in clouds if call[3] == "scp")


@pytest.mark.parametrize(
    ("topology", "name", "hosts"),
    [
        ("v4:2x2x1", "v4-8", 1),
        ("v4:2x2x2", "v4-16", 2),
        ("v4:4x4x4", "v4-128", 16),
        ("v5e:1x1", "v5litepod-1", 1),
        ("v5e:2x4", "v5litepod-8", 1),
        ("v5e:16x16", "v5litepod-256", 64),
        ("v5p:2x2x1", "v5p-8", 1),
        ("v5p:8x16x16", "v5p-4096", 512),
        ("v6e:4x8", "v6e-32", 8),
    ],
)
def test_names_of_slices(topology, name, hosts):
    found = slices.Slice.parse(topology)
    assert (launch.accelerator_type(found), found.hosts) == (name, hosts)


@pytest.mark.parametrize("name", ["Train", "1st", "a_b", "a-", "a" * 41, "a b"])
def test_names_that_the_cloud_refuses(name):
    with pytest.raises(ValueError, match="--name .* must begin with one of a-z"):
        launch.tpu_vm(TRAINING, name=name, zone="z", topology="v5e:4x4")


# The command


def answer(capsys, line: str) -> tuple[int, str, str]:
    code = cli.main(shlex.split(line))
    read = capsys.readouterr()
    return code, read.out, read.err


DIGITS = f"--config {REPOSITORY}/configs/digits.py --workdir gs://bucket/run --config.seed=3"


def test_the_command_prints_a_script_and_nothing_else(capsys):
    code, out, err = answer(capsys, f"launch slurm --nodes 3 {DIGITS} --executable \"'/opt/my venv/aaconv'\"")
    assert (code, err) == (cli.OK, "")
    assert out.startswith("#!/bin/bash\n") and "#SBATCH --nodes=3\n" in out
    assert f"'/opt/my venv/aaconv' train {DIGITS}\n" in out


def test_the_commands_for_cloud_tpu_train_by_what_they_installed(capsys):
    code, out, _ = answer(capsys, f"launch tpu-vm --name a --zone z --topology v5e:4x4 {DIGITS}")
    assert (
        code == cli.OK and " --python=venv/bin/python " in out and "'venv/bin/aaconv train --config digits.py " in out
    )


@pytest.mark.parametrize("image", ["aaconv", "Host.example:5000/a/b_c:v1.2", "a.b/c@sha256:" + "0" * 64])
def test_images(image):
    assert manifest(image=image)["kind"] == "JobSet"


def test_the_command_warns_of_a_disk_that_goes_with_its_machine(capsys):
    line = f"launch tpu-vm --name a --zone z --topology v5e:4x4 {DIGITS}".replace("gs://bucket", "runs")
    code, out, err = answer(capsys, line)
    assert code == cli.OK and out.count("gcloud ") == 5
    assert "warning: --workdir runs/run must be a disk that outlives the machines and that all 4 hosts share" in err


def test_the_command_takes_a_config_that_is_only_in_the_image(capsys):
    line = "launch gke --topology v5e:1x1 --image i --config /image/x.py --workdir gs://bucket/run"
    code, out, err = answer(capsys, line)
    assert code == cli.OK and faults(yaml.safe_load(out), JOB_SET) == []
    assert "/image/x.py is not on this machine, so it was not checked" in err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("launch", "nowhere to launch: give one of slurm, gke, tpu-vm"),
        ("launch slrm", "`aaconv launch` does not know 'slrm'; did you mean 'slurm'?"),
        (f"launch slurm --nodes 0 {DIGITS}", "0 must be a whole number of at least 1"),
        (f"launch slurm {DIGITS} --config.sed=1", "unknown config key 'sed' in the command line; did you mean 'seed'"),
        ("launch slurm --config nowhere.py --workdir x", "config file 'nowhere.py' does not exist"),
        ("launch slurm --workdir x", "--config is missing"),
        (f'launch slurm {DIGITS} --executable "a \'b"', "is no command for a shell: No closing quotation"),
        (f"launch slurm {DIGITS} --executable ''", "--executable is empty"),
        (f"launch tpu-vm --name a --zone b --topology v5e:2x2 {DIGITS} --install ' '", "--install is empty"),
        (f"launch slurm {DIGITS} --setup 'module load cuda \\'", "end no line with a backslash"),
        (f"launch slurm {DIGITS} --setup 'cat <<EOF'", "here-document at line 1"),
        (f"launch slurm {DIGITS} --setup 'if true; then'", "--setup cannot be read by bash ("),
        (f'launch slurm {DIGITS} --setup "echo it\'s"', "--setup cannot be read by bash (line 1: unexpected EOF"),
        (f"launch slurm --nodes 3 --gpus-per-node 8 {DIGITS}", "batch_size=64 must be a multiple of the 24 devices"),
        (f"launch gke --image 'My image' --topology v5e:4x4 {DIGITS}", "--image 'My image' is no name of an image"),
        (
            f"launch gke --image i --topology v5e:4x4 --slices 8 {DIGITS}",
            "batch_size=64 must be a multiple of the 128 devices that examples are divided over: use 128",
        ),
        (
            f"launch gke --image i --topology v5e:2x2 --slices 2 {DIGITS} --config.mesh.fsdp=8",
            "mesh.data=1 must be a multiple of the 2 slices",
        ),
        (
            f"launch tpu-vm --name a --zone z --topology v5e:4x4 {DIGITS} --config.mesh.data=8",
            "leave out some of the 16 tpu devices, which are one slice: set mesh.data=-1",
        ),
        (
            f"launch tpu-vm --name a --zone z --topology v5e:4x4 {DIGITS} --config.mesh.spatial=16",
            "mesh.spatial=16 must divide the 8 rows of the images: use 8",
        ),
        (f"launch gke --image i {DIGITS}", "--topology is missing, e.g. --topology v5e:4x4"),
        (f"launch gke --topology v5e:4x4 {DIGITS}", "--image is missing"),
        (f"launch tpu-vm --name a --topology v5e:4x4 {DIGITS}", "--zone is missing, e.g. --zone us-west4-a"),
        (
            f"launch tpu-vm --name a --zone z --topology v5e:3x3 {DIGITS}",
            "there is no slice '3x3'; layouts of v5e: 1x1, 2x2",
        ),
    ],
)
def test_wrong_lines_are_answered_in_one(capsys, line, says):
    code, out, err = answer(capsys, line)
    assert (code, out) == (cli.WRONG_INPUT, "")
    assert err.startswith("aaconv: error: ") and says in err and err.count("\n") == 1
