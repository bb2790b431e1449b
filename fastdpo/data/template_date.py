"""The date that chat templates are given which ask for today's, fixed for a whole run.

Templates as Llama 3.2's write the day of rendering into the system message, so that the token ids
of the same rows would change overnight, and with them the run and the key of every reference
log-prob. transformers gives templates a function `strftime_now` of the clock; a macro of that name
in front of the template takes its place.
"""

import re
from datetime import date, datetime

DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnprRsStTuUVwWxXyYzZ%"
"""Those of the C library's strftime; letters that it does not know stay as they are."""

FLAGS = ("", "-", "_", "0", "^", "#")

_LITERAL = re.compile(r"\bstrftime_now\(\s*(?:format\s*=\s*)?(['\"])(.*?)\1\s*\)")

_MACRO = """\
{%- macro strftime_now(format) -%}
{%- set written = WRITTEN -%}
{%- if format in written -%}{{ written[format] }}{%- else -%}
{%- set dates = DATES -%}
{%- set at = namespace(directive=none) -%}
{%- for character in format -%}
{%- if at.directive is none -%}
{%- if character == '%' -%}{%- set at.directive = '' -%}{%- else -%}{{ character }}{%- endif -%}
{%- elif character in '-_0^#' -%}{%- set at.directive = at.directive ~ character -%}
{%- else -%}
{{ dates.get(at.directive ~ character, '%' ~ at.directive ~ character) }}
{%- set at.directive = none -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro %}{{ '' }}"""
"""Looks a format up that the template writes out, and reads any other letter by letter."""


def today() -> str:
    """The present day, as 2025-06-30."""
    return date.today().isoformat()


def asks_for_date(template: str) -> bool:
    """Return True if a chat template may write the date."""
    return re.search(r"\bstrftime_now\b", template) is not None


def with_date(template: str, day: str) -> str:
    """The template with `strftime_now` answering for the midnight at which a day begins.

    Args:
        template: a Jinja template that transformers renders.
        day: the day that it is given, as 2025-06-30.
    """
    midnight = datetime.fromisoformat(day)
    formats = {match[2] for match in _LITERAL.finditer(template) if "\\" not in match[2]}
    written = {each: midnight.strftime(each) for each in sorted(formats)}
    directives = [flag + letter for flag in FLAGS for letter in DIRECTIVES]
    dates = {each: midnight.strftime(f"%{each}") for each in directives}
    macro = _MACRO.replace("DATES", repr(dates)).replace("WRITTEN", repr(written))
    return macro + template
