"""A process that has imported PyTorch and Lightning once, and forks a new trial from that in a moment.

It trains nothing itself and never touches a GPU, so what it forks is as clean as a new interpreter. Python's own
forkserver would import the user's script in every trial; this one imports nothing of the user's.
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

_PRELOAD = ("torch._dynamo", "torch.utils.flop_counter", "torch.utils.benchmark", "lightning.pytorch",
            "lightning_structopt.sweep.trial")  # fmt: skip
_START = "import sys; from lightning_structopt.sweep.forkserver import main; main(int(sys.argv[1]))"
_LONGEST = 1 << 20  # bytes of a message


class ForkServer:
    """The driver's side: asks for trials, and learns how they ended.

    It ends with the driver. One serves all sweeps of a process.
    """

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for side in (self._control, theirs):
            side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # so that Ctrl-C is the driver's alone
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        theirs.close()
        self._statuses: dict[int, int] = {}
        self.gone = False  # whether it has been killed; trials that it has forked go on

    def fork(self, request: dict[str, Any], channel: int) -> int:
        """Start a trial and return its process id.

        Args:
            request: Its ``spec``, ``log``, ``cwd`` and ``environment``.
            channel: Descriptor of its end of the line to the driver.

        Raises:
            ConnectionError: If the server has been killed.
        """
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], [channel])
        except ConnectionError:
            self._hang_up()
            raise
        while True:
            answer = self._receive()
            if "pid" in answer:
                return int(answer["pid"])

    def status(self, pid: int) -> int | None:
        """Return how ``pid`` ended, as :attr:`subprocess.Popen.returncode` would be; None as long as it isn't known.

        It never will be if the server is :attr:`gone` by then.
        """
        while not self.gone and pid not in self._statuses and select.select([self._control], [], [], 0)[0]:
            with suppress(ConnectionError):
                self._receive()
        return self._statuses.pop(pid, None)

    def wait(self) -> None:
        """Wait until something ends."""
        select.select([self._control], [], [], 1.0)

    def close(self) -> None:
        """End it."""
        self._control.close()
        self._process.wait()

    def _receive(self) -> dict[str, Any]:
        try:
            message = self._control.recv(_LONGEST)
        except ConnectionError:
            message = b""
        if not message:
            self._hang_up()
            raise ConnectionError("The process that starts trials has been killed.")
        answer: dict[str, Any] = json.loads(message)
        if "ended" in answer:
            self._statuses[answer["ended"]] = answer["status"]
        return answer

    def _hang_up(self) -> None:
        self.gone = True
        self._process.wait()


@cache
def _shared(driver: int) -> list[ForkServer]:
    return []


def shared_server() -> ForkServer:
    """Return the server of this process, started if it isn't there."""
    servers = _shared(os.getpid())
    if not servers or servers[-1].gone:
        servers.append(ForkServer())
        atexit.register(servers[-1].close)
    return servers[-1]


def serve(control: socket.socket) -> tuple[dict[str, Any], int] | None:
    """Fork trials until the driver is gone; returns in each of them, with the request and its line to the driver."""
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: set[int] = set()
    while True:
        ready, _, _ = select.select([control.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _report_ends(control, children)
        if control.fileno() in ready:
            message, descriptors, _, _ = socket.recv_fds(control, _LONGEST, 1)
            if not message:
                return None
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(woken)
                os.close(wake)
                return json.loads(message), descriptors[0]
            os.close(descriptors[0])
            children.add(pid)
            control.send(json.dumps({"pid": pid}).encode())


def _report_ends(control: socket.socket, children: set[int]) -> None:
    for pid in sorted(children):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            continue
        end_group(pid)  # before its id is free: what it started goes with it
        _, status = os.waitpid(pid, 0)
        children.remove(pid)
        control.send(json.dumps({"ended": pid, "status": os.waitstatus_to_exitcode(status)}).encode())


def end_group(pid: int) -> None:
    """Kill the process group of ``pid``, if there is one left."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        return


def _become(request: dict[str, Any], channel: int) -> None:
    """Make this forked process look like a new one."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"] | {"STRUCTOPT_CHANNEL": str(channel)})
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)


def main(descriptor: int) -> None:
    """Serve the driver at the other end of ``descriptor``; in a forked process, run its trial."""
    control = socket.socket(fileno=descriptor)
    for module in _PRELOAD:
        import_module(module)
    with suppress(ImportError):  # Lightning imports it at each checkpoint, where it is there
        import_module("omegaconf")
    # What has been imported stays. Collections in trials would go through all of it, and copy the memory that it is in.
    gc.collect()
    gc.freeze()
    # Numerical libraries have threads that Python can't see through; they are ready for forks.
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
    work = serve(control)
    control.close()
    if work is not None:
        _become(*work)
        import_module("lightning_structopt.sweep.trial").main(work[0]["spec"])
    _leave()


def _leave() -> None:
    """End as an interpreter does, but for taking everything apart, which takes seconds with so much imported."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
