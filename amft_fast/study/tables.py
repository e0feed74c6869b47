"""Tables of a study as Markdown and as a page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from amft_fast.report import charts, templates

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }} · {{ kind }}</title><style>{{ style }}</style></head><body>
<header><p class="kicker">amft-fast · {{ kind }}</p><h1>{{ title }}</h1><p>{{ sentence }}</p></header>
<main>{% for table in tables %}<section><h2>{{ table.title }}</h2><div class="card scroll"><table>
<thead><tr>{% for h in table.head %}<th scope="col">{{ h }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in table.rows %}<tr><th scope="row">{{ row[0] }}</th>
{%- for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div></section>{% endfor %}
{% for note in notes %}<p class="note">{{ note }}</p>{% endfor %}
{% if plots %}<section><h2>Curves</h2><div class="grid">{{ plots }}</div></section>{% endif %}</main></body></html>"""


class Table(NamedTuple):
    """Cells as text; the first of a row names it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def page(
    kind: str, title: str, sentence: str, tables: Sequence[Table], notes: Sequence[str], plots: Markup | str = ""
) -> str:
    """The HTML of a page: tables, notes under them, and charts. Everything but `plots` is escaped."""
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_PAGE)
    style = Markup(templates.STYLE + charts.STYLE)
    return template.render(
        kind=kind, title=title, sentence=sentence, tables=tables, notes=notes, plots=plots, style=style
    )
