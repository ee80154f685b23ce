"""The page's style: light, dark, wide, narrow and printed. Nothing is fetched."""

from __future__ import annotations

NARROW, CARDS = "560px", "720px"
"""Up to which width plots take the shape that is drawn for telephones, and up to which tables become cards.

The widest table, the checks with all their columns, takes 675 pixels.
"""

_COLOURS = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1c2024; --soft: #59636e; --line: #d8dde3;
  --good: #17753a; --bad: #c22929; --tie: #9a6700; --budget: #8a4fc7; --window: #2563a8; --bar: #5b9c73; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1d2126; --ink: #e6e9ec;
  --soft: #a3acb6; --line: #363d45; --good: #5cc982; --bad: #ff7b72; --tie: #e0a93b; --budget: #c297f0;
  --window: #7ab0ea; --bar: #3c7d56; } }
"""

_PAGE = """
* { box-sizing: border-box; }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1080px; padding: 1.25rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
h1 + p { margin-top: .3rem; } p { margin: .4rem 0; max-width: 75ch; } .soft { color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; } .tie { color: var(--tie); }
.none { color: var(--soft); } .sign { display: inline-block; width: 1.2em; }
header { border-left: .4rem solid var(--good); padding-left: .9rem; } header.failed { border-color: var(--bad); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .5rem 1.5rem; margin: 1.2rem 0 0;
  background: var(--card); border-radius: .5rem; padding: .8rem 1rem; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; }
dl .wide { grid-column: 1 / -1; }
ul { padding-left: 1.2rem; margin: .4rem 0; }
summary { cursor: pointer; color: var(--soft); padding: .3rem 0; }
"""

_TABLES = """
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .2rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } tbody th { color: inherit; font-weight: 600; }
.number { text-align: right; white-space: nowrap; } .verdict { white-space: nowrap; }
.name { min-width: 13.5rem; }
.share { min-width: 9.5rem; white-space: nowrap; }
.bar { display: inline-block; width: 5rem; height: .6rem; border-radius: .3rem; background: var(--line);
  overflow: hidden; margin-right: .5rem; }
.bar i { display: block; height: 100%; background: var(--bar); } .bar.over i { background: var(--bad); }
"""

_PLOTS = """
figure { margin: .6rem 0 0; } .plot { width: 100%; height: auto; display: block; }
.plot text { fill: var(--ink); font: 13px system-ui, sans-serif; } .plot .tick { fill: var(--soft); }
.plot .power { font-size: 10px; }
.plot .grid { stroke: var(--line); } .plot .axis { stroke: var(--soft); }
.plot .allowed { fill: none; stroke: var(--budget); stroke-width: 1.5; stroke-dasharray: 6 4; }
.plot .allowed-text { fill: var(--budget); paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.plot .window { stroke: var(--window); stroke-width: 1; } .plot .window-text { fill: var(--window); font-size: 12px; }
.plot .chunk { stroke: var(--line); stroke-dasharray: 2 3; }
.plot .good { fill: var(--good); } .plot .column { fill: var(--bar); }
.plot .bad { fill: none; stroke: var(--bad); stroke-width: 2; }
.plot .tie { fill: var(--paper); stroke: var(--tie); stroke-width: 1.8; }
.narrow { display: none; }
.legend { color: var(--soft); font-size: .88rem; margin: .2rem 0 0; }
.legend span { display: inline-block; margin-right: 1.1rem; }
.legend b { font-weight: 700; }
"""

_PHONE = f"""
@media screen and (max-width: {NARROW}) {{
  .narrow {{ display: block; }} .broad {{ display: none; }} .plot text {{ font-size: 12px; }}
  body {{ padding: 1rem .75rem 2rem; }}
}}
@media screen and (max-width: {CARDS}) {{
  table, tbody, caption {{ display: block; width: 100%; }} thead {{ display: none; }}
  tr {{ display: flex; flex-wrap: wrap; gap: .1rem .75rem; align-items: baseline; border: 1px solid var(--line);
    border-radius: .5rem; padding: .45rem .75rem; margin: 0 0 .5rem; }}
  td, tbody th, .number {{ border: 0; padding: 0; text-align: left; }}
  .name {{ flex: 1 1 55%; min-width: 0; }} .share {{ min-width: 0; }} .bar {{ width: 3rem; }}
  .done {{ flex: 1 0 100%; color: var(--soft); }}
  td.number::before {{ content: attr(data-name) " "; color: var(--soft); }}
  td:empty {{ display: none; }} dl {{ grid-template-columns: 1fr 1fr; }}
  table {{ font-size: .88rem; }}
}}
@media print {{ body {{ font-size: 11pt; max-width: none; }} figure, tr, dl {{ break-inside: avoid; }}
  h2 {{ break-after: avoid; }} details::details-content {{ content-visibility: visible; height: auto; }} }}
"""

STYLE = _COLOURS + _PAGE + _TABLES + _PLOTS + _PHONE
