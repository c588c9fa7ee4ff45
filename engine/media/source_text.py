"""Classify a source given as text: a data URI, bare base64, or something else.

Clients use this module too, so it imports only the standard library.
"""

from __future__ import annotations

import re

BLANKS = " \t\r\n\f\v\0"
BARE_BASE64 = "looks like base64; put data:image/png;base64, (or the matching type) before it"


def is_data_uri(text: str) -> bool:
    """Return whether the text starts with `data:`, ignoring case and leading whitespace."""
    return text[:64].lstrip(BLANKS)[:5].lower() == "data:"


# First base64 characters of each file format.
_BEGINNINGS = ("iVBORw0KGgo", "/9j/", "_9j_", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0AK", "GkXfo")
_ISO_MEDIA = re.compile(r"AAAA[A-Za-z0-9+/_-]{2}Z0eXB|AAAA[A-Za-z0-9+/_-]{3,4}mdH")
_LETTERS = re.compile(r"[A-Za-z0-9+/_\-\s]{40,}={0,2}\s*\Z")
_MANY_LETTERS = re.compile(r"[A-Za-z0-9+/_\-\s]{256}")  # too long for a path without a dot


def looks_like_base64(text: str) -> bool:
    """Return whether the text is the base64 of a file without a `data:` prefix."""
    start = text[:512].lstrip()
    if _MANY_LETTERS.match(start):
        return True
    is_known = start.startswith(_BEGINNINGS) or _ISO_MEDIA.match(start) is not None
    return is_known and _LETTERS.match(text[:512].strip()) is not None
