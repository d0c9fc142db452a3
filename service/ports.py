"""Free ports: whether those to listen on are, and which are."""

import socket
from contextlib import ExitStack

from handler.errors import SetupError


def check_ports(addresses: dict[str, tuple[str, int]]) -> None:
    """Raise SetupError for the first port that is taken.

    `addresses` maps what each address is for to its host and port.
    """
    seen: dict[int, str] = {}
    for purpose, (host, port) in addresses.items():
        if not 1 <= port <= 65535:
            raise SetupError(f"port {port} for {purpose} is out of range")
        if port in seen:
            raise SetupError(f"port {port} is given twice, for {seen[port]} and for {purpose}")
        seen[port] = purpose
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as exc:
                raise SetupError(
                    f"{host}:{port} for {purpose} cannot be used: {exc.strerror or exc}"
                ) from exc


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that are free now."""
    with ExitStack() as held:  # all at once, so that no two are the same
        probes = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]
