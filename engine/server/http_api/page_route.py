"""The page at `/`: a few files of our own, as they lie in `page/`. They hold nothing of the engine,
so that they need no key; what they show they ask of the API, as anybody does."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent.parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
NAMES = (
    *("index.html", "page.css", "icon.svg", "api.js", "files.js", "speak.js"),
    *("chat.js", "engine.js", "table.js", "draw.js"),
)
PATHS = {"/" if name == "index.html" else f"/page/{name}": name for name in NAMES}

# Scripts, styles and connections: this server's alone. What a user drops in is shown from memory.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; media-src blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin",
}


def page_routes() -> list[Route]:
    """Of all its files, which are read now."""
    return [_route(path, FOLDER / name) for path, name in PATHS.items()]


def _route(path: str, file: Path) -> Route:
    body, kind = file.read_bytes(), TYPES[file.suffix]

    async def give(request: Request) -> Response:
        return Response(body, headers={**HEADERS, "content-type": kind})

    return Route(path, give)
