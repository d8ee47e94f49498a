"""What `alisa serve` may be told beside the engine's options; frozen, and checked when it is made."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from alisa.config import parse_bytes
from alisa.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where to listen, for whom, and how much anybody may ask for.

    Raises:
        InputError: at construction, naming every field that is out of range.
    """

    host: str = "127.0.0.1"
    """Address to listen on. Other machines reach only addresses that are not of the loopback, which need a key."""
    port: int = 8000
    """Port to listen on; 0: any free one, which the first line on standard error names."""
    api_key: tuple[str, ...] = field(default=(), repr=False)
    """What clients must send as `Authorization: Bearer KEY`, one of these where there are several; better given in the
    environment as ALISA_API_KEY (several with commas between them), where no list of processes shows it."""
    served_model_name: str | None = None
    """Name of the model for clients; None: the last part of its path."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which clients may call this server (their Host header), in addition to its address; with a key and
    without names here any will do."""
    allowed_origins: tuple[str, ...] = ()
    """Web origins whose pages may call this server, such as https://example.org; by default none may."""
    read_answers: bool = True
    """With the prefix cache: while nobody waits, read what was said in a chat, so that its next turn is read from there
    on. Changes no token, and costs as much computing as prompts of these lengths."""
    max_waiting: int = 256
    """Texts that may wait for room in the engine; who asks for more is told to come back (429)."""
    max_choices: int = 64
    """Texts that one call may ask for: prompts times n."""
    max_body: str | int = "4MiB"
    """Largest body of a call."""
    max_connections: int = 1024
    """Connections that are open at the same time; more are told to come back (503)."""
    receive_timeout_s: float = 30.0
    """Within this time the head of a call must be here, and again its body."""
    send_timeout_s: float = 30.0
    """A client that takes nothing for this time is dropped, and its texts end."""
    drain_timeout_s: float = 60.0
    """After SIGTERM running calls have this time to come to their end."""

    def __post_init__(self) -> None:
        wrong = [
            text
            for bad, text in (
                (not 0 <= self.port < 65536, f"port is {self.port}, allowed is 0 to 65535"),
                (
                    any(not key or "," in key for key in self.api_key),
                    "api_key is empty or has a comma in it; leave it out, or give a long random one",
                ),
                (self.max_waiting < 1, f"max_waiting is {self.max_waiting}, at least 1 is needed"),
                (self.max_choices < 1, f"max_choices is {self.max_choices}, at least 1 is needed"),
                (self.max_connections < 1, f"max_connections is {self.max_connections}, at least 1 is needed"),
                *(
                    (not 0 < seconds <= 86400, f"{name} is {seconds}, allowed is above 0 up to 86400")
                    for name, seconds in (
                        ("receive_timeout_s", self.receive_timeout_s),
                        ("send_timeout_s", self.send_timeout_s),
                        ("drain_timeout_s", self.drain_timeout_s),
                    )
                ),
            )
            if bad
        ]
        if wrong:
            raise InputError("; ".join(wrong) + ".")
        parse_bytes(self.max_body)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def known_hosts(self) -> frozenset[str] | None:
        """Names that a Host header may have, in small letters; None: any.

        A page of the web that has its name resolved to this machine (DNS rebinding) comes with a name of its own.
        """
        if self.api_key and not self.allowed_hosts:
            return None
        names = {"localhost", "127.0.0.1", "[::1]"} if self.is_local else set[str]()
        address = f"[{self.host}]" if ":" in self.host.strip("[]") else self.host
        return frozenset(name.lower() for name in (*names, address, *self.allowed_hosts))

    def refuse_open_door(self) -> None:
        """Others may call this server only with a key.

        Raises:
            InputError: they could without.
        """
        if not self.api_key and not self.is_local:
            raise InputError(
                f"--host {self.host} lets other machines in, and there is no key; set ALISA_API_KEY in the environment "
                "(or --api-key), or listen on 127.0.0.1."
            )
