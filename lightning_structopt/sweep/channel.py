"""The line between the driver and a trial: messages come up, and its end means that the other side is gone."""

import os
import signal
import threading
from multiprocessing.connection import Connection

from lightning_structopt.sweep.spec import Message, encode


class Channel:
    """The trial's end of the line.

    Args:
        descriptor: Of a connected socket.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._connection = Connection(descriptor)

    def send(self, message: Message) -> None:
        """Send a message to the driver; if it is gone, so are we, soon."""
        try:
            self._connection.send_bytes(encode(message))
        except OSError:
            _end()

    def die_with_driver(self) -> None:
        """End this process and all that it started as soon as the driver is gone, however it went."""
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        try:
            self._connection.recv_bytes()
        except (EOFError, OSError):
            _end()


def _end() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)
