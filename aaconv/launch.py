"""What starts a run on many hosts: a Slurm script, a Kubernetes manifest, Cloud TPU commands. Nothing is run here.

Every host runs the same ``aaconv train --config ... --workdir ...``, and all of the ways end alike. On SIGTERM to any
process all of them save the same step and leave with exit code 75 (EX_TEMPFAIL of sysexits.h), which says: run the same
command again. What is written here does that wherever the machine lets it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from aaconv.slices import Slice

SAVED = 75


@dataclasses.dataclass(frozen=True)
class Training:
    """The command that every host runs.

    Args:
      config: config file, as every host sees it.
      workdir: folder of the run, shared by all hosts: ``gs://...`` or a network disk.
      overrides: ``KEY=VALUE`` of config keys.
      executable: the words that start aaconv.

    Example:
      >>> print(shlex.join(Training("digits.py", "gs://bucket/run", ["seed=1"]).words()))
      aaconv train --config digits.py --workdir gs://bucket/run --config.seed=1
    """

    config: str
    workdir: str
    overrides: Sequence[str] = ()
    executable: Sequence[str] = ("aaconv",)

    def words(self) -> list[str]:
        """Returns the command, one element an argument."""
        command = [*self.executable, "train", "--config", self.config, "--workdir", self.workdir]
        command += [f"--config.{override}" for override in self.overrides]
        for word in command:
            check_line("the command", word)
        return command

    def name(self) -> str:
        """Returns the last part of the workdir, or "aaconv" where it has none."""
        return self.workdir.rstrip("/").rpartition("/")[2].strip(".") or "aaconv"


# Slurm


def slurm(
    training: Training,
    *,
    nodes: int,
    gpus_per_node: int = 0,
    cpus_per_task: int = 0,
    time: str = "",
    partition: str = "",
    account: str = "",
    save_seconds: int = 300,
    setup: Sequence[str] = (),
) -> str:
    """Returns a script for ``sbatch``, which queues itself again whenever training was stopped after saving.

    One task a GPU, because `jax.distributed` gives each task of Slurm the one device of its rank on the node; one task
    a node where there are no GPUs, because a process uses all the cores it is given.

    Args:
      training: what is run.
      nodes: hosts.
      gpus_per_node: 0 for CPUs.
      cpus_per_task: cores of each task; 0 leaves Slurm's default, which is often one.
      time: limit of one part of the run, in Slurm's form, e.g. ``4:00:00``; "" for the partition's.
      partition: "" for the default one.
      account: "" for the default one.
      save_seconds: how long before the time limit all processes are told to save and leave. It has to be enough for
        one step and one checkpoint; Slurm may send it up to 60 s earlier.
      setup: lines of bash that come before training, e.g. ``module load cuda``.

    Raises:
      ValueError: an argument holds a line break, bash cannot read the setup, or the time is none, or too short to save
        within.

    References:
      https://slurm.schedmd.com/sbatch.html and srun.html; the signals were tried with Slurm 22.05.
    """
    check_time(time, save_seconds)
    options = {
        "job-name": training.name(),
        "nodes": nodes,
        "ntasks-per-node": max(gpus_per_node, 1),
        "gpus-per-node": gpus_per_node,
        "cpus-per-task": cpus_per_task,
        "time": time,
        "partition": partition,
        "account": account,
        # To the tasks, not to this script (B:): srun hands no SIGTERM on, it kills its tasks.
        "signal": f"TERM@{save_seconds}",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{key}={_quote(key, str(value))}" for key, value in options.items() if value]
    # A task that has left must not end the others, which are still saving, but a lost one must not hold them for ever.
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={save_seconds}"]
    if cpus_per_task:
        srun.append(f"--cpus-per-task={cpus_per_task}")  # since Slurm 22.05 not taken over from sbatch
    check_setup(setup)
    return "\n".join(
        [
            "#!/bin/bash",
            "# Start it with: sbatch FILE. It runs in the folder it is submitted from and logs to slurm-JOB.out there.",
            *lines,
            "#SBATCH --requeue",
            "",
            *setup,
            GO_ON,
            f"{_line(srun)} \\",
            f"    {_line(training.words())}",
            *requeue_lines(save_seconds),
            "",
        ]
    )


GO_ON = "set +e  # what srun ends with is looked at below"
"""The line before ``srun``: a setup may have said ``set -e``."""


def requeue_lines(save_seconds: int) -> list[str]:
    """Returns the end of a script for ``sbatch``, after ``srun``: the job queues itself again where it was saved.

    Args:
      save_seconds: how long before the time limit processes are told to save.
    """
    return [
        "code=$?",
        f"# {SAVED}: on SIGTERM ({save_seconds} s before the time limit, or by `scancel --signal=TERM JOB`) all",
        "# processes saved the same step; the same job goes on from there. A job that is not RUNNING any more is",
        "# left alone: Slurm itself queues again what it preempts or takes from a broken node (--requeue); what",
        "# was cancelled stays cancelled.",
        # The last job of an array to start has the array's own number, by which all of them would be meant.
        "job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        "for pause in 0 2 5 10; do  # the controller may be busy",
        f'    [ "$code" -eq {SAVED} ] && sleep "$pause" || break',
        '    state=$(squeue --noheader --jobs="$job" --format=%T) || continue',
        '    [ "$state" = RUNNING ] && ! scontrol requeue "$job" || break',
        "done",
        'exit "$code"',
    ]


# TPU slices


# https://github.com/distribution/reference, "Grammar"
_IMAGE = re.compile(
    r"([a-zA-Z0-9]([-a-zA-Z0-9.]*[a-zA-Z0-9])?(:\d+)?/)?"  # host
    r"[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*(/[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*)*"  # path
    r"(:\w[\w.-]{0,127})?(@[a-z0-9]+([+._-][a-z0-9]+)*:[0-9a-f]{32,})?",  # tag, digest
    re.ASCII,
)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A generation of TPUs: how Cloud TPU and Kubernetes Engine name it."""

    accelerator: str  # of Cloud TPU, before the number
    cores_per_chip: int  # what that number counts
    runtime: str
    gke: str
    machine: str


_PYTHON = ">=3.11,<3.13"  # what the tests run with; the hosts' Ubuntu 22.04 comes with 3.10
# https://cloud.google.com/tpu/docs/runtimes
_KINDS = {
    "v4": _Kind("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu"),
    "v5e": _Kind("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu"),
    "v5p": _Kind("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu"),
    "v6e": _Kind("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard"),
}


def accelerator_type(found: Slice) -> str:
    """Returns Cloud TPU's name of a slice; its number counts chips for v5e and v6e and TensorCores for v4 and v5p.

    Example:
      >>> accelerator_type(Slice.parse("v5p:2x2x2"))
      'v5p-16'
    """
    kind = _KINDS[found.generation]
    return f"{kind.accelerator}-{found.chips * kind.cores_per_chip}"


def gke(
    training: Training,
    *,
    topology: str,
    image: str,
    name: str = "",
    slices: int = 1,
    max_restarts: int = 3,
    save_seconds: int = 300,
    namespace: str = "",
    service_account: str = "",
    spot: bool = False,
) -> str:
    """Returns a JobSet for ``kubectl apply``, as YAML: one pod a host, one Job a slice.

    Where a pod leaves with 75 or is evicted, all start again, however often; after other failures `max_restarts` times.

    Args:
      training: what is run; the config file is looked for in the image.
      topology: one slice, e.g. ``v5e:4x4``.
      image: container image with aaconv and jax for TPUs.
      name: of the JobSet; "" for the workdir's last part.
      slices: of that topology.
      max_restarts: after failures other than an exit with 75.
      save_seconds: between SIGTERM and SIGKILL of a pod.
      namespace: "" for kubectl's.
      service_account: of Kubernetes, which may write the workdir; "" for the default one.
      spot: use spot nodes, which may be taken away at any time.

    Raises:
      ValueError: no such topology, or a name that Kubernetes or a registry of images does not take.

    References:
      https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/ and
      https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy
    """
    import yaml  # comes with flax

    found = Slice.parse(topology)
    kind = _KINDS[found.generation]
    name = _resource_name(name, training.name())
    if not _IMAGE.fullmatch(image):
        raise ValueError(
            f"--image {image!r} is no name of an image: write it as HOST/PATH:TAG, the path in small letters, e.g. "
            "us-docker.pkg.dev/project/repository/aaconv:latest"
        )
    machine = f"{kind.machine}-{found.chips_per_host}t"
    selector = {
        "cloud.google.com/gke-tpu-accelerator": kind.gke,
        "cloud.google.com/gke-tpu-topology": found.topology,
    }
    tpus = {"google.com/tpu": found.chips_per_host}
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # of single pods: a slice only works with all of its processes started together
        "terminationGracePeriodSeconds": save_seconds,
        "nodeSelector": selector | ({"cloud.google.com/gke-spot": "true"} if spot else {}),
        "containers": [
            {
                "name": "aaconv",
                "image": image,
                # Kubernetes would put in the values of variables written $(NAME).
                "command": [word.replace("$(", "$$(") for word in training.words()],
                "resources": {"requests": dict(tpus), "limits": dict(tpus)},
                "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
            }
        ],
        # Processes that read data hand over images in shared memory, of which a container has 64 MB by default.
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    if service_account:
        pod["serviceAccountName"] = service_account
    job = {
        "parallelism": found.hosts,
        "completions": found.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "aaconv", "operator": "In", "values": [SAVED]},
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": pod},
    }
    # One Job on one slice: the controller keeps two Jobs from sharing a pool of nodes.
    annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name}
        | ({"namespace": namespace} if namespace else {})
        | ({"annotations": annotations} if slices > 1 else {}),
        "spec": {
            "failurePolicy": {
                "maxRestarts": max_restarts,
                "rules": [
                    {
                        "name": "saved",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job}}],
        },
    }
    head = [
        "# Start it with: kubectl apply --filename FILE. Follow it with:",
        f"#   kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name={name},"
        "batch.kubernetes.io/job-completion-index=0",
        f"# It needs the JobSet controller, and {_count(slices, 'pool')} of {_count(found.hosts, 'node')} made with",
        f"#   --machine-type={machine} --tpu-topology={found.topology}",
        f"# Exit code {SAVED} (SIGTERM came, all processes saved the same step) and evictions fail the Job by its",
        "# podFailurePolicy, and the JobSet starts all pods again, which go on from the last checkpoint. A pod has",
        f"# {save_seconds} s for that, on a spot node less than half a minute; other failures are tried again"
        f" {max_restarts} times.",
    ]
    return "\n".join([*head, yaml.safe_dump(manifest, sort_keys=False, width=1000)])


def tpu_vm(
    training: Training,
    *,
    name: str,
    zone: str,
    topology: str,
    spot: bool = False,
    runtime: str = "",
    install: str = "aaconv[train,gcs] jax[tpu]",
) -> str:
    """Returns the ``gcloud`` commands that make a Cloud TPU slice, train on all its hosts, and give it back.

    Args:
      training: what is run; the config file is copied to each host, and found there by its name alone.
      name: of the slice.
      zone: e.g. ``us-west4-a``.
      topology: e.g. ``v5e:4x4``.
      spot: a queued resource on spot machines, which may be taken away at any time.
      runtime: version of the software on the hosts; "" for the generation's own.
      install: what is installed on each host, as for pip, separated by spaces.

    Raises:
      ValueError: no such topology, or a name that Cloud TPU does not take.

    References:
      https://cloud.google.com/sdk/gcloud/reference/compute/tpus
    """
    found = Slice.parse(topology)
    if not install.split():
        raise ValueError(
            "--install is empty: name what pip is to install on each host, e.g. --install 'aaconv[train,gcs] jax[tpu]'"
        )
    name = _resource_name(name, "")
    check_line("zone", zone)
    gcloud = ["gcloud", "compute", "tpus"]
    where = f"--zone={zone}"
    runtime = runtime or _KINDS[found.generation].runtime
    kind = f"--accelerator-type={accelerator_type(found)}"
    if spot:
        queue = [*gcloud, "queued-resources"]
        create = [*queue, "create", name, f"--node-id={name}", where, kind, f"--runtime-version={runtime}", "--spot"]
        delete = [*queue, "delete", name, where, "--force", "--quiet"]
        wait = [*queue, "describe", name, where, "--format=value(state.state)"]
    else:
        create = [*gcloud, "tpu-vm", "create", name, where, kind, f"--version={runtime}"]
        delete = [*gcloud, "tpu-vm", "delete", name, where, "--quiet"]
        wait = []

    def on_all(*commands: Sequence[str]) -> list[str]:
        # Quoted twice: ssh hands the hosts one string, which a shell there splits again.
        lines = " && ".join(map(shlex.join, commands))
        return [*gcloud, "tpu-vm", "ssh", name, where, "--worker=all", f"--command={lines}"]

    # A config may be FILE:ARGUMENT.
    file, colon, argument = training.config.partition(":")
    there = dataclasses.replace(training, config=file.rpartition("/")[2] + colon + argument)
    steps = [
        (f"{found.generation} {found.topology}: {_count(found.chips, 'chip')}, {_count(found.hosts, 'host')}", create),
        ("Go on when this prints ACTIVE", wait),
        (
            "Install on every host, in the folder venv; uv brings Python there, where the host's own is too old",
            on_all(
                ["python3", "-m", "pip", "install", "--quiet", "--upgrade", "uv"],
                ["python3", "-m", "uv", "venv", "--quiet", "--allow-existing", f"--python={_PYTHON}", "venv"],
                [
                    "python3",
                    "-m",
                    "uv",
                    "pip",
                    "install",
                    "--quiet",
                    "--python=venv/bin/python",
                    "--upgrade",
                    *install.split(),
                ],
            ),
        ),
        ("Copy the config to every host", [*gcloud, "tpu-vm", "scp", file, f"{name}:", where, "--worker=all"]),
        ("Train on every host; the log of all of them comes back here", on_all(there.words())),
        ("Give the slice back", delete),
    ]
    lines = [
        "# Hosts need the data (data.data_dir) and, for the installation, a way to the package index and to GitHub,",
        "# from which uv has its Python.",
        "",
    ]
    for title, command in steps:
        if command:
            lines += [f"# {title}", _line(command), ""]
    again = "delete the slice and start over from the first command" if spot else "start over from the training command"
    lines += [
        "# Maintenance or preemption sends SIGTERM to the hosts: all processes save the same step and leave with exit",
        f"# code {SAVED}. Whenever training ended before its end, {again}:",
        "# the run goes on from its last checkpoint.",
    ]
    return "\n".join([*lines, ""])


def check_time(time: str, save_seconds: int) -> None:
    """Checks a limit in one of Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; "" is the partition's.

    Raises:
      ValueError: it is none, or too short to save within.
    """
    if not time:
        return
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise ValueError(f"--time {time!r} must be a limit in Slurm's form, e.g. 4:00:00 or 1-12:00:00")
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    seconds = 86400 * int(days or 0) + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    if seconds <= save_seconds:
        raise ValueError(
            f"--time {time} is no longer than --save-seconds {save_seconds}, the time to save before its end: the job "
            "would be told to stop as soon as it began; give it more time"
        )


def _line(words: Sequence[str]) -> str:
    """Like `shlex.join`, with quotes only around the value of ``--flag=value``."""
    flags = [re.fullmatch(r"(--[-\w.]+=)(.+)", word, re.DOTALL) for word in words]
    return " ".join(
        flag[1] + shlex.quote(flag[2]) if flag else shlex.quote(word) for flag, word in zip(flags, words, strict=True)
    )


def _resource_name(name: str, otherwise: str) -> str:
    made = name or re.sub(r"[^a-z0-9]+", "-", otherwise.lower()).strip("-")[:40].strip("-") or "aaconv"
    # As label of DNS; JobSet adds up to 23 characters of its own for pods.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", made):
        raise ValueError(
            f"--name {made!r} must begin with one of a-z, hold only a-z, 0-9 and -, not end in -, and have at most 40 "
            "characters: name it for example train-1"
        )
    return made


def _quote(key: str, value: str) -> str:
    # sbatch reads its lines with the quotes of a shell.
    check_line(f"--{key}", value)
    return shlex.quote(value)


def check_setup(lines: Sequence[str]) -> None:
    """Raises ValueError where bash could not read these lines."""
    for line in lines:
        check_line("--setup", line)
    bash = shutil.which("bash")
    if not lines or bash is None:
        return
    script = "".join(f"{line}\n" for line in lines)
    quiet = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}  # no remarks on somebody's locale
    read = subprocess.run(
        [bash, "--norc", "-n"], input=script, capture_output=True, text=True, env=quiet
    )  # runs nothing
    # It only warns of a here-document without end, and takes a last backslash: both swallow the lines that follow.
    swallows = [line for line in lines if re.search(r"(?<!\\)(\\\\)*\\$", line)]
    if read.returncode or read.stderr or swallows:
        said = (read.stderr.strip().splitlines() or [f"{(swallows or [''])[0]!r} goes on in the next line"])[0]
        raise ValueError(
            f"--setup cannot be read by bash ({said.removeprefix(f'{bash}: ')}): close its quotes, brackets and "
            "here-documents, end no line with a backslash, and quote each line as a whole, "
            "e.g. --setup 'export NAME=\"a b\"'"
        )


def check_line(what: str, text: str) -> None:
    """Raises ValueError where a text has more than one line."""
    if "\n" in text or "\r" in text:
        raise ValueError(f"{what} holds a line break in {text!r}: write it on one line")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
