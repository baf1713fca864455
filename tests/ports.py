"""A port for a test's own server or process group."""

import socket


def free_port() -> int:
    """A port without a listener now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
