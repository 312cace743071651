"""The trials of a sweep as jobs of Slurm: an array of them, a job a trial, submitted through submitit.

submitit writes the batch script, hands each job what it is to call, and submits. Watching is done here, for two
reasons. submitit asks ``sacct``, which needs a data base of accounting, where ``squeue`` asks the controller itself;
and how a trial went stands in its own folder in any case. Its requeueing, from within a handler of SIGUSR2 in the
middle of a step, is not used either: SIGTERM has training save and leave with 75, as everywhere, and the script queues
the job again.

The launcher keeps nothing that a killed one would take along. The name of an array is the name of a file, written
before it is submitted, that says which trial each of its jobs has. Whoever comes later finds in the queue what still
runs.

References:
  https://slurm.schedmd.com/job_array.html; submitit, https://github.com/facebookincubator/submitit (tried: 1.5.4).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from aaconv import hosts, launch, metrics, train
from aaconv.errors import close_matches
from aaconv.sweep import records, running
from aaconv.sweep.description import Trial
from aaconv.sweep.records import KILLED, STOPPED, TRIAL, Sweep

FOLDER = "slurm"  # in the sweep's workdir: scripts, logs, and which job has which trial
LOOK_SECONDS, QUEUE_SECONDS = 1.0, 10.0  # between looks at files, which cost the cluster nothing, and at the queue
LARGEST_ARRAY = 1000  # jobs; one below Slurm's default for MaxArraySize
LOG_LINES = 8


@dataclasses.dataclass(frozen=True)
class Resources:
    """What each trial asks Slurm for; "" and 0 leave Slurm's own default.

    Attributes:
      partition, account, qos: as of ``sbatch``.
      time: limit of one part of a trial, in Slurm's form, e.g. ``4:00:00``.
      nodes: hosts of a trial; 0 for as many as its mesh needs, see `nodes_for`.
      tasks_per_node: processes of a trial on each; one has all the GPUs of its node.
      cpus_per_task: cores of each process; Slurm's default is often one.
      gpus_per_node: 0 for none.
      mem: of each node, in Slurm's form, e.g. ``32G``.
      array_parallelism: trials that run at a time, at most; 0 for no limit.
      save_seconds: how long before the time limit a trial is told to save and leave.
      setup: lines of bash that come before training, e.g. ``module load cuda``.
      others: further options of ``sbatch``, by name without dashes.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = ""
    nodes: int = 0
    tasks_per_node: int = 1
    cpus_per_task: int = 0
    gpus_per_node: int = 0
    mem: str = ""
    array_parallelism: int = 0
    save_seconds: int = 300
    setup: Sequence[str] = ()
    others: Mapping[str, str] = dataclasses.field(default_factory=dict)


def nodes_for(sweep: Sweep, gpus_per_node: int) -> int:
    """Returns how many hosts hold the devices of the config's mesh; 1 where it takes what there is.

    Raises:
      ValueError: trials need different numbers.
    """
    needed: dict[int, str] = {}
    for trial in sweep.trials:
        mesh = sweep.config(trial).mesh
        devices = mesh.data * mesh.fsdp * mesh.spatial if mesh.data > 0 and gpus_per_node else 1
        needed.setdefault(-(-devices // max(gpus_per_node, 1)), trial.name)
    if len(needed) > 1:
        said = ", ".join(f"{nodes} for {name}" for nodes, name in needed.items())
        raise ValueError(f"the meshes of trials need different numbers of nodes ({said}): give --nodes, or two sweeps")
    return next(iter(needed), 1)


OWN = ("array", "error", "job-name", "open-mode", "output", "requeue", "signal", "wrap")
"""Options of ``sbatch`` on which the launcher rests."""


def check(resources: Resources) -> None:
    """Checks that Slurm is here and would take such jobs, as far as can be said before any is submitted.

    Raises:
      ValueError: it is not, or an option cannot be; the message says what to do.
      ImportError: submitit is not installed.
    """
    # It would set up logging for the whole process, which closes what others have set up.
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    import submitit  # noqa: F401

    launch.check_time(resources.time, resources.save_seconds)
    launch.check_setup(resources.setup)
    for name in ("partition", "account", "qos", "mem"):
        launch.check_line(f"--{name}", getattr(resources, name))
    for key, value in resources.others.items():
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
            raise ValueError(f"--sbatch {key}={value}: {key!r} is no long option of sbatch, such as constraint")
        launch.check_line(f"--sbatch {key}", value)
        if key in OWN:
            raise ValueError(f"--sbatch {key}={value}: the sweep sets {key} itself; leave it out")
        if key.replace("-", "_") in {field.name for field in dataclasses.fields(Resources)}:
            raise ValueError(f"--sbatch {key}={value}: write --{key} {value}")
    for program in ("sbatch", "srun", "squeue", "sinfo"):
        if shutil.which(program) is None:
            raise ValueError(
                f"--slurm: there is no {program} on the PATH of {platform.node()}: run this where jobs are submitted, "
                "such as a login node, or leave out --slurm"
            )
    # Slurm hangs on a controller that does not answer for as long as its MessageTimeout, ten seconds by default.
    there = _ask("sinfo", "--noheader", "--format=%R")
    if there is None:
        raise ValueError(
            f"--slurm: Slurm's controller does not answer ({_ask.error}): try `sinfo`, and again when it does"
        )
    known = sorted(set(there.split()))
    for partition in filter(None, resources.partition.split(",")):
        if partition not in known:
            near = close_matches(partition, known) or f": there are {', '.join(known)}"
            raise ValueError(f"--partition {partition!r} is no partition of this cluster{near}")


class _Ask:
    """Runs a command of Slurm; remembers why the last one failed."""

    error = ""

    def __call__(self, *command: str) -> str | None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            self.error = f"{command[0]}: no answer within 60 s"
            return None
        if done.returncode:
            self.error = (done.stderr.strip().splitlines() or [f"{command[0]}: exit code {done.returncode}"])[-1]
            return None
        return done.stdout


_ask = _Ask()


# In the queue


@dataclasses.dataclass(frozen=True)
class Job:
    """A job that Slurm has, queued, running or about to end.

    Attributes:
      number: as people write it, ``ARRAY_INDEX``, or ``JOB`` of one by itself.
      trial: name of its trial.
      state: Slurm's word, such as ``PENDING``.
      reason: why it does not run, Slurm's word.
    """

    number: str
    trial: str
    state: str
    reason: str


def queue(workdir: Path) -> dict[str, Job] | None:
    """Returns the jobs of a sweep that have not ended, by their trial, or None where Slurm does not answer."""
    listed = _ask("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F|%K|%T|%r|%j")
    if listed is None:
        return None
    found: dict[str, Job] = {}
    for line in listed.splitlines():
        job, index, state, reason, name = line.split("|", 4)
        if "/" in name:
            continue
        trials = records.read_json(workdir / FOLDER / f"{name}.json").get("trials", [])
        position = int(index) if index.isdecimal() else 0
        if position < len(trials):
            number = f"{job}_{index}" if index.isdecimal() else job
            found[trials[position]] = Job(number, trials[position], state, reason)
    return found


# The launcher


@dataclasses.dataclass
class _Given:
    """What the launcher knows of a trial that it has seen in the queue."""

    number: str
    attempts: int  # that had been made before


class Cluster:
    """Slurm, as a place where a part of a sweep runs.

    Args:
      sweep: all of it.
      resources: of each trial, after `check`.
      note: gets a line about each array, and about jobs that cannot start.

    Raises:
      ValueError: trials need different numbers of nodes.
    """

    def __init__(self, sweep: Sweep, resources: Resources, note: Callable[[str], None] = lambda text: None) -> None:
        nodes = resources.nodes or nodes_for(sweep, resources.gpus_per_node)
        self._resources, self._note = dataclasses.replace(resources, nodes=nodes), note
        self._given: dict[str, _Given] = {}
        self._told: set[str] = set()

    def run(self, part: Sweep, *, retries: int, since: float, signals: train.Signals) -> None:
        """Submits what is missing of a sweep and is not in the queue, until all is finished or has failed.

        Args:
          part: trials, and where they pause.
          retries: times a trial is tried again after it failed, its job was cancelled or died.
          since: when the launcher started, in seconds of `time.time`; earlier failures do not count.
          signals: a caught one ends the launcher, not the jobs.

        Raises:
          ValueError: Slurm refuses a job; the message has its words.
          Preempted: a signal came.
        """
        looked = -QUEUE_SECONDS
        jobs: dict[str, Job] = {}
        while signals.caught is None:
            if not running.unsettled(part, retries, since):
                return
            if time.monotonic() - looked >= QUEUE_SECONDS:
                looked = time.monotonic()
                found = queue(part.workdir)
                if found is None:
                    self._say_once(f"Slurm does not answer ({_ask.error}); the jobs go on, and it is asked again")
                else:
                    jobs = found
                    self._look(part, jobs)
                    missing = [
                        trial
                        for trial in running.unsettled(part, retries, since)
                        if trial.name not in jobs and not records.is_claimed(part.folder(trial))
                    ]
                    for begin in range(0, len(missing), LARGEST_ARRAY):
                        self._submit(part, missing[begin : begin + LARGEST_ARRAY])
            time.sleep(LOOK_SECONDS)
        numbers = sorted({job.number.partition("_")[0] for job in jobs.values()} | self._arrays(part))
        raise train.Preempted(
            "the jobs of Slurm go on without this launcher: the same command watches them again"
            + (f", `scancel {' '.join(numbers)}` ends them" if numbers else "")
        )

    def _arrays(self, part: Sweep) -> set[str]:
        waiting = [trial.name for trial in part.trials if not running.is_finished(part, trial)]
        return {self._given[name].number.partition("_")[0] for name in waiting if name in self._given}

    def _look(self, part: Sweep, jobs: Mapping[str, Job]) -> None:
        """Takes note of what is in the queue, and records how those ended that left it with their trials unfinished."""
        for trial in part.trials:
            job = jobs.get(trial.name)
            attempts = records.read_json(part.folder(trial) / TRIAL).get("attempts", [])
            ended = [attempt for attempt in attempts if "outcome" in attempt]
            if job is None:
                if trial.name in self._given or len(ended) < len(attempts):
                    self._bury(part, trial)
                continue
            # Those that are new here were submitted by a launcher before this one.
            self._given.setdefault(trial.name, _Given(job.number, len(ended)))
            if job.state == "PENDING" and _never_starts(job.reason):
                self._say_once(f"job {job.number} ({trial.name}) cannot start: {job.reason}; see `scontrol show job`")

    def _bury(self, part: Sweep, trial: Trial) -> None:
        folder, given = part.folder(trial), self._given.pop(trial.name, None)
        number = given.number if given else ""
        with records.claim(folder) as mine:
            if not mine:  # it runs, in another place
                return
            reason = (
                f"its job {number} of Slurm ended without a word: killed, out of memory, or cancelled" if given else ""
            )
            record = running.close_open_attempt(part, trial, reason)
            if given is None or running.is_finished(part, trial):
                return
            attempts = record.setdefault("attempts", [])
            if len(attempts) <= given.attempts:
                log = records.last_lines(_log(part.workdir, number), LOG_LINES)
                attempt = {"started": time.time(), "process": "", "job": number, "seconds": 0.0, "outcome": KILLED}
                attempts.append(
                    attempt | {"error": f"{log}\nits job {number} of Slurm ended before training began".strip()}
                )
                record |= {"name": trial.name, "overrides": trial.overrides}
            elif attempts[-1]["outcome"] == STOPPED:
                attempts[-1] |= {
                    "outcome": KILLED,
                    "error": f"its job {number} of Slurm was cancelled; what it had was saved",
                }
            else:
                return
            records.write_json(folder / TRIAL, record)

    def _submit(self, part: Sweep, trials: Sequence[Trial]) -> None:
        folder = part.workdir / FOLDER
        folder.mkdir(exist_ok=True)
        name = f"{part.workdir.name}.{secrets.token_hex(4)}"
        names = [trial.name for trial in trials]
        records.write_json(folder / f"{name}.json", {"trials": names})
        numbers = submit(part, names, folder, name, self._resources)
        for trial, number in zip(trials, numbers, strict=True):
            before = records.read_json(part.folder(trial) / TRIAL).get("attempts", [])
            self._given[trial.name] = _Given(number, len(before))
        array = numbers[0].partition("_")[0]
        what = f"{len(trials)} trials as the array" if len(trials) > 1 else f"{names[0]} as the job"
        self._note(f"submitted {what} {array} of Slurm, logs in {folder}")

    def _say_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._note(text)


def _never_starts(reason: str) -> bool:
    # Those that time does not mend; others wait for resources, priorities and limits.
    return reason.startswith(("Bad", "PartitionTimeLimit", "PartitionNodeLimit", "Invalid", "JobHeld", "launch_failed"))


def _log(workdir: Path, number: str) -> Path:
    return workdir / FOLDER / f"{number}_0_log.out"


def submit(part: Sweep, names: Sequence[str], folder: Path, name: str, resources: Resources) -> list[str]:
    """Submits trials, several as an array.

    Returns:
      The number of each one's job.

    Raises:
      ValueError: Slurm refuses.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    text = str(folder)
    if "%" in text or "\n" in text:
        raise ValueError(
            f"workdir {text!r} has a % or a line break, which Slurm replaces in names of files: name another"
        )
    srun = ["--kill-on-bad-exit=0", f"--wait={resources.save_seconds}"]
    if resources.cpus_per_task:
        srun.append(f"--cpus-per-task={resources.cpus_per_task}")  # since Slurm 22.05 not taken over from sbatch
    others = {"signal": f"TERM@{resources.save_seconds}", "requeue": True, **resources.others}
    if resources.mem:
        others["mem"] = resources.mem
    executor = SlurmExecutor(folder)
    executor.update_parameters(
        job_name=name,
        partition=resources.partition or None,
        account=resources.account or None,
        qos=resources.qos or None,
        time=resources.time or None,  # submitit's own default is five minutes
        nodes=resources.nodes,
        ntasks_per_node=resources.tasks_per_node,
        cpus_per_task=resources.cpus_per_task or None,
        gpus_per_node=resources.gpus_per_node or None,
        array_parallelism=resources.array_parallelism or len(names),
        stderr_to_stdout=True,
        wckey=None,
        setup=[*resources.setup, launch.GO_ON],
        teardown=launch.requeue_lines(resources.save_seconds),
        srun_args=srun,
        additional_parameters=others,
    )
    until = [part.until.get(name) for name in names]
    said = io.StringIO()  # submitit prints what sbatch says, and raises it as well
    try:
        with contextlib.redirect_stderr(said):
            jobs = executor.map_array(run_in_job, [str(part.workdir)] * len(names), names, until)
    except (FailedJobError, FailedSubmissionError) as error:
        raise ValueError(f"Slurm refuses the jobs: {' '.join(str(error).split())}") from error
    return [job.job_id for job in jobs]


# In a job


def run_in_job(workdir: str, name: str, until: int | None) -> None:
    """What every process of a job does: trains its trial, unless somebody else has it or it is finished.

    Ends with exit code 75 where the trial was saved on SIGTERM, 1 where it failed.

    Args:
      workdir: of the sweep.
      name: of the trial.
      until: the step at which it pauses; None: its end.
    """
    array, index = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    number = f"{array}_{index}" if array else os.environ.get("SLURM_JOB_ID", "")
    hosts.start(note=print)
    try:
        code = _run_in_job(Path(workdir), name, until, number)
    except Exception:  # The others wait for this process, and leaving may not come back.
        traceback.print_exc()
        code = 1
    hosts.leave(code, failed=code == 1)
    if code:
        sys.exit(code)


def _run_in_job(workdir: Path, name: str, until: int | None, number: str) -> int:
    import jax

    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(train.Signals())  # submitit has SIGTERM ignored
        sweep = stack.enter_context(records.joined(workdir)) if first else records.load(workdir)
        sweep = sweep.part([name], {} if until is None else {name: until})
        if not sweep.trials:
            print(f"{workdir} describes no trial {name} any more")
            return 0
        (trial,) = sweep.trials
        mine = not first or (
            stack.enter_context(records.claim(sweep.folder(trial))) and not running.is_finished(sweep, trial)
        )
        if not hosts.exchange(mine)[0]:
            print(f"trial {name} is finished, or somebody else runs it")
            return 0
        try:
            if first:
                return 1 if running.run_trial(sweep, trial, capture=True, job=number) == records.FAILED else 0
            train.train(sweep.config(trial), sweep.folder(trial), progress=metrics.Progress(), pause_step=until)
        except train.Preempted as error:
            print(error)
            return launch.SAVED
    return 0
