"""The report's page: markup and style. Dark text on white, system fonts, one column.

Phones scroll what is wide sideways; print leaves out what is folded. No script and no address of anything outside: the
content policy in the head makes a browser refuse to fetch at all. Autoescape is on; only figures, the style and the
summaries' JSON are marked safe, by ``report.py``, which made them.
"""

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
.kicker { margin: 0; color: #555; font-size: .9rem; overflow-wrap: break-word; }
h1 { margin: .2rem 0 1rem; font-size: 1.6rem; line-height: 1.25; overflow-wrap: break-word; }
h1 .mark { display: inline-block; margin-right: .5rem; padding: .1rem .6rem; border-radius: .3rem; color: #fff;
  font-size: 1rem; vertical-align: .2rem; }
.yes .mark { background: #117733; } .no .mark { background: #b3261e; }
h2 { margin: 2.4rem 0 .6rem; font-size: 1.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
ul.seen { margin: 0; padding: 0; list-style: none; }
ul.seen li { display: flex; gap: .6rem; margin: .2rem 0; overflow-wrap: break-word; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .4rem 1.5rem;
  margin: 0; padding: .8rem 1rem; background: #f6f6f4; border-radius: .4rem; font-size: .9rem; }
dl div { display: flex; gap: .6rem } dt { min-width: 6.5rem; color: #555; } dd { margin: 0; overflow-wrap: break-word; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .12rem .6rem; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; padding-left: 0; overflow-wrap: break-word; }
tbody th { text-align: left; font-weight: 400; }
thead th { border-bottom: 2px solid #999; vertical-align: bottom; }
tr.section th { padding-top: .9rem; font-weight: 700; }
.live { color: #222; } .twin { color: #b35400; } td { white-space: nowrap; }
figure { margin: .6rem 0 .4rem; } figure svg { display: block; width: 100%; min-width: 34rem; height: auto; }
figcaption { margin-bottom: .6rem; } figcaption strong { display: block; font-weight: 600; }
figcaption b { margin-right: .6rem; }
details { margin: .2rem 0 1rem; font-size: .85rem; } summary { cursor: pointer; color: #333; padding: .3rem 0; }
section > .wide table:not(.compare), details table { white-space: nowrap; }
section > .wide td:first-child { white-space: normal; min-width: 8rem; }
.note { color: #555; font-size: .85rem; }
@media (max-width: 34rem) { body { font-size: 15px; } h1 { font-size: 1.3rem; } th, td { padding: .2rem .35rem; }
  .compare { font-size: .85rem; }
  .hint::before { content: "scroll sideways"; display: block; color: #777; font-size: .8rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } figure, tr, dl { break-inside: avoid; }
  figure svg { min-width: 0; } h2 { break-after: avoid; }
  .wide { overflow: visible; } details:not([open]) { display: none; }
  dl { border: 1px solid #ccc; } }
"""

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ css }}</style>
</head>
"""

PAGE = """{% macro compare(sections) %}<div class="wide"><table class="compare">
<thead><tr><th scope="col">measure</th>{% for name in columns %}
<th scope="col" class="{{ name }}">{{ name }}</th>{% endfor %}
{%- if columns|length == 2 %}<th scope="col">difference</th>{% endif %}</tr></thead>
<tbody>
{% for section, rows in sections %}<tr class="section">
<th scope="rowgroup" colspan="{{ columns|length * 2 }}">{{ section }}</th></tr>
{% for row in rows %}<tr><th scope="row">{{ row.label }}</th>{% for name in columns %}
<td>{{ row[name] }}</td>{% endfor %}
{%- if columns|length == 2 %}<td>{{ row.difference }}</td>{% endif %}</tr>
{% endfor %}{% endfor %}</tbody></table></div>{% endmacro -%}
""" + HEAD + """<body>
<header class="{{ mood }}">
<p class="kicker">{{ kicker }}</p>
<h1>{% if mark %}<span class="mark">{{ mark }}</span>{% endif %}{{ sentence }}</h1>
{% if seen %}<ul class="seen">
{% for ok, line in seen %}<li><b>{{ "✓" if ok else "✗" }}</b><span>{{ line }}</span></li>
{% endfor %}</ul>{% endif %}
</header>
<main>
<section><h2>Where and how</h2>
<dl>{% for key, value in card.items() %}<div><dt>{{ key }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
</section>
<section><h2>The whole run</h2>
{{ compare(overall) }}
<p class="note">Latencies are those of served requests, from the scheduled arrival; n is how many. A p99 stands
only where {{ p99_from }} or more requests carry it.
{%- if columns|length == 2 %} Difference: twin against live; pp are percentage points.{% endif %}</p>
</section>
<section><h2>By class</h2>
<div class="wide hint">{{ grid(glance) }}</div>
<details><summary>Line by line{% if columns|length == 2 %}, with differences{% endif %}</summary>
{{ compare(by_class) }}
</details>
</section>
{% for figure in figures %}<section><h2>{{ figure.heading }}</h2>
<figure><figcaption><strong>{{ figure.finding }}</strong>
{%- for name in figure.names %} <b class="{{ name }}">{{ name }}</b>{% endfor %}</figcaption>
<div class="wide hint">{{ figure.svg }}</div></figure>
<details><summary>{{ figure.caption }}</summary><div class="wide">{{ grid(figure.table) }}</div></details>
</section>
{% endfor %}
{% for heading, table in extra %}<section><h2>{{ heading }}</h2><div class="wide">{{ grid(table) }}</div></section>
{% endfor %}
</main>
<script type="application/json" id="summaries">{{ data }}</script>
</body>
</html>
"""

RUNS_PAGE = HEAD + """<body>
<header>
<p class="kicker">{{ title }}</p>
<h1>{{ finding }}</h1>
</header>
<main>
<section><h2>Which runs</h2>
<dl>{% for key, value in card.items() %}<div><dt>{{ key }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
</section>
<section><h2>In numbers</h2><div class="wide hint">{{ numbers }}</div>
<p class="note">Latencies are p95 of served requests, from the scheduled arrival; a class's share within its SLO is of
what it offered. Read them beside what was degraded or shed.</p>
</section>
<section><h2>How long people waited</h2>
<figure><figcaption>Live runs are solid lines, twins dashed.</figcaption><div class="wide hint">{{ svg }}</div></figure>
</section>
</main>
</body>
</html>
"""

GRID = """<table><thead><tr>{% for head in heads %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>"""
