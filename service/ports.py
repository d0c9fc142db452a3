"""Whether the addresses that are to be listened on are free."""

import socket

from handler.errors import SetupError


def check_ports(addresses: dict[str, tuple[str, int]]) -> None:
    """Raise SetupError for the first port that is taken; `addresses` has what each is for."""
    seen: dict[int, str] = {}
    for purpose, (host, port) in addresses.items():
        if not 1 <= port <= 65535:
            raise SetupError(f"port {port} for {purpose} is out of range")
        if port in seen:
            raise SetupError(f"port {port} is wanted for {seen[port]} and for {purpose}")
        seen[port] = purpose
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as exc:
                raise SetupError(
                    f"{host}:{port} for {purpose} cannot be used: {exc.strerror or exc}"
                ) from exc
