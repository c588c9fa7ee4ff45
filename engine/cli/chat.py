"""`octavo chat`: ask one question, of a server or of a model loaded in this process."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import user_errors
from .media_options import ImageOption, VideoOption, hosts_of, read_options
from .options import Hub, Model


def chat(
    question: Annotated[str, typer.Argument(help="The question.")],
    server: Annotated[
        str | None, typer.Option(help="HOST:PORT of a running `octavo serve`.")
    ] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Use TLS; CA of the server's certificate, PEM.")
    ] = None,
    model: Model = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help="An image: path, http(s) URL or data URI. May be repeated."),
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option(help="A video: path, http(s) URL or data URI. May be repeated."),
    ] = None,
    image_option: ImageOption = None,
    video_option: VideoOption = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of the answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; 0 is greedy.")
    ] = None,
    hub: Hub = "huggingface",
) -> None:
    """Ask one question, of a server (--server) or of a model loaded in this process.

    Local files are read by this command. URLs are fetched by the server, if it allows them, or by
    this process. The API key for the server is read from the environment variable OCTAVO_API_KEY.
    """
    sampling: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    with user_errors():
        media = _parts("image", image, image_option) + _parts("video", video, video_option)
        messages = [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
        if server is None:
            domains = hosts_of([*(image or ()), *(video or ())])
            asyncio.run(_chat_here(model, hub, domains, messages, sampling))
            return
        if model is not None:
            raise ValueError(
                "--server and --model cannot be combined: the server has its own model"
            )
        from ..client.client import Client, Tls

        tls = Tls(ca=tls_ca) if tls_ca else False
        with Client(server, api_key=os.environ.get("OCTAVO_API_KEY"), tls=tls) as client:
            for delta in client.chat(messages, **sampling):
                print(delta.text, end="", flush=True)
        print()


def _parts(kind: str, sources: list[str] | None, options: list[str] | None) -> list[dict[str, Any]]:
    """Return content parts with the given options. Raises ValueError."""
    given = read_options(options, f"--{kind}-option")
    if {"type", kind} & given.keys():
        raise ValueError(f"--{kind}-option: type and {kind} are not options")
    return [{"type": kind, kind: source, **given} for source in sources or ()]


async def _chat_here(
    model: str | None,
    hub: str,
    domains: tuple[str, ...],
    messages: list[dict[str, Any]],
    sampling: dict[str, Any],
) -> None:
    from ...scheduler.params import SamplingParams
    from ..async_llm import AsyncLLM

    params = SamplingParams(**sampling)
    with AsyncLLM(model, hub=hub, allowed_media_domains=domains) as engine:
        async for delta in engine.chat(messages, params):
            print(delta.text, end="", flush=True)
            if delta.error:
                raise ValueError(delta.error)
    print()
