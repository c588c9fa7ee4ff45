"""A worker that was started apart, as a process: `octavo worker` starts it, and the next after it.

It serves `octavo.worker.v1.Worker` and `Membership` at an address. Off loopback that takes mutual
TLS.
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
from ...utils.tls import group_tls, server_credentials
from ..link import UNLIMITED
from ..parent import end_with_parent
from ..worker import WorkerServicer
from .address import Address
from .membership import MembershipServicer, WorkerSpec

log = logging.getLogger("octavo.worker")

BEAT = 1.0  # seconds

# A machine whose cable is cut says nothing: the other end is asked every few seconds.
KEEPALIVE = [
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),
]


def main() -> None:
    """Serves until its engine has gone or its parent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--local-rank", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tls", type=Path)
    parser.add_argument("--beat", type=int, required=True, help="open file: a byte there is a beat")
    args = parser.parse_args()
    set_up_worker_logs()
    for number in (signal.SIGINT, signal.SIGTERM):  # its parent's: that ends this one
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    threading.Thread(target=_beat, args=(args.beat,), name="beat", daemon=True).start()
    place = WorkerSpec(args.rank, args.local_rank, args.model)
    serve(Address.parse(args.listen, "--listen"), place, args.tls)


def serve(address: Address, place: WorkerSpec, tls: Path | None) -> None:
    """Does not return. Exits with status 2 where nothing can listen there. Raises `ConfigError`."""
    check_exposure(address, tls)
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=32),
        options=[*UNLIMITED, *KEEPALIVE, ("grpc.so_reuseport", 0)],
    )
    membership = MembershipServicer(place, _leave)
    worker = WorkerServicer(place, membership.is_taken_in)
    worker_pb2_grpc.add_MembershipServicer_to_server(membership, server)
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
    try:
        if tls is None:
            server.add_insecure_port(str(address))
        else:
            server.add_secure_port(str(address), server_credentials(group_tls(tls)))
    except RuntimeError:
        log.error("%s: nothing can listen there", address)
        sys.exit(2)
    import octavo.engine.runner.model_runner  # noqa: F401 - seconds, spent before it is asked

    server.start()
    print(f"ready worker={address} rank={place.rank} pid={os.getpid()}", flush=True)
    server.wait_for_termination()


def check_exposure(address: Address, tls: Path | None) -> None:
    """Raises `ConfigError` where a stranger could take the worker for its own."""
    if tls is None and not address.is_loopback:
        raise ConfigError(
            f"--listen {address}: is open to other machines, so it takes mutual TLS: --tls, a "
            "folder of tls.crt, tls.key and ca.crt, which signed the engine's certificate"
        )


def _leave(why: str) -> None:
    log.info("the worker ends: %s", why)
    os._exit(0)  # a thread may wait in a collective for ever


def _beat(file: int) -> None:
    """Tells the keeper that this process is not stuck."""
    while True:
        os.write(file, b".")
        time.sleep(BEAT)


if __name__ == "__main__":
    main()
