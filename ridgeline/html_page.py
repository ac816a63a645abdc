"""The frame of an HTML page, its style and the macros that pages share.

A page has no script, no external link and no date: equal input gives equal bytes. The frame is a string of this module,
so that the keys of the steps that write reports cover it.
"""

from __future__ import annotations

import base64
from typing import Any


def render_page(template: str, **values: Any) -> str:
    """Return a page as HTML.

    Args:
        template: A Jinja template that extends ``page`` and fills its blocks.
        **values: What the template shows; every text is escaped.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"page": PAGE, "macros": MACROS}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": lambda share, digits=1: f"{100 * share:.{digits}f} %"}
    return environment.from_string(template).render(**values)


def data_uri(media_type: str, content: bytes) -> str:
    """Return a file's content as a URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


MACROS = """\
{% macro figure(picture, caption="") %}
<figure><img src="{{ picture.uri }}" alt="{{ picture.alt }}">
  {% if caption or picture.caption %}<figcaption>{{ caption or picture.caption }}</figcaption>{% endif %}
</figure>
{% endmacro %}
"""
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{% block title %}{% endblock %}</title>
<style>
*{box-sizing:border-box}
body{margin:0;background:#f3f4f6;color:#111;font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,\
"Helvetica Neue",Arial,sans-serif}
.banner{background:#b91c1c;color:#fff;text-align:center;padding:20px 16px}
.banner strong{display:block;font-size:2rem;letter-spacing:.12em;line-height:1.2}
header,main{max-width:1160px;margin:0 auto;padding:0 20px}
header{padding-top:32px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:0 0 4px}
p{margin:0 0 12px}
.note,figcaption,dt{color:#4b5563;font-size:.875rem}
.verdict{border-left:8px solid #d55e00;background:#fff;border-radius:10px;padding:16px 20px;margin:20px 0}
.verdict.blessed{border-color:#0072b2}
.verdict h2{font-size:1.4rem}
.verdict ul{margin:0;padding-left:20px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:16px;margin:0 0 20px}
.tiles div,section{background:#fff;border-radius:10px;padding:16px 20px}
.tiles dd{margin:0;font-size:1.7rem;font-weight:650;line-height:1.3;font-variant-numeric:tabular-nums}
.tiles small{display:block;font-size:.875rem;font-weight:400;color:#4b5563}
section{margin:0 0 20px;padding:20px;min-width:0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:0 20px}
figure{margin:8px 0 0;min-width:0}
figure img{display:block;width:100%;max-width:560px;height:auto;margin:0 auto}
figcaption{text-align:center;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:6px 8px;text-align:right;border-bottom:1px solid #e5e7eb}
th{font-weight:600}
th:first-child,.plain td{text-align:left}
tbody th{font-weight:500;white-space:nowrap}
.plain td{overflow-wrap:anywhere}
.plain th{vertical-align:top}
code{font-size:.85em;overflow-wrap:anywhere}
@media(max-width:600px){.wide{display:none}section{padding:16px}th,td{padding:6px 4px}}
@media print{body{background:#fff}section,.tiles div{break-inside:avoid}}

{% block style %}
{% endblock %}
</style>
</head>
<body>
{% if synthetic %}
<div class="banner" role="alert"><strong>SYNTHETIC</strong>
The images were drawn by the project itself. These figures say nothing about real data.</div>
{% endif %}
{% block body %}
{% endblock %}
</body>
</html>
"""
