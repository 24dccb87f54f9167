"""How a report looks: system fonts, light or dark as the reader has it, one to three charts beside each other."""

CSS = """
:root { --back: #ffffff; --card: #ffffff; --ink: #1f2328; --soft: #57606b; --lines: #d9dee4; --band: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0d1117; --card: #11161d; --ink: #e6edf3; --soft: #9aa4af; --lines: #30363d; --band: #161b22; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(0.8rem, 3vw, 2rem); max-width: 84rem; background: var(--back);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; font-weight: 600; overflow-wrap: anywhere; }
h2 { margin: 2.4rem 0 0.8rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--lines); font-size: 1.15rem;
  font-weight: 600; }
h3 { margin: 1.2rem 0 0.5rem; font-size: 0.95rem; font-weight: 600; }
.path, .note, footer { color: var(--soft); font-size: 0.85rem; margin: 0.4rem 0 0; overflow-wrap: anywhere; }
footer { margin-top: 3rem; }
.remark { margin: 0.8rem 0 0; padding: 0.5rem 0.8rem; border-left: 3px solid #d29922; background: var(--band); }
.pill { display: inline-block; padding: 0.05rem 0.6rem; border-radius: 1rem; font-size: 0.78rem; font-weight: 500;
  vertical-align: middle; color: #fff; background: #6e7781; }
.complete { background: #1a7f4b; } .running { background: #2463b8; }
.stopped { background: #9a6700; } .diverged { background: #c03040; }
.legend { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 0.3rem 1.4rem; margin-top: 0.6rem;
  padding: 0.5rem 0; border-bottom: 1px solid var(--lines); background: var(--back); font-size: 0.9rem; }
.legend span { overflow-wrap: anywhere; }
.swatch { margin-right: 0.45rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); margin: 0;
  border: 1px solid var(--lines); border-radius: 6px; background: var(--card); overflow: hidden; }
.facts div { margin: 0 -1px -1px 0; padding: 0.55rem 0.8rem; border: solid var(--lines); border-width: 0 1px 1px 0; }
dt { color: var(--soft); font-size: 0.8rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
.pairs figure:nth-child(odd) { grid-column: 1; }
figure { margin: 0; padding: 0.7rem 0.8rem; border: 1px solid var(--lines); border-radius: 6px;
  background: var(--card); }
figcaption { font-weight: 500; font-size: 0.92rem; overflow-wrap: anywhere; }
figcaption span { color: var(--soft); font-weight: 400; font-size: 0.85rem; }
img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 1rem 0.3rem 0; border-bottom: 1px solid var(--lines); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
td { max-width: 40rem; overflow-wrap: anywhere; min-width: 5rem; }
tr > td:first-child { color: var(--soft); overflow-wrap: normal; }
.texts tr > td { color: var(--ink); overflow-wrap: anywhere; white-space: pre-wrap; }
summary { margin: 1.2rem 0 0.5rem; cursor: pointer; }
@media print { figure { break-inside: avoid; } .legend { position: static; } }
"""
