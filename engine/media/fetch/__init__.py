"""Fetch media from web URLs, protected against server-side request forgery (SSRF)."""
