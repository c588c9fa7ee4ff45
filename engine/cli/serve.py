"""`octavo serve`: run an engine and its API servers."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.logs import set_up_logs
from .media_options import read_options
from .options import WatchOptions, one_model

if TYPE_CHECKING:  # commands import their modules lazily
    from ..async_llm import AsyncLLM
    from ..server.api_keys import ApiKeys
    from ..server.http_api.server import HttpServer
    from ..utils.tls import TlsFiles


log = logging.getLogger("octavo.server")


@contextmanager
def watched(engine: AsyncLLM, host: str, options: WatchOptions) -> Iterator[str]:
    """Serve metrics and send spans; yield " metrics=HOST:PORT" for the ready line, or "".

    Raises OSError if the port is in use, ValueError if the libraries for spans are not installed.
    """
    from ..observability.tracing import sending_spans
    from ..server.metrics_server import serving_metrics

    with (
        serving_metrics(engine.engine.stats, host, options.metrics_port) as address,
        sending_spans(options.otlp_endpoint) as spans,
    ):
        engine.spans = spans
        yield f" metrics={address}" if address else ""


def serve_model(
    settings: dict[str, Any],
    host: str,
    port: int,
    http_host: str | None,
    http_port: int | None,
    api_key_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    metrics_port: int | None,
    otlp_endpoint: str | None,
    log_format: str,
) -> int:
    """Serve until a signal and return the exit status. Raises what `user_errors` reports."""
    # gRPC reads it on import. By default, it logs each failed TLS handshake.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from ..async_llm import AsyncLLM
    from ..server.api_keys import read_keys
    from ..server.connections import raise_descriptor_limit
    from ..server.grpc_api.server import check_address, ready_line
    from ..server.grpc_api.server import serve as serve_grpc
    from ..utils.malloc_arenas import limit_malloc_arenas
    from ..utils.tls import read_tls
    from ..worker.remote.address import Address

    # While loading, SIGTERM exits like Ctrl-C, closing everything that was started.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, frame: sys.exit(0))
    set_up_logs(log_format)
    raise_descriptor_limit()
    limit_malloc_arenas()
    settings["model"] = one_model(settings.pop("model_name"), settings["model"])
    keys, tls = read_keys(api_key_file), read_tls(tls_cert, tls_key, tls_client_ca)
    settings["workers"] = _addresses(settings["workers"])
    for name in ("allowed_media_domains", "allowed_media_paths", "served_model_name"):
        settings[name] = tuple(settings[name] or ())
    for kind in ("image", "video"):
        settings[f"{kind}_options"] = read_options(settings[f"{kind}_options"], f"--{kind}-option")
    for flag, each in (("--port", port), ("--metrics-port", metrics_port)):
        if each is not None:
            check_address(host, each, flag)
    if keys is None and not (tls and tls.client_ca) and not Address(host, port).is_loopback:
        text = "listening on %s without authentication; set --api-key-file or --tls-client-ca"
        log.warning(text, host)
    http = None
    if http_host is not None and http_port is None:
        raise ValueError(f"--http-host {http_host} requires --http-port")
    if http_port is not None:
        http = _http_server(http_host or host, http_port, keys, tls)
    with (
        AsyncLLM(**settings, isolate_media=True) as engine,
        watched(engine, host, WatchOptions(metrics_port, otlp_endpoint)) as metrics,
    ):

        def on_ready(address: str, http_address: str) -> None:
            log.info("%s", listening_text(address, http_address, tls is not None))
            print(ready_line(engine, address, http_address) + metrics, flush=True)

        return asyncio.run(serve_grpc(engine, host, port, on_ready, keys, tls, http))


def listening_text(address: str, http_address: str, has_tls: bool) -> str:
    """Return the log line with the addresses of the APIs."""
    secure = " with TLS" if has_tls else ""
    text = f"listening: gRPC API on {address}{secure}; OpenAI-compatible HTTP API "
    if http_address:
        return f"{text}on {'https' if has_tls else 'http'}://{http_address}/v1"
    return (
        f"{text}off: OpenAI clients cannot use the gRPC port; add --http-port PORT and use "
        "base_url=http://HOST:PORT/v1"
    )


def _addresses(workers: str | None) -> tuple[str, ...]:
    found = tuple(filter(None, (workers or "").split(",")))
    if workers is not None and not found:  # for example from an unset shell variable
        raise ValueError("--workers: is empty; pass HOST:PORT,HOST:PORT, or remove it")
    return found


def _http_server(host: str, port: int, keys: ApiKeys | None, tls: TlsFiles | None) -> HttpServer:
    """Create the HTTP server, before the model is loaded.

    Raises ValueError if the extra is not installed, OSError if the address cannot be bound.
    """
    from ..server.grpc_api.server import check_address

    try:
        from ..server.http_api.server import HttpServer
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise ValueError("--http-port requires an extra: pip install octavo[http]") from None
    check_address(host, port, "--http-port")
    return HttpServer(host, port, keys, tls)
