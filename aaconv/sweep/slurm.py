"""The trials of a sweep as jobs of Slurm: an array of them, a job a trial, submitted through submitit.

submitit writes the batch script, hands each job what it is to call, and submits. Watching is done here, for two
reasons. submitit asks ``sacct``, which needs a data base of accounting, where ``squeue`` asks the controller itself;
and how a trial went stands in its own folder in any case. Its requeueing, from within a handler of SIGUSR2 in the
middle of a step, is not used either: SIGTERM has training save and leave with 75, as everywhere, and the script queues
the job again.

The launcher keeps nothing that a killed one would take along. The name of an array is the name of a file, written
before it is submitted, that says which trial each of its jobs has. Whoever comes later finds in the queue what still
runs, and in the attempts of a trial, which name their jobs, what came of the others. Of several launchers on a workdir
one submits, whoever has the lock in its folder here.

References:
  https://slurm.schedmd.com/job_array.html; submitit, https://github.com/facebookincubator/submitit (tried: 1.5.4).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import math
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
LOOK_SECONDS = 1.0  # between looks at the files of trials
QUEUE_SECONDS = 10.0  # at most, between looks at the queue: a tenth of the time since the launcher began
REFUSED_SECONDS = 60.0  # before Slurm is asked again to take jobs
LARGEST_ARRAY = 1000  # jobs; one below Slurm's default for MaxArraySize
LOG_LINES = 8
YIELDED = "is finished, or somebody else runs it"  # the last words of a job that had nothing to do


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
      array_parallelism: trials that run at a time, at most, of all arrays together; 0 for no limit.
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


OWN = ("array error job-name ntasks ntasks-per-node open-mode output requeue signal wrap").split()
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


def queue(workdir: Path) -> list[Job] | None:
    """Returns the jobs of a sweep that have not ended, or None where Slurm does not answer."""
    listed = _ask("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F|%K|%T|%r|%j")
    if listed is None:
        return None
    found: list[Job] = []
    arrays: dict[str, list[str]] = {}
    for line in listed.splitlines():
        job, index, state, reason, name = line.split("|", 4)
        if "/" in name:
            continue
        if name not in arrays:
            arrays[name] = records.read_json(workdir / FOLDER / f"{name}.json").get("trials", [])
        position = int(index) if index.isdecimal() else 0
        if position < len(arrays[name]):
            number = f"{job}_{index}" if index.isdecimal() else job
            found.append(Job(number, arrays[name][position], state, reason))
    return found


# The launcher


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
        self._seen: dict[str, str] = {}  # the trial of each job that was in the queue when it was last looked at
        self._accepted, self._again = False, 0.0  # whether Slurm took a job; when to ask again after it did not
        self._told: set[str] = set()

    def run(self, part: Sweep, *, retries: int, since: float, signals: train.Signals) -> None:
        """Submits what is missing of a sweep and is not in the queue, until all is finished or has failed.

        Of several launchers one submits; the others wait, and one of them goes on when that one has ended.

        Args:
          part: trials, and where they pause.
          retries: times a trial is tried again after it failed, its job was cancelled or died.
          since: when the launcher started, in seconds of `time.time`; earlier failures do not count.
          signals: a caught one ends the launcher, not the jobs.

        Raises:
          ValueError: Slurm refuses the first jobs; the message has its words.
          Preempted: a signal came.
        """
        began, looked, submits = time.monotonic(), -math.inf, False
        finished = all(running.is_finished(part, trial) for trial in part.trials)
        jobs = [] if finished else queue(part.workdir) or []
        with contextlib.ExitStack() as stack:
            while signals.caught is None:
                if not running.unsettled(part, retries, since) and not self._waiting(part, jobs):
                    return
                now = time.monotonic()
                if now - looked >= min(QUEUE_SECONDS, max(LOOK_SECONDS, (now - began) / 10)):
                    looked = now
                    submits = submits or self._takes_over(part, stack)
                    found = queue(part.workdir)
                    if found is None:
                        self._say_once(f"Slurm does not answer ({_ask.error}); the jobs go on, and it is asked again")
                    else:
                        jobs = found
                        if submits:
                            jobs = self._without_lost(part, jobs)
                            self._look(part, jobs)
                            jobs += self._submit_missing(part, jobs, running.unsettled(part, retries, since))
                time.sleep(LOOK_SECONDS)
        numbers = sorted({job.number.partition("_")[0] for job in self._waiting(part, jobs)})
        raise train.Preempted(
            "the jobs of Slurm go on without this launcher: the same command watches them again"
            + (f", `scancel {' '.join(numbers)}` ends them" if numbers else "")
        )

    def _waiting(self, part: Sweep, jobs: Sequence[Job]) -> list[Job]:
        """Returns the jobs whose trials are not finished: also one that failed may be run again, by Slurm itself."""
        waiting = {trial.name for trial in part.trials if not running.is_finished(part, trial)} if jobs else set()
        return [job for job in jobs if job.trial in waiting]

    def _takes_over(self, part: Sweep, stack: contextlib.ExitStack) -> bool:
        """Whether this launcher is the one that submits, from now on until `stack` ends."""
        (part.workdir / FOLDER).mkdir(exist_ok=True)
        with contextlib.ExitStack() as attempt:
            if attempt.enter_context(records.lock(part.workdir / FOLDER / ".lock")):
                stack.enter_context(attempt.pop_all())
                return True
        self._say_once("another launcher submits the jobs of this sweep: this one watches, and goes on when that ends")
        return False

    def _without_lost(self, part: Sweep, jobs: Sequence[Job]) -> list[Job]:
        """Cancels jobs that a launcher submitted which was killed before it had written down what they are to do."""
        written = lambda job: (part.workdir / FOLDER / f"{job.number}_submitted.pkl").exists()
        lost = {job.number for job in jobs if job.number not in self._seen and not written(job)}
        if lost:
            self._say_once(f"cancelling {', '.join(sorted(lost))}: the launcher that submitted them was killed over it")
            _ask("scancel", *lost)
        return [job for job in jobs if job.number not in lost]

    def _look(self, part: Sweep, jobs: Sequence[Job]) -> None:
        """Takes note of what is in the queue, and records how those ended that left it with their trials unfinished."""
        there = {job.number: job.trial for job in jobs}
        trials = {trial.name: trial for trial in part.trials}
        for number, name in self._seen.items():
            if number not in there and name in trials:
                self._bury(part, trials[name], number)
        self._seen = there
        for trial in part.trials:
            attempts = records.read_json(part.folder(trial) / TRIAL).get("attempts", [])
            if attempts and "outcome" not in attempts[-1] and trial.name not in there.values():
                with records.claim(part.folder(trial)) as mine:
                    if mine:
                        running.close_open_attempt(part, trial)
        for job in jobs:
            if job.state == "PENDING" and _never_starts(job.reason):
                self._say_once(f"job {job.number} ({job.trial}) cannot start: {job.reason}; see `scontrol show job`")

    def _bury(self, part: Sweep, trial: Trial, number: str) -> None:
        """Records at a trial how its job ended, unless the job has done so itself."""
        folder, log = part.folder(trial), _log(part.workdir, number)
        with records.claim(folder) as mine:
            if not mine:  # it runs, in another place
                return
            last = (records.read_json(folder / TRIAL).get("attempts") or [{}])[-1]
            reason = (
                f"its job {number} of Slurm ended without a word: killed, cancelled, out of memory, or of time before "
                "it could save (--save-seconds)"
            )
            record = running.close_open_attempt(part, trial, reason if last.get("job") == number else "")
            attempts = record.setdefault("attempts", [])
            if running.is_finished(part, trial) or YIELDED in records.last_lines(log, LOG_LINES):
                return
            if all(attempt.get("job") != number for attempt in attempts):
                lines = records.last_lines(log, LOG_LINES)
                attempt = {"started": time.time(), "process": "", "job": number, "seconds": 0.0, "outcome": KILLED}
                attempts.append(
                    attempt | {"error": f"{lines}\nits job {number} of Slurm ended before training began".strip()}
                )
                record |= {"name": trial.name, "overrides": trial.overrides}
            elif attempts[-1].get("job") == number and attempts[-1]["outcome"] == STOPPED:
                attempts[-1] |= {
                    "outcome": KILLED,
                    "error": f"its job {number} of Slurm was cancelled; what it had was saved",
                }
            else:
                return
            records.write_json(folder / TRIAL, record)

    def _submit_missing(self, part: Sweep, jobs: Sequence[Job], unsettled: Sequence[Trial]) -> list[Job]:
        queued = {job.trial for job in jobs}
        missing = [t for t in unsettled if t.name not in queued and not records.is_claimed(part.folder(t))]
        submitted: list[Job] = []
        for begin in range(0, len(missing), LARGEST_ARRAY):
            room = self._room([*jobs, *submitted])
            if not room or time.monotonic() < self._again:
                break
            try:
                submitted += self._submit(part, missing[begin : begin + LARGEST_ARRAY], room)
            except ValueError as error:
                # At first somebody is there to mend it. Later it may be a limit, or a controller that is busy.
                if not self._accepted and not jobs:
                    raise
                self._again = time.monotonic() + REFUSED_SECONDS
                self._say_once(f"{error}; it is asked again every {REFUSED_SECONDS:g} s")
        return submitted

    def _room(self, jobs: Sequence[Job]) -> int:
        """Returns how many trials may run at a time beside those of the arrays there are."""
        limit = self._resources.array_parallelism
        if not limit:
            return LARGEST_ARRAY
        sizes = collections.Counter(job.number.partition("_")[0] for job in jobs)
        return max(0, limit - sum(min(limit, size) for size in sizes.values()))

    def _submit(self, part: Sweep, trials: Sequence[Trial], at_a_time: int) -> list[Job]:
        folder = part.workdir / FOLDER
        name = f"{part.workdir.name}.{secrets.token_hex(4)}"
        names = [trial.name for trial in trials]
        records.write_json(folder / f"{name}.json", {"trials": names})
        resources = dataclasses.replace(self._resources, array_parallelism=at_a_time)
        numbers = submit(part, names, folder, name, resources)
        self._accepted = True
        jobs = [Job(number, name, "PENDING", "") for number, name in zip(numbers, names, strict=True)]
        self._seen |= {job.number: job.trial for job in jobs}
        array = numbers[0].partition("_")[0]
        what = f"{len(trials)} trials as the array" if len(trials) > 1 else f"{names[0]} as the job"
        self._note(f"submitted {what} {array} of Slurm, logs in {folder}")
        return jobs

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
        array_parallelism=resources.array_parallelism,
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
    except (FailedJobError, FailedSubmissionError, OSError) as error:
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
        mine, stalled = True, False
        if first:
            mine = stack.enter_context(records.claim(sweep.folder(trial))) and not running.is_finished(sweep, trial)
            stalled = mine and running.fail_if_stalled(sweep, trial, number)
        mine, stalled = hosts.exchange([mine, stalled])[0]
        if stalled:
            print(f"trial {name} saved no step since its job was queued again: see {sweep.folder(trial) / TRIAL}")
            return 1
        if not mine:
            print(f"trial {name} {YIELDED}")
            return 0
        try:
            if first:
                return 1 if running.run_trial(sweep, trial, capture=True, job=number) == records.FAILED else 0
            train.train(sweep.config(trial), sweep.folder(trial), progress=metrics.Progress(), pause_step=until)
        except train.Preempted as error:
            print(error)
            return launch.SAVED
    return 0
