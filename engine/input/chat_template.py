"""Encode messages to token ids with the checkpoint's chat template.

The template is rendered with a marker in place of each text. The result is split at the added
tokens that the template itself wrote, the markers are replaced by the texts, and each part between
two added tokens is encoded as plain text. So no text can inject a turn or a placeholder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta

from ..config.engine_config import read_json
from ..config.json_files import read_text
from ..errors import ConfigError, InputError
from ..tool_calling.chat_turns import MARK, TEXTS, add_mark, as_they_are, in_qwens_form, to_json
from .conversation import Conversation, read_conversation
from .template_environment import BoundedEnvironment, TemplateLimitError
from .tokenizer import TextBudget, TextTokenizer


class ChatTemplate:
    """The checkpoint's chat template, rendered in jinja2's sandbox."""

    def __init__(self, model_dir: Path, tokenizer: TextTokenizer) -> None:
        environment = self._environment = BoundedEnvironment()
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = to_json
        self._tokenizer = tokenizer
        text = _template_text(model_dir)
        try:
            self._template = environment.from_string(text)
            self._has_tools = "tools" in meta.find_undeclared_variables(environment.parse(text))
        except TemplateError as error:
            raise ConfigError(f"{model_dir}: its chat template does not parse: {error}") from None
        try:
            self.encode(read_conversation([{"role": "user", "content": "Hello"}]))
        except InputError as error:  # Other messages may render, unless a limit was exceeded.
            if isinstance(error.__cause__, TemplateLimitError):
                text = f"{model_dir}: its chat template {error.__cause__}; replace it"
                raise ConfigError(text) from None

    def encode(self, conversation: Conversation, budget: TextBudget | None = None) -> list[int]:
        """Return token ids with one placeholder token for each image or video.

        Raises `TooLong` over the budget.
        """
        texts = [*conversation.texts]
        try:
            rendered = self._environment.render(
                self._template,
                **self._turns(conversation, texts),
                **{TEXTS: texts},
                add_generation_prompt=True,
                add_vision_id=False,
            )
        except TemplateLimitError as error:
            raise InputError("messages", f"the chat template {error}") from error
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            # Only messages of the template's raise_exception are meant for clients.
            reason = f": {error}" if type(error) is TemplateError else ""
            raise InputError("messages", f"rejected by the chat template{reason}") from None
        token_ids: list[int] = []
        for part, token in self._tokenizer.split_added(rendered):
            run = MARK.sub(lambda mark: texts[int(mark[1])], part)
            token_ids += self._tokenizer.encode_plain(run, budget)
            if token:
                token_ids.append(self._tokenizer.added[token])
        return token_ids

    def _turns(self, conversation: Conversation, texts: list[str]) -> dict[str, Any]:
        """Return the template's variables. Texts of new markers are appended to `texts`."""
        messages, tools = conversation.messages, conversation.tools
        if not self._has_tools:
            return {"messages": in_qwens_form(messages, tools)}

        def mark(text: str) -> str:
            is_unsafe = "\0" in text or self._tokenizer.has_added(text)
            return add_mark(text, texts) if is_unsafe else text

        return {
            "messages": as_they_are(messages, mark),
            "tools": as_they_are(tools, mark) or None,
        }


def _template_text(model_dir: Path) -> str:
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(model_dir / name, missing_ok=True).get("chat_template")
        if isinstance(found, str):
            return found
    path = model_dir / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    raise ConfigError(
        f"{model_dir}: has no chat template; add chat_template.json, chat_template.jinja or "
        "chat_template in tokenizer_config.json"
    )


def _raise(text: str) -> None:
    raise TemplateError(text)
