"""Serve the web page at `/`: static files from `page/`.

They contain no engine data, so they need no key. The page gets its data from the API.
"""

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

# Scripts, styles and connections of this server only. Attached media are shown from blob URLs.
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
    """Return the routes of all files, which are read once."""
    return [_route(path, FOLDER / name) for path, name in PATHS.items()]


def _route(path: str, file: Path) -> Route:
    body, kind = file.read_bytes(), TYPES[file.suffix]

    async def give(request: Request) -> Response:
        return Response(body, headers={**HEADERS, "content-type": kind})

    return Route(path, give)
