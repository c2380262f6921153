"""The driver's end of the line to a trial."""

import socket
from multiprocessing.connection import Connection

from lightning_structopt.sweep.spec import Message, decode


class Line:
    """Messages of one trial.

    Args:
        connection: The driver's end.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.open = True

    @classmethod
    def pair(cls) -> tuple["Line", socket.socket]:
        """Return a line and the trial's end of it."""
        ours, theirs = socket.socketpair()
        return cls(Connection(ours.detach())), theirs

    def fileno(self) -> int:
        """Return the descriptor, to wait for messages."""
        return self._connection.fileno()

    def messages(self) -> list[Message]:
        """Return the messages that are there; :attr:`open` says whether more may come."""
        found: list[Message] = []
        while self.open:
            try:
                if not self._connection.poll():
                    break
                found.append(decode(self._connection.recv_bytes()))
            except (EOFError, OSError):
                self.open = False
        return found

    def close(self) -> None:
        """Hang up."""
        self.open = False
        self._connection.close()
