"""Patterns of JSON schema formats for which llguidance's own allow invalid values.

Each format is a tuple of patterns that a value must all match. They are stricter than the RFCs:
every match is valid, but some valid values are excluded (leap seconds, lower-case "t" and "z", IPv6
addresses that end in an IPv4 address).
"""

from __future__ import annotations

# Dates of RFC 3339, section 5.7, for the years 0001 to 9999; Python and SQL have no year 0.
_YEAR = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = (
    "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])"  # divisible by 4 and not by 100
    "|(?:0[48]|[2468][048]|[13579][26])00)"  # divisible by 400
)
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    f"|{_LEAP_YEAR}-02-29)"
)
# Second 60 is excluded: it only exists at 23:59 UTC, which depends on the offset.
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?"
    "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)

_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"  # RFC 1123
_DOMAIN = rf"{_LABEL}(?:\.{_LABEL})*"
_ATOM = "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]+"  # RFC 5321
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_OCTET}(?:\.{_OCTET}){{3}}"
_GROUP = "[0-9a-fA-F]{1,4}"
_IPV6 = "|".join(
    [
        f"(?:{_GROUP}:){{7}}{_GROUP}",
        f"(?:{_GROUP}:){{1,7}}:",
        *(f"(?:{_GROUP}:){{{n}}}(?::{_GROUP}){{1,{7 - n}}}" for n in range(1, 7)),
        f":(?::{_GROUP}){{1,7}}",
        "::",
    ]
)
_IPV6 = f"(?:{_IPV6})"

# RFC 3986, with a port from 0 to 65535.
_PERCENT = "%[0-9a-fA-F]{2}"
_NAME = f"(?:[a-zA-Z0-9._~!$&'()*+,;=-]|{_PERCENT})"
_SEGMENT = f"(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|{_PERCENT})"
_QUERY = f"(?:[a-zA-Z0-9._~!$&'()*+,;=:@/?-]|{_PERCENT})*"
_PORT = (
    "(?:0{0,4}|0*[1-9][0-9]{0,3}|[1-5][0-9]{4}"
    "|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
)
_AUTHORITY = rf"(?:(?:{_NAME}|:)*@)?(?:\[{_IPV6}\]|{_NAME}*)(?::{_PORT})?"
_URI = (
    "[a-zA-Z][a-zA-Z0-9+.-]*:"
    f"(?://{_AUTHORITY}(?:/{_SEGMENT}*)*|/(?:{_SEGMENT}+(?:/{_SEGMENT}*)*)?"
    f"|{_SEGMENT}+(?:/{_SEGMENT}*)*)?"
    rf"(?:\?{_QUERY})?(?:#{_QUERY})?"
)

FORMATS: dict[str, tuple[str, ...]] = {
    "date": (f"^{_DATE}$",),
    "time": (f"^{_TIME}$",),
    "date-time": (f"^{_DATE}T{_TIME}$",),
    "hostname": (f"^{_DOMAIN}$", "^.{1,253}$"),
    "email": (rf"^{_ATOM}(?:\.{_ATOM})*@(?:{_DOMAIN}|\[{_IPV4}\])$", "^[^@]{1,64}@.{1,189}$"),
    "uri": (f"^{_URI}$",),
}
LIBRARY_FORMATS = ("duration", "ipv4", "ipv6", "uuid", "unknown")  # exact in llguidance
