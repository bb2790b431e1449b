"""The variables that a row may give to the chat template: those that the template reads.

Everything else that `apply_chat_template` takes belongs to the renderer. A row that could set
`chat_template` or `tokenize` would choose how it is rendered, and so might a file from elsewhere.
"""

import inspect
import re
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastdpo.data.errors import DataError
from fastdpo.data.normalize import PreferenceRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FUNCTIONS = ("raise_exception", "strftime_now")
"""Functions that transformers gives every template; Jinja's own functions are no variables."""


class TemplateVariables:
    """The variables of a tokenizer's chat template, and who may set them.

    Args:
        tokenizer: its template may be set later, or be a dict of several.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        parameters = set(inspect.signature(tokenizer.apply_chat_template).parameters)
        own = {"messages", *tokenizer.special_tokens_map, *_FUNCTIONS}
        self._renderers = (parameters | own) - {"documents", "kwargs"}
        self._read: dict[str, frozenset[str]] = {}
        self._noted: set[str] = set()

    def taken_from(self, row: PreferenceRow, notes: list[str]) -> dict[str, Any]:
        """The variables of a row that its template reads; another name is noted, once.

        Raises:
            DataError: the row sets what belongs to the renderer.
        """
        known = self._of_template(row.tools)
        if known is None:
            known = frozenset(row.chat_template_kwargs)  # rendering will say what is wrong with it
        if row.tools and "tools" not in known:
            self._note("tools", notes)
        variables = {}
        for name, value in row.chat_template_kwargs.items():
            if name in self._renderers:
                allowed = ", ".join(sorted(known - self._renderers)) or "none"
                raise DataError(
                    f"chat_template_kwargs sets {name!r}, which is not the row's to say; it may "
                    f"set the variables of the chat template ({allowed}): remove it"
                )
            if name in known:
                variables[name] = value
            else:
                self._note(name, notes)
        return variables

    def note_unread_fields(self, row: PreferenceRow, names: set[str], notes: list[str]) -> None:
        """Note, once for each name, a field of the row's turns that the template never spells."""
        try:
            template = self._tokenizer.get_chat_template(tools=row.tools)
        except ValueError:
            return  # rendering will say what is wrong with it
        for name in names:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                self._note(name, notes)

    def _note(self, name: str, notes: list[str]) -> None:
        if name not in self._noted:
            self._noted.add(name)
            notes.append(f"warning: the chat template does not use {name!r}, which rows give it")

    def _of_template(self, tools: list[Any] | None) -> frozenset[str] | None:
        """The names that the template for such a row reads; None where it is no template."""
        try:
            template = self._tokenizer.get_chat_template(tools=tools)
        except ValueError:
            return None
        if template not in self._read:
            environment = ImmutableSandboxedEnvironment(
                extensions=[_Generation, "jinja2.ext.loopcontrols"]
            )
            try:
                tree = environment.parse(template)
                self._read[template] = frozenset(meta.find_undeclared_variables(tree))
            except (TemplateSyntaxError, RecursionError):
                return None
        return self._read[template]


class _Generation(Extension):
    """The block `{% generation %}` of transformers, which marks the assistant's words."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
