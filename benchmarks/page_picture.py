"""Take the screenshot `docs/page.png`: the dashboard of a busy server with the embedded model.

python -P -m octavo.benchmarks.page_picture docs/page.png
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from octavo.engine.config.engine_config import EMBEDDED_MODEL
from octavo.engine.server.drain import CallTracker
from octavo.engine.server.http_api.server import HttpServer
from octavo.scheduler.params import SamplingParams

from .browser import chromium
from .demo_model.draw import draw_shape
from .fakes.tiny_server import Served

SIZE = {"width": 1180, "height": 1180}
NUM_RUNNING, NUM_OTHERS = 8, 10
COLORS = 256  # palette size of the saved PNG


class _PageServer(Served):
    async def _start(self) -> None:
        await super()._start()
        self.http = HttpServer("127.0.0.1", 0)
        self.url = f"http://{await self.http.start(self.engine, CallTracker())}"

    def begin(self, number: int) -> None:
        """Submit a background request: a prefix common to all of them, then its own words."""

        async def read() -> None:
            prompt = {
                "prompt": "The sea is wide. " * 6
                + f"{number} is a number. " * (1 + 4 * number % 31)
            }
            params = SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)
            async for _ in self.engine.generate(prompt, params, request_id=f"report-{number}"):
                pass

        asyncio.run_coroutine_threadsafe(read(), self.loop)


@contextlib.contextmanager
def _page_server() -> Iterator[_PageServer]:
    settings: dict[str, Any] = {"max_model_len": 2048, "kv_cache_memory_bytes": 24 << 20}
    # Steps in float32 are slow enough to be visible in the screenshot.
    server = _PageServer(EMBEDDED_MODEL, dtype="float32", max_num_seqs=NUM_RUNNING, **settings)
    yield server
    server.run(server.http.drain(0.1))
    server.close()


def _ask(page: Any, question: str, picture: Path) -> None:
    page.locator("#pick").set_input_files(picture)
    page.locator("#files img").wait_for()
    page.fill("#message", question)
    page.press("#message", "Enter")
    page.locator(".turn.answer .after").last.filter(has_text="tokens").wait_for()


def take_picture(path: Path) -> None:
    """Save a screenshot with answered questions and other requests running."""
    with (
        _page_server() as server,
        TemporaryDirectory() as folder,
        chromium(viewport=SIZE) as browser,
    ):
        star, circle = Path(folder) / "star.png", Path(folder) / "circle.png"
        rng = np.random.default_rng(20)
        draw_shape(rng, (320, 240), "purple", "star").image.save(star)
        draw_shape(rng, (320, 240), "blue", "circle").image.save(circle)
        page = browser.pages[0]
        page.goto(server.url)
        _ask(page, "What color is the shape?", star)
        for number in range(NUM_RUNNING - 1):
            server.begin(number)
            page.wait_for_timeout(250)
        _ask(page, "What shape is it?", circle)
        for number in range(NUM_RUNNING - 1, NUM_OTHERS):
            server.begin(number)
        page.locator("#waiting").filter(has_text="2").wait_for()
        data = page.screenshot()
        for number in range(NUM_OTHERS):
            server.run(server.engine.abort(f"report-{number}"))
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]))
