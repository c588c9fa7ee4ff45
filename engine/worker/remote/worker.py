"""Remote worker process, started and restarted by `octavo worker`.

It serves `octavo.worker.v1.Worker` and `Membership` at a TCP address. Addresses other than loopback
require mutual TLS.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc

from ....proto import worker_pb2_grpc
from ...errors import ConfigError
from ...utils.logs import set_up_worker_logs
from ...utils.malloc_arenas import limit_malloc_arenas
from ...utils.tls import group_tls, server_credentials
from ..link import UNLIMITED
from ..parent import end_with_parent
from ..worker import WorkerServicer
from .address import Address
from .membership import MembershipServicer, WorkerSpec

log = logging.getLogger("octavo.worker")

BEAT = 1.0  # seconds between two heartbeats

# Without pings, a broken network link would not be detected.
KEEPALIVE = [
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),
]


def main() -> None:
    """Serve until the engine or the parent process disappears."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--local-rank", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tls", type=Path)
    parser.add_argument(
        "--beat", type=int, required=True, help="file descriptor to write a heartbeat byte to"
    )
    args = parser.parse_args()
    set_up_worker_logs()
    for number in (signal.SIGINT, signal.SIGTERM):  # only the parent ends this process
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    limit_malloc_arenas()
    threading.Thread(target=_beat, args=(args.beat,), name="beat", daemon=True).start()
    spec = WorkerSpec(args.rank, args.local_rank, args.model)
    serve(Address.parse(args.listen, "--listen"), spec, args.tls)


def serve(address: Address, spec: WorkerSpec, tls: Path | None) -> None:
    """Serve at an address; does not return.

    Exits with status 2 if the address cannot be bound. Raises `ConfigError` if TLS is required and
    missing or its files are invalid.
    """
    check_exposure(address, tls)
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=32),
        options=[*UNLIMITED, *KEEPALIVE, ("grpc.so_reuseport", 0)],
    )
    membership = MembershipServicer(spec, _leave)
    worker = WorkerServicer(spec, membership.is_claimed_for)
    worker_pb2_grpc.add_MembershipServicer_to_server(membership, server)
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
    try:
        if tls is None:
            server.add_insecure_port(str(address))
        else:
            server.add_secure_port(str(address), server_credentials(group_tls(tls)))
    except RuntimeError:
        log.error("--listen %s: cannot bind this address", address)
        sys.exit(2)
    import octavo.engine.runner.model_runner  # noqa: F401 - takes seconds, so not on first use

    server.start()
    print(f"ready worker={address} rank={spec.rank} pid={os.getpid()}", flush=True)
    server.wait_for_termination()


def check_exposure(address: Address, tls: Path | None) -> None:
    """Raise `ConfigError` if other machines could claim the worker without authentication."""
    if tls is None and not address.is_loopback:
        raise ConfigError(
            f"--listen {address}: is open to other machines and requires mutual TLS: set --tls to "
            "a folder with tls.crt, tls.key and ca.crt, which signed the engine's certificate"
        )


def _leave(reason: str) -> None:
    log.info("the worker exits: %s", reason)
    os._exit(0)  # a thread may be blocked in a collective


def _beat(file: int) -> None:
    """Send heartbeats to the supervisor."""
    while True:
        os.write(file, b".")
        time.sleep(BEAT)


if __name__ == "__main__":
    main()
