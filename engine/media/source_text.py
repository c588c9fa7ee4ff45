"""What a source given as text is: a data URI, base64 without one, or something else.

For clients too: it imports the standard library alone.
"""

from __future__ import annotations

import re

BLANKS = " \t\r\n\f\v\0"
BARE_BASE64 = "looks like base64; write data:image/png;base64, (or the like) before it"


def is_data_uri(text: str) -> bool:
    """In any case, and after blanks."""
    return text[:64].lstrip(BLANKS)[:5].lower() == "data:"


# What base64 of each format begins with.
_BEGINNINGS = ("iVBORw0KGgo", "/9j/", "_9j_", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0AK", "GkXfo")
_ISO_MEDIA = re.compile(r"AAAA[A-Za-z0-9+/_-]{2}Z0eXB|AAAA[A-Za-z0-9+/_-]{3,4}mdH")
_LETTERS = re.compile(r"[A-Za-z0-9+/_\-\s]{40,}={0,2}\s*\Z")
_MANY_LETTERS = re.compile(r"[A-Za-z0-9+/_\-\s]{256}")  # no path goes on for so long without a dot


def looks_like_base64(text: str) -> bool:
    """Whether a source is the base64 of a file, without `data:` before it."""
    start = text[:512].lstrip()
    if _MANY_LETTERS.match(start):
        return True
    is_known = start.startswith(_BEGINNINGS) or _ISO_MEDIA.match(start) is not None
    return is_known and _LETTERS.match(text[:512].strip()) is not None
