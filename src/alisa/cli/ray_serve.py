"""`alisa serve --ray`: the fleet is up until somebody stops the command, and then comes to its end in order."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack, redirect_stdout

from alisa.cli.cluster_options import ServingOptions
from alisa.cli.screen import say, waiting
from alisa.cli.signals import stop_on_sigterm
from alisa.config import EngineConfig
from alisa.dist.cluster import cluster
from alisa.dist.share import with_whole_paths
from alisa.errors import InputError
from alisa.server.config import ServerConfig


def serve_fleet(engine: EngineConfig, config: ServerConfig, options: ServingOptions) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit status.

    Raises:
        InputError: Ray or the server's packages are not installed, there is no cluster or no room in it, or no port to
            listen on.
    """
    if config.port == 0:
        raise InputError("--port is 0, and the machines of a cluster must know one port; give one, such as 8000.")
    # Ray has messages of its own until it is left, and standard output is nobody's.
    with redirect_stdout(sys.stderr), cluster(str(options.ray)):
        try:
            # Here and not above: the command line is read without torch, and without the extra.
            from alisa.dist.serving import address_of, serving
        except ModuleNotFoundError as error:
            raise InputError(
                f"alisa serve needs {error.name}, which is not installed; pip install 'alisa[ray]'."
            ) from error
        stop_on_sigterm()  # Ray has put a handler of its own there
        size = options.size(engine.device)
        if options.min_replicas > size.num_replicas:
            raise InputError(
                f"--min-replicas is {options.min_replicas}, and there are {size.num_replicas} replicas at most; ask "
                "for fewer, or more --replicas."
            )
        with ExitStack() as stack:
            try:
                with waiting("starting replicas", show=sys.stderr.isatty()):
                    fleet = serving(with_whole_paths(engine), config, size, min_replicas=options.min_replicas)
                    stack.enter_context(fleet)
                address = address_of(config)
                say(
                    f"alisa: {options.min_replicas} to {size.num_replicas} replicas serve on {address} "
                    f"(page: {address}/, API: {address}/v1)"
                )
                signal.pause()
            except KeyboardInterrupt:
                say("alisa: running calls come to their end.")
    return 0
