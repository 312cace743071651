"""Several processes as one run: how they find each other, agree, and notice that one is gone.

The only place that knows ``jax.distributed``. Its coordination service watches over a run: a
process that ends without leaving, or whose host falls silent for ``heartbeat_timeout`` seconds,
ends all others. It does so by aborting them, with words for its own developers; what stands here
sees to it that a person is told which step was lost and what to do.

References:
  JAX documentation, "Multi-controller JAX" and `jax.distributed.initialize`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

LOST, FAILED = 76, 2  # exit codes of a process that lost another one, or that the others lose
START_TIMEOUT, HEARTBEAT_TIMEOUT = 300.0, 100.0  # seconds; jax's own defaults
_LEAVE_SECONDS = 5  # that a failing process waits for the others to fail alike
_UNWIND_SECONDS = 60  # that a failing process may take to finish its files, some of which wait for the others
_WRITE_SECONDS = 10  # the same where a file could not be written
_REMARK_SECONDS = 3  # after which a wait is worth a line
_NAME_SECONDS = 30  # that the coordinator's name may be unknown: that of a pod is made known a moment after its start
_TPU_VM = "a Cloud TPU VM"
_T = TypeVar("_T")


class LostError(RuntimeError):
    """Another process of the run did not come, ended or fell silent; the same command goes on."""


# Starting


def start(
    coordinator: str = "",
    processes: int | None = None,
    process: int | None = None,
    *,
    start_timeout: float = START_TIMEOUT,
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Makes this process one of a run of several; call it before devices are first used.

    Without arguments jax finds the others where it knows how: on Cloud TPU, in a Slurm step, in a
    Kubernetes job of indexed pods, under Open MPI. Where the environment tells of no cluster, or
    of one process, nothing happens. Processes that have only CPUs compute together through gloo.

    Args:
      coordinator: ``HOST:PORT`` that every process reaches, on the host of process 0.
      processes: how many there are.
      process: which of them this is, from 0.
      start_timeout: seconds to wait for the others.
      heartbeat_timeout: seconds after which a silent process counts as lost and the others end.
      note: gets a line when there is something to wait for.

    Raises:
      ValueError: a number is missing, impossible or not the same everywhere, or two processes
        have the same index.
      LostError: another process did not come in time.
    """
    given = {"--coordinator": coordinator or None, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    if jax.distributed.is_initialized():
        return
    limits: dict[str, Any] = {
        "initialization_timeout": _seconds("--start-timeout", start_timeout),
        "heartbeat_timeout_seconds": _seconds("--heartbeat-timeout", heartbeat_timeout),
    }
    if len(missing) == len(given):
        _start_in_cluster(limits, start_timeout)
    elif missing:
        raise ValueError(
            f"{' and '.join(missing)} missing: several processes need all of --coordinator HOST:PORT, --processes N "
            "and --process I (from 0 to N - 1), or, where jax knows the cluster, none of them"
        )
    else:
        assert processes is not None and process is not None
        host, port = _check_numbers(coordinator, processes, process)
        if processes == 1:
            return
        _wait_for_name(host, coordinator, start_timeout, note)
        _roll_call(host, port, processes, process, start_timeout, note)
        _begin(processes, process, f"at coordinator {coordinator}", start_timeout)
        jax.distributed.initialize(coordinator, processes, process, cluster_detection_method="deactivate", **limits)
    _here.starting = ""


def _seconds(flag: str, value: float) -> int:
    if not 1 <= value < 1e6:
        raise ValueError(f"{flag}={value:g} must be at least 1 second, and below a million")
    return round(value)


def _check_numbers(coordinator: str, processes: int, process: int) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # of an IPv6 address
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(
            f"--coordinator {coordinator!r} must be HOST:PORT, the host of process 0 and a free port there from 1 to "
            "65535, e.g. 10.0.0.1:8476"
        )
    if processes < 1:
        raise ValueError(f"--processes {processes} must be at least 1")
    if not 0 <= process < processes:
        raise ValueError(
            f"--process {process} must lie between 0 and {processes - 1} for --processes {processes}: number the "
            "processes from 0, each once"
        )
    return host, int(port)


def _wait_for_name(host: str, coordinator: str, start_timeout: float, note: Callable[[str], None]) -> None:
    """Waits until the name of process 0's host is known here, which in Kubernetes takes a while.

    Raises:
      ValueError: nobody knows the name, for half a minute or `start_timeout`.
      LostError: whoever knows names does not answer, for `start_timeout`.
    """
    began, noted = time.monotonic(), False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            silent = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        timeout = start_timeout if silent else min(start_timeout, _NAME_SECONDS)
        waited = time.monotonic() - began
        if waited > timeout:
            here = socket.gethostname()
            if silent:
                raise LostError(
                    f"--coordinator {coordinator!r}: for {timeout:g} s nobody told {here} where {host!r} is "
                    f"({reason}): look at the network's name server, and run the same command again"
                )
            raise ValueError(
                f"--coordinator {coordinator!r}: {here} does not know {host!r} ({reason}), and waited {timeout:g} s; "
                "give the name or the address of process 0's host by which all hosts reach it"
            )
        if waited > _REMARK_SECONDS and not noted:
            note(f"waiting until {host!r} of --coordinator is known ({reason}), for at most {timeout:g} s ...")
            noted = True
        time.sleep(0.2)


def _start_in_cluster(limits: Mapping[str, Any], start_timeout: float) -> None:
    cluster = _cluster()
    if not cluster:
        return
    devices = _devices_of_slurm_task()
    undo = _begin(None, None, f"in {cluster}", start_timeout)
    try:
        jax.distributed.initialize(local_device_ids=devices, **limits)
    except Exception as error:  # What the cluster's own libraries raise is not jax's to name.
        if "must be called before" in str(error):  # Python that used devices first has chosen to be alone.
            undo()
            return
        reason = str(error).strip().partition("\n")[0][:200]
        if cluster == _TPU_VM and _of_metadata(error):
            raise ValueError(
                "this machine has TPU chips, but no metadata server of Google's cloud tells whether it is one host of "
                f"several ({reason}): if it is alone, set TPU_SKIP_MDS_QUERY=1; else give --coordinator, --processes "
                "and --process"
            ) from error
        raise ValueError(
            f"this is one of several processes in {cluster}, but jax cannot find the others ({reason}): give "
            "--coordinator, --processes and --process"
        ) from error
    _here.processes, _here.process = jax.process_count(), jax.process_index()
    if _here.processes == 1:
        let_sigterm_end()


def _of_metadata(error: Exception) -> bool:
    """Whether it was the metadata server that failed, and not, say, a first host that is not there yet."""
    asked = type(error).__module__.partition(".")[0] in ("requests", "urllib3")
    return asked or "metadata" in str(error).lower()


def let_sigterm_end() -> None:
    """Gives SIGTERM its meaning back, which ``jax.distributed`` takes for those who ask it at each step."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _cluster() -> str:
    """Returns the cluster that the environment tells of, "" for none or a job of one process.

    The variables are those that jax's own detection reads, in its order.
    """
    env = os.environ
    if "OMPI_COMM_WORLD_SIZE" in env:
        return "an Open MPI job" if env["OMPI_COMM_WORLD_SIZE"] != "1" else ""
    if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"} <= env.keys():
        return "a Slurm step" if env["SLURM_NTASKS"] != "1" else ""
    workers = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES"))
    if "TPU_PROCESS_ADDRESSES_PATH" in env or "," in (workers or "") or env.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return "a Cloud TPU slice"
    if workers is not None:
        return ""
    if "KUBERNETES_SERVICE_HOST" in env:
        # Without an index it is a pod by itself, where jax's detection would warn or fail.
        return "a Kubernetes job" if "JOB_COMPLETION_INDEX" in env else ""
    if env.get("JAX_PLATFORMS") == "cpu":
        return ""
    # jax sets this where the machine has no TPU chips; elsewhere it asks the machine's metadata server.
    return "" if "TPU_SKIP_MDS_QUERY" in env else _TPU_VM


def _devices_of_slurm_task() -> list[int] | None:
    # jax gives a Slurm task one GPU, which leaves the others idle where a host runs one task.
    env = os.environ
    nodes, gpus = env.get("SLURM_STEP_NUM_NODES"), env.get("SLURM_GPUS_ON_NODE", "")
    if "JAX_LOCAL_DEVICE_IDS" in env or nodes is None or nodes != env.get("SLURM_NTASKS") or not gpus.isdecimal():
        return None
    return list(range(int(gpus)))


# The roll call: jax would wait for a wrong address, count or index until its limit, and then abort


def _roll_call(host: str, port: int, processes: int, process: int, timeout: float, note: Callable[[str], None]) -> None:
    """Returns when every process has come to process 0 and they agree; on the coordinator's port, before it."""
    deadline = time.monotonic() + timeout
    me = {"run": "aaconv", "processes": processes, "process": process, "host": socket.gethostname()}
    if process == 0:
        _call(port, me, deadline, timeout, note)
    else:
        _answer(host, port, me, deadline, timeout, note)


def _call(port: int, me: dict[str, Any], deadline: float, timeout: float, note: Callable[[str], None]) -> None:
    try:
        if socket.has_dualstack_ipv6():
            server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        else:
            server = socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise ValueError(
            f"process 0 ({me['host']}) cannot listen on port {port} ({error.strerror}): another run, or a second "
            "process 0, has it; stop that one, or give all processes a --coordinator with another port"
        ) from error
    here = {0: me}
    lines: dict[int, socket.socket] = {}
    wrong = late = ""
    remark_at = time.monotonic() + _REMARK_SECONDS

    def absent() -> list[int]:
        return [i for i in range(me["processes"]) if i not in here]

    with server, contextlib.ExitStack() as stack:
        while absent() and not wrong:
            now = time.monotonic()
            if now > remark_at:
                note(f"waiting for {_listed(absent())} of {me['processes']}, for at most {timeout:g} s ...")
                remark_at = deadline + 1
            if now > deadline:
                came = ", ".join(f"{i} ({who['host']})" for i, who in sorted(here.items()))
                late = (
                    f"process 0 ({me['host']}) waited {timeout:g} s for {_listed(absent())} of {me['processes']}; "
                    f"there came {came}. Check that those were started, with the same --coordinator, and can reach "
                    f"port {port} of {me['host']}; --start-timeout SECONDS waits longer"
                )
                break
            server.settimeout(max(0.01, min(deadline, remark_at) - now))
            try:
                line = stack.enter_context(server.accept()[0])
            except TimeoutError:
                continue
            other = _receive(line, 5.0)
            if other is None or other.get("run") != "aaconv":
                continue  # a port scanner, or a health check
            wrong = _contradiction(me, other, here, lines)
            # The wrong one has a place of its own: the right one under its number has to hear of it too.
            number = -1 if wrong else other["process"]
            here[number], lines[number] = other, line
        for line in lines.values():
            with contextlib.suppress(OSError):  # It ended meanwhile: jax's own start will tell.
                line.sendall(json.dumps({"run": "aaconv", "wrong": wrong, "late": late}).encode() + b"\n")
    _raise_verdict(wrong, late)


def _raise_verdict(wrong: str, late: str) -> None:
    if wrong:
        raise ValueError(wrong)
    if late:
        raise LostError(late)


def _contradiction(
    me: Mapping[str, Any], other: Mapping[str, Any], here: dict[int, Any], lines: dict[int, socket.socket]
) -> str:
    if other["processes"] != me["processes"]:
        return (
            f"process {other['process']} ({other['host']}) was started with --processes {other['processes']}, process "
            f"0 ({me['host']}) with --processes {me['processes']}: give all the same"
        )
    first = here.get(other["process"])
    if first is None or (other["process"] in lines and _has_ended(lines[other["process"]])):
        return ""
    return (
        f"two processes have the index {other['process']}, on {first['host']} and on {other['host']}: number them from "
        f"0 to {me['processes'] - 1}, each once"
    )


def _answer(
    host: str, port: int, me: dict[str, Any], deadline: float, timeout: float, note: Callable[[str], None]
) -> None:
    who = f"process {me['process']} of {me['processes']} ({me['host']})"
    remark_at = time.monotonic() + _REMARK_SECONDS
    while True:
        reached = False
        try:
            with socket.create_connection(
                (host, port), timeout=max(0.1, min(10.0, deadline - time.monotonic()))
            ) as line:
                reached = True
                line.sendall(json.dumps(me).encode() + b"\n")
                # Process 0 knows best who is missing: it may speak first.
                answer = _receive(line, max(0.1, deadline + 2 - time.monotonic()))
            if answer is not None and answer.get("run") == "aaconv":
                _raise_verdict(answer["wrong"], answer["late"])
                return
            reason = "something answers there, but not a process 0 that waits for others"
        except OSError as error:
            reason = (error.strerror or str(error)) if not reached else "process 0 went away"
        now = time.monotonic()
        if now > deadline:
            raise LostError(
                f"{who} waited {timeout:g} s for process 0 at {host}:{port} ({reason}). Check that --coordinator is "
                "the host of process 0 and a port open between the hosts, that process 0 was started, and that it did "
                "not stop with an error of its own; --start-timeout SECONDS waits longer"
            )
        if now > remark_at:
            note(f"{who} waits for process 0 at {host}:{port} ({reason}), for at most {timeout:g} s ...")
            remark_at = deadline + 1
        time.sleep(0.2)


def _receive(line: socket.socket, timeout: float) -> dict[str, Any] | None:
    """Returns the JSON object of one line, None for anything else."""
    line.settimeout(timeout)
    received = b""
    try:
        while not received.endswith(b"\n") and len(received) < 10_000:
            piece = line.recv(4096)
            if not piece:
                return None
            received += piece
        found = json.loads(received)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _has_ended(line: socket.socket) -> bool:
    readable, _, _ = select.select([line], [], [], 0)
    try:
        return bool(readable) and not line.recv(1, socket.MSG_PEEK)
    except OSError:
        return True


def _listed(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:20])) + (" ..." if len(indices) > 20 else "")
    return f"process {shown}" if len(indices) == 1 else f"processes {shown}"


# Agreeing


def exchange(value: Any) -> list[Any]:
    """Returns what every process gave, in their order; all must call it.

    Args:
      value: JSON-able.
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    with _naming_loss():
        sizes = multihost_utils.process_allgather(np.int32(len(data)))
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: len(data)] = data
        rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def together(action: Callable[[], _T]) -> _T:
    """Returns what `action` gives here, once it has succeeded in every process.

    Raises:
      ValueError: it failed with a ValueError or an OSError, here or elsewhere; the message names
        where.
    """
    error = result = None
    try:
        result = action()
    except (ValueError, OSError) as caught:
        error = caught
    if jax.process_count() > 1:
        told = exchange([socket.gethostname(), (str(error) or type(error).__name__) if error else ""])
        failed = [f"process {i} ({host}): {text}" for i, (host, text) in enumerate(told) if text]
        if failed and error is None:
            raise ValueError(failed[0] if len(failed) == 1 else f"{len(failed)} processes failed; {failed[0]}")
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def check_alike(facts: Mapping[str, Any]) -> None:
    """Checks that all processes go by the same facts.

    Args:
      facts: JSON-able values by name.

    Raises:
      ValueError: they do not; the message names the host, the fact and both values.
    """
    told = exchange([socket.gethostname(), dict(facts)])
    first_host, first = told[0]
    differences = [
        f"  {name}: {values.get(name)!r} in process {i} ({host}), {first.get(name)!r} in process 0 ({first_host})"
        for i, (host, values) in enumerate(told)
        for name in {**first, **values}
        if values.get(name) != first.get(name)
    ]
    if differences:
        more = [f"  ... and {len(differences) - 20} more"] if len(differences) > 20 else []
        raise ValueError(
            "\n".join(["the processes must run the same; give all hosts the same here:", *differences[:20], *more])
        )


def check_same_folder(folder: Path) -> None:
    """Checks that `folder`, which exists on every host, is the same one for all.

    Raises:
      ValueError: it is not, or process 0 cannot write there.
    """
    if jax.process_count() == 1:
        return
    with contextlib.ExitStack() as stack:

        def leave_token() -> str:
            if jax.process_index() != 0:
                return ""
            token = folder / f".hosts-{uuid.uuid4().hex}"
            token.write_text("")
            stack.callback(token.unlink, missing_ok=True)
            return token.name

        name = exchange(together(leave_token))[0]
        seen = exchange([socket.gethostname(), _appears(folder / name)])
    blind = [f"process {i} ({host})" for i, (host, found) in enumerate(seen) if not found]
    if blind:
        raise ValueError(
            f"{folder} is not one folder for all hosts: {', '.join(blind)} do{'es' if len(blind) == 1 else ''} not see "
            f"what process 0 ({seen[0][0]}) writes there; name a folder on a disk that all hosts share"
        )


def _appears(path: Path) -> bool:
    # A network file system may show a new file a moment later.
    for _ in range(20):
        if path.exists():
            return True
        time.sleep(0.1)
    return False


def code_revision() -> dict[str, str]:
    """Returns ``revision``, of the package's git checkout if it is one, and ``sources``, a hash of its files."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    found = {"sources": digest.hexdigest()[:12]}
    if (package.parent / ".git").exists():
        command = ["git", "-C", str(package.parent), "rev-parse", "--short", "HEAD"]
        with contextlib.suppress(OSError):  # no git
            found["revision"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found


# Losing one


class _Here:
    """What the last words of this process have to say."""

    processes: int | None = 1
    process: int | None = 0
    starting = ""  # where and how long, while it waits for the others to start
    doing = "the preparations, before the first step"
    leaving: int | None = None  # the exit code, once this process has said all it had to say
    spoken = threading.Lock()

    def message(self, error: BaseException | None = None) -> str:
        reason = f" ({str(error).strip().splitlines()[0][:200]})" if error is not None else ""
        who = "this process" if self.process is None else f"process {self.process} of {self.processes}"
        if self.starting:
            return (
                f"{who} ({socket.gethostname()}) waited in vain for the others {self.starting}. Check that all of them "
                "were started, reach each other, and did not stop with errors of their own; --start-timeout SECONDS "
                "waits longer"
            )
        return (
            f"{who} ({socket.gethostname()}) lost contact with the others at {self.doing}{reason}: one of them ended, "
            "was killed (out of memory?) or fell silent, or this one broke off; the last lines of each say why. Run "
            "the same command again on all hosts; it goes on from the last checkpoint"
        )


_here = _Here()
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


@_HANDLER
def _on_abort(number: int) -> None:
    # In the thread that aborts, which is one of jax's: a Python handler would only be noted, and never run.
    code = _here.leaving
    if code is None and _here.spoken.acquire(blocking=False):
        code = LOST
        _say(f"aaconv: error: {_here.message()}")
    os._exit(LOST if code is None else code)


def _begin(processes: int | None, process: int | None, where: str, start_timeout: float) -> Callable[[], None]:
    """Takes over what this process says when it ends; returns what gives it back, should there be no others."""
    _here.processes, _here.process, _here.starting = processes, process, f"{where}, for {start_timeout:g} s"
    handle_by = ctypes.CDLL(None).signal
    handle_by.argtypes, handle_by.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    handler = handle_by(signal.SIGABRT, ctypes.cast(_on_abort, ctypes.c_void_p))
    report, stdout = sys.excepthook, sys.stdout

    def fail(*exception: Any) -> None:
        try:
            report(*exception)
        finally:
            if threading.current_thread() is threading.main_thread():
                leave(1, failed=True)

    # Else jax's own ending would wait minutes for the others, which wait for this one.
    sys.excepthook = fail
    # gloo writes to standard output, which is for results.
    sys.stdout.flush()
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = results

    def undo() -> None:
        _here.processes, _here.process, _here.starting = 1, 0, ""
        handle_by(signal.SIGABRT, handler)
        sys.excepthook, sys.stdout = report, stdout
        with results:
            results.flush()
            os.dup2(results.fileno(), 1)

    return undo


def at(doing: str) -> None:
    """Notes what this process is doing, for the message should another be lost; cheap."""
    _here.doing = doing


class Watch:
    """Around what several processes do together: names the loss of one, and bounds what a failure costs the others.

    Files that are closed after a failure may wait for processes that wait for this one, so after
    some seconds it ends all the same; the clock starts where `failing` is left with an error.

    Raises:
      LostError: instead of an error of jax's that tells that another process is gone.
    """

    def __enter__(self) -> Watch:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_naming_loss())
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        return self._stack.__exit__(*exception)

    @contextlib.contextmanager
    def failing(self, *, graceful: type[Exception]) -> Iterator[None]:
        """Enter it last, inside of all that is closed; an error of type `graceful` comes to all processes alike."""
        try:
            yield
        except graceful:
            raise
        except BaseException as error:
            self._end_soon(LostError(_here.message(error)) if _is_loss(error) else error, _UNWIND_SECONDS)
            raise

    def cannot_write(self, error: Exception) -> None:
        """Ends this process with the words of `error`, should it not soon do so by itself; from any thread."""
        self._end_soon(error, _WRITE_SECONDS)

    def _end_soon(self, error: BaseException, seconds: float) -> None:
        if jax.process_count() > 1:
            timer = threading.Timer(seconds, _end, args=(error,))
            timer.daemon = True
            timer.start()
            self._stack.callback(timer.cancel)


@contextlib.contextmanager
def _naming_loss() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1 and _is_loss(error):
            raise LostError(_here.message(error)) from error
        raise


def _is_loss(error: BaseException) -> bool:
    # What XLA raises for a failed collective is a JaxRuntimeError or a bare ValueError.
    kinds = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    return kinds and bool(re.search(r"\bGloo\b|NCCL|^(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED):", str(error)))


def _end(error: BaseException) -> None:
    if _here.leaving is None and _here.spoken.acquire(blocking=False):
        text = f"{error}" if isinstance(error, LostError | ValueError) else f"{type(error).__name__}: {error}"
        _say(f"aaconv: error: {text}")
        os._exit(LOST if isinstance(error, LostError) else FAILED)


def _say(line: str) -> None:
    # The disk that became full may hold standard error as well: this process must end all the same.
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def leave(code: int, *, failed: bool) -> None:
    """Leaves the run before the process exits; with one process it does nothing.

    Args:
      code: the exit code.
      failed: whether this process failed. If so it does not wait for the others, which may wait
        for it, and exits at once: they end within ``heartbeat_timeout``. Else it returns when
        all have finished.
    """
    if not jax.distributed.is_initialized():
        return
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # Either may lie on a disk that is full.
            file.flush()
    _here.leaving = code
    if not failed:
        with contextlib.suppress(Exception):  # It has done all it had to do.
            jax.distributed.shutdown()
        return
    # Most failures are those of all processes, and each should come to say its own.
    thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    thread.start()
    with contextlib.suppress(KeyboardInterrupt):
        thread.join(_LEAVE_SECONDS)
    os._exit(code)
