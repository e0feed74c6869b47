"""The HTML and CSS of report.html (Jinja2 templates; every value is escaped)."""

STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --card: #ffffff; --fg: #1c2126; --muted: #5b646d; --edge: #dfe3e7;
  --up: #1f7a5c; --down: #b3382c; --warn: #fff6dc; }
@media screen and (prefers-color-scheme: dark) { :root { --bg: #121518; --card: #1a1e22; --fg: #e6e9ec; --muted: #a3acb5;
  --edge: #30363d; --up: #55c19a; --down: #f2897c; --warn: #3a3117; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1.6rem 1.2rem 3rem; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: .9rem; margin: 0 0 .1rem; }
p { margin: .3rem 0 .7rem; max-width: 75ch; }
.kicker, .note, .detail { color: var(--muted); }
.kicker { margin: 0; font-size: .85rem; }
.note { font-size: .8rem; line-height: 1.4; margin: .35rem 0 0; }
h2 + .note { margin: 0 0 .6rem; }
.wide { grid-column: 1 / -1; }
.warn { background: var(--warn); border-left: 3px solid var(--c5); padding: .45rem .8rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.1rem 0 0; }
.tiles div { background: var(--card); border: 1px solid var(--edge); border-radius: 6px; padding: .6rem .9rem;
  flex: 1 1 11rem; }
.tiles dt { font-size: .8rem; color: var(--muted); }
.tiles dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tiles dd.detail { font-size: .8rem; font-weight: 400; min-height: 1.2em; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: .8rem; }
figure, .card { margin: 0; background: var(--card); border: 1px solid var(--edge); border-radius: 6px; padding: .7rem .8rem;
  break-inside: avoid; min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: .25rem .7rem; white-space: nowrap; }
th[scope=row] { text-align: left; }
.phases { width: 100%; font-size: .85rem; } .phases th, .phases td { padding: .15rem .3rem; }
.phases small { display: block; font-weight: 400; color: var(--muted); white-space: normal; line-height: 1.3; }
thead th { color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--edge); }
tbody tr + tr > * { border-top: 1px solid var(--edge); }
td.first, th.group { border-left: 1px solid var(--edge); }
th.group { text-align: center; }
.up { color: var(--up); font-weight: 600; } .down { color: var(--down); font-weight: 600; }
td svg { width: 22px; height: 10px; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); gap: .8rem; }
section > h3 { margin: .9rem 0 .35rem; }
.samples header { font-size: .8rem; font-weight: 600; margin-bottom: .3rem; }
.samples h4 { font-size: .75rem; font-weight: 500; color: var(--muted); margin: .4rem 0 .1rem; }
.samples img { max-width: 100%; height: auto; display: block; border-radius: 4px; }
.right { border-left: 3px solid var(--up); } .wrong { border-left: 3px solid var(--down); }
.right header { color: var(--up); } .wrong header { color: var(--down); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .8rem/1.4 ui-monospace, Menlo, Consolas, monospace; }
details { margin-top: .8rem; } summary { cursor: pointer; font-weight: 600; }
details pre { margin-top: .5rem; }
@media print { body { max-width: none; padding: 0; font-size: 11px; background: #fff; }
  .grid { grid-template-columns: repeat(2, 1fr); } h2, h3 { break-after: avoid; } h2 { margin-top: 1.2rem; }
  .scroll { overflow: visible; } table { font-size: 9px; } th, td { padding: .15rem .35rem; } td.first { padding-left: .6rem; }
  details::details-content { content-visibility: visible; } }
"""

# The page of a run that goes on is loaded anew, though not from under somebody who marks text; browsers keep the place on the
# page over a reload, and what is unfolded is kept here. Storage may be refused (private windows, a page inside another).
REFRESH_SECONDS = 10
REFRESH = f"""
const folds = [...document.querySelectorAll("details")], key = "unfolded " + location.pathname;
try {{
  const kept = JSON.parse(sessionStorage.getItem(key) || "[]");
  folds.forEach((fold, i) => {{ fold.open = !!kept[i]; }});
}} catch (refused) {{ }}
setInterval(() => {{
  if (document.hidden || !getSelection().isCollapsed) return;
  try {{ sessionStorage.setItem(key, JSON.stringify(folds.map(fold => fold.open))); }} catch (refused) {{ }}
  location.reload();
}}, {1000 * REFRESH_SECONDS});
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:
{%- if refresh %}; script-src 'sha256-{{ script_hash }}'{% endif %}">
{% if refresh %}
<noscript><meta http-equiv="refresh" content="{{ refresh }}"></noscript>
{% endif %}
<title>{{ name }} · AMFT run</title>
<style>{{ style }}</style>
</head>
<body>
<header>
<p class="kicker">amft-fast · report of a run</p>
<h1>{{ name }}</h1>
<p>{{ sentence }}</p>
{% for text in warnings %}
<p class="warn" role="note">{{ text }}</p>
{% endfor %}
{% if tiles %}
<dl class="tiles">
{% for label, figure, detail in tiles %}
<div><dt>{{ label }}</dt><dd>{{ figure }}</dd><dd class="detail">{{ detail }}</dd></div>
{% endfor %}
</dl>
{% endif %}
</header>
<main>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% if section.intro %}
<p class="note">{{ section.intro }}</p>
{% endif %}
{{ section.body }}
</section>
{% endfor %}
<section>
<h2>Settings</h2>
{% if environment %}
<p class="note">{% for key, value in environment.items() %}{{ key }} {{ value }}{{ " · " if not loop.last }}{% endfor %}</p>
{% endif %}
{% if config %}
<details><summary>The resolved configuration (config.toml)</summary><pre>{{ config }}</pre></details>
{% else %}
<p class="note">The run left no config.toml.</p>
{% endif %}
{% for file, lines in damaged.items() %}
<p class="note">{{ file }}: {{ lines }} damaged {{ "line was" if lines == 1 else "lines were" }} left out.</p>
{% endfor %}
</section>
</main>
{% if refresh %}
<script>{{ script }}</script>
{% endif %}
</body>
</html>
"""

RESULTS = """<div class="card scroll"><table>
<thead>
<tr><td></td><td></td>
{% for name in ("greedy", "sampled", k) %}
<th class="group" colspan="{{ stages|length + 1 }}" scope="colgroup">{{ name }}</th>
{% endfor %}</tr>
<tr><th scope="col" style="text-align:left">split</th><th scope="col">problems</th>
{% for name in (1, 2, 3) %}
{% for stage in stages -%}
<th{% if loop.first %} class="group" style="text-align:right"{% endif %} scope="col">{{ stage }}</th>
{%- endfor %}<th scope="col">change</th>
{% endfor %}</tr>
</thead>
<tbody>
{% for split, prompts, cells in rows %}
<tr><th scope="row">{{ split }}</th><td>{{ prompts }}</td>
{% for figures, change, kind in cells %}
{% for figure in figures %}<td{% if loop.first %} class="first"{% endif %}>{{ figure }}</td>{% endfor -%}
<td class="{{ kind }}">{{ change or "–" }}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>"""

TIME = """<div class="card"><h3>Share of each phase</h3>{{ bar }}
<div class="scroll"><table class="phases">
<thead><tr><td></td><th scope="col" style="text-align:left">phase</th><th scope="col">seconds</th>
<th scope="col">share</th></tr></thead>
<tbody>
{% for swatch, phase, words, seconds, share in rows %}
<tr><td>{{ swatch }}</td><th scope="row">{{ phase }}<small>{{ words }}</small></th><td>{{ "%.1f"|format(seconds) }}</td>
<td>{{ "%.1f"|format(100 * share) }}%</td></tr>
{% endfor %}
</tbody></table></div>
{% if outside > 0.5 %}
<p class="note">{{ "%.1f"|format(total) }} s are shown; {{ "%.1f"|format(outside) }} s more lie outside the recorded steps (the
evaluation at the end, the last checkpoint).</p>
{% endif %}
</div>"""

SAMPLES = """{% for heading, cards in groups %}
<h3>{{ heading }}</h3>
<div class="samples">
{% for card in cards %}
<article class="card {{ 'right' if card.right else 'wrong' }}">
<header>{{ "✓ correct" if card.right else "✗ wrong" }} · reward {{ card.reward }}
{%- if card.advantage is not none %} · advantage {{ card.advantage }}{% endif %}</header>
{% if card.picture %}
<img src="{{ card.picture }}" alt="The episode as its task draws it">
{% endif %}
{% for title, text in card.texts %}
<h4>{{ title }}</h4><pre dir="auto">{{ text }}</pre>
{% endfor %}
</article>
{% endfor %}
</div>
{% endfor %}"""
