"""The style of the page: system fonts, light and dark, one column that fits a phone."""

__all__ = ["STYLE"]

STYLE = """
:root{--text:#1d2430;--soft:#5b6472;--back:#fff;--panel:#f6f7f9;--line:#dfe3e8;--link:#0b57c2;
--all:#157347;--some:#9a5b00;--none:#5b6472;--ours:#0b57c2;--ours-back:#e8f0fd;--mark:#fff3c4;
--mark-line:#c98a00}
@media(prefers-color-scheme:dark){:root{--text:#e4e7ec;--soft:#9aa4b2;--back:#14171c;
--panel:#1c2027;--line:#323843;--link:#7db0ff;--all:#5fcf94;--some:#f0b255;--none:#9aa4b2;
--ours:#7db0ff;--ours-back:#1b2b45;--mark:#3d3312;--mark-line:#d9a520}}
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--back);color:var(--text);font:16px/1.55 system-ui,sans-serif}
main{max-width:900px;margin:0 auto;padding:48px 24px 72px}
h1,h2,h3,p{margin:0;overflow-wrap:anywhere}
h1{font-size:clamp(1.5rem,5vw,2.1rem);line-height:1.25;font-weight:650;letter-spacing:-.01em;
display:flex;gap:.45em;align-items:center}
h2{font-size:1.25rem;font-weight:650;margin:0 0 16px}
h3{font-size:1rem;font-weight:600}
a{color:var(--link)}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
header .name{color:var(--soft);font-weight:600;margin-bottom:10px}
header p{margin-top:12px;color:var(--soft)}
.sign{flex:none;width:1.35em;height:1.35em;border-radius:50%;color:var(--back);font-size:.8em;
display:grid;place-items:center;background:var(--none)}
.all .sign{background:var(--all)}.some .sign{background:var(--some)}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:6px 20px;margin:24px 0 0;padding:14px 0 0;
border-top:1px solid var(--line);font-size:.92rem}
nav a{text-decoration:none}nav a:hover{text-decoration:underline}
section{margin-top:52px}
article{border:1px solid var(--line);border-radius:12px;padding:20px;margin-bottom:20px}
article>pre{margin:12px 0 0}
pre{margin:0;padding:12px 14px;overflow-x:auto;background:var(--panel);border-radius:8px;
font-size:.82rem;line-height:1.5}
dl{display:grid;grid-template-columns:max-content 1fr;gap:8px 18px;margin:16px 0 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.wide{overflow-x:auto;margin-top:14px}section>.wide{margin-top:0}
table{border-collapse:collapse;font-size:.9rem;min-width:100%}
th,td{text-align:left;vertical-align:top;padding:7px 18px 7px 0;border-top:1px solid var(--line);
font-variant-numeric:tabular-nums}
thead th,thead td{border-top:0;color:var(--soft);font-weight:500;white-space:nowrap}
tbody th{font-weight:600}
.figures{display:flex;flex-wrap:wrap;gap:20px;margin-top:20px}
.figures:empty{display:none}
figure{margin:0;overflow-x:auto;max-width:100%}
figcaption{color:var(--soft);font-size:.86rem;font-weight:600;margin-bottom:10px}
svg{display:block;max-width:none}
svg text{fill:var(--text);font:600 12px system-ui,sans-serif;text-anchor:middle}
svg .type{fill:var(--soft);font:11px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}
rect{fill:var(--back);stroke:var(--soft)}
.operand rect{fill:var(--panel);stroke:var(--line)}
.ours rect{fill:var(--ours-back);stroke:var(--ours);stroke-width:2}
.edge{fill:none;stroke:var(--soft)}.tip{fill:var(--soft)}
details{margin-top:12px;border:1px solid var(--line);border-radius:8px}
section>details{margin-top:0;margin-bottom:12px}
details>.wide{padding:0 14px 8px}
summary{cursor:pointer;padding:10px 14px;overflow-wrap:anywhere;font-size:.92rem}
summary code{display:block;margin:2px 0 0 1.1em;color:var(--soft);font-size:.8rem}
summary small{color:var(--soft)}
details pre{border-radius:0 0 8px 8px;padding:12px 0;font-size:.78rem}
details pre code{display:inline-block;min-width:100%}
details>pre:not(:has(code)){padding:12px 14px}
pre span,pre mark{display:block;padding:0 14px;border-left:3px solid transparent}
mark{background:var(--mark);color:inherit;border-left-color:var(--mark-line)!important}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
@media(max-width:520px){main{padding:28px 16px 56px}article{padding:16px}
dl{grid-template-columns:1fr;gap:2px}dd{margin-bottom:10px}}
@media print{details:not([open])>*:not(summary){display:none}}
"""
