"""Style sheet of all reports: wide screens, phones and paper, by day and by night."""

DAY = """
--page:#fff; --ink:#1b1f24; --soft:#57606a; --line:#d5d9df; --panel:#f5f7f9; --band:#dfe8f5; --grid:#e6e9ed;
--better:#0a6b47; --worse:#a8201a; --equivalent:#0a5fa5; --undecided:#57606a; --alarm:#8a4b00; --alarm-page:#fff6e5;
--c0:#6e7781; --c1:#0072b2; --c2:#d55e00; --c3:#00805e; --c4:#a23b97; --c5:#8f6b00; --c6:#1b2a6b; --c7:#c4314b;
"""
NIGHT = """
--page:#14171b; --ink:#e6e9ed; --soft:#a3abb5; --line:#363c44; --panel:#1c2026; --band:#24344d; --grid:#2a2f36;
--better:#5fd3a2; --worse:#ff8f87; --equivalent:#79b8ff; --undecided:#a3abb5; --alarm:#ffc266; --alarm-page:#33270f;
--c0:#a3abb5; --c1:#58b4ee; --c2:#ff9d5c; --c3:#4fd1a5; --c4:#e08fd8; --c5:#e3c454; --c6:#c3caff; --c7:#ff8f9f;
"""
# Heat maps have one scale by day and by night: h0 to h6 from an eighth to eight fair shares, s0 to s6 from low to high.
CELLS = """
.h0{fill:#1d5fa6} .h1{fill:#5a97c9} .h2{fill:#b3d1e6} .h3{fill:#f4f3f1} .h4{fill:#f3bd9f} .h5{fill:#d6705a}
.h6{fill:#a31f30} .none{fill:#111} .unknown{fill:#a9afb7}
.s0{fill:#1a3c6e} .s1{fill:#3c4f73} .s2{fill:#5f6377} .s3{fill:#7d7a77} .s4{fill:#a19470} .s5{fill:#c9b25c}
.s6{fill:#f2d53f}
"""
LAYOUT = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);overflow-wrap:anywhere;-webkit-text-size-adjust:100%;
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:80rem;margin:0 auto;padding:1.5rem clamp(.9rem,3vw,2.5rem) 3rem}
h1{font-size:1.9rem;line-height:1.2;margin:.2rem 0 .4rem} h2{font-size:1.25rem;margin:2.6rem 0 .6rem;line-height:1.3}
h3{font-size:1rem;margin:1.6rem 0 .3rem} p{margin:.5rem 0;max-width:52rem}
.kind{color:var(--soft);margin:0;font-size:.85rem} .question{font-size:1.1rem;color:var(--soft)}
.answer{font-size:1.25rem;line-height:1.45;border-left:4px solid var(--c1);padding:.2rem 0 .2rem 1rem;margin:1.2rem 0}
.note{color:var(--soft);font-size:.875rem} .note ul{padding-left:1.2rem} .note li{max-width:60rem}
.warning{border:1px solid var(--alarm);background:var(--alarm-page);padding:.6rem .9rem;border-radius:6px;
 max-width:none;margin:.8rem 0} .warning ul{margin:.2rem 0;padding-left:1.3rem}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.8rem 1.2rem;margin:1rem 0}
dt{color:var(--soft);font-size:.8rem} dd{margin:0;font-variant-numeric:tabular-nums}
dl .wide{grid-column:1/-1;max-width:52rem}
.plan{border:1px solid var(--line);border-radius:8px;padding:.2rem 1rem .6rem;margin:1rem 0;background:var(--panel)}
.plan h2{margin-top:.7rem}
.box{overflow-x:auto;margin:.8rem 0;border:1px solid var(--line);border-radius:8px;overscroll-behavior-x:contain}
@supports not selector(::-webkit-scrollbar){.box{scrollbar-width:thin;scrollbar-color:var(--soft) transparent}}
.box::-webkit-scrollbar{height:10px;width:10px} .box::-webkit-scrollbar-thumb{background:var(--soft);border-radius:5px}
.box::-webkit-scrollbar-track{background:var(--panel)}
.tall{max-height:30rem;overflow-y:auto} .box:focus-visible{outline:2px solid var(--c1);outline-offset:2px}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.45em .65em;text-align:right;vertical-align:top;white-space:nowrap;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
thead th{font-weight:600;color:var(--soft);vertical-align:bottom;background:var(--panel);position:sticky;top:0;
 z-index:1;white-space:normal;overflow-wrap:normal}
th:first-child{text-align:left;white-space:normal;position:sticky;left:0;background:var(--page);
 min-width:8.5em;max-width:18em;overflow-wrap:break-word}
thead th:first-child{background:var(--panel);z-index:2}
.words td,.words th,.verdicts :is(td,th):nth-child(2){text-align:left} .words td{white-space:normal}
tr.group th{max-width:none;background:var(--panel);font-weight:600}
small{display:block;color:var(--soft);font-size:.88em;font-weight:400}
.badge{display:inline-block;border:1px solid;border-radius:1em;padding:0 .6em;font-size:.93em;font-weight:600;
 white-space:nowrap}
.better{color:var(--better)} .worse{color:var(--worse)} .equivalent{color:var(--equivalent)}
.undecided,.plain{color:var(--undecided)} .badge.undecided,.badge.plain{font-weight:400}
pre{margin:0;padding:.8rem 1rem;font:.8rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre}
pre code{font:inherit} .sample pre{white-space:pre-wrap}
svg{display:block;overflow:visible} svg text{font-size:12px;fill:var(--soft)} svg svg{overflow:hidden}
.charts,.maps{display:grid;gap:1.4rem 2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr))}
.maps{grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr))}
figure{margin:0;min-width:0} figcaption{font-size:.9rem;font-weight:600;margin-bottom:.7rem}
figcaption small{display:inline;margin-left:.4rem}
.plot{display:flex} .plot .scale{flex:none} .plot .field{flex:1 1 0;width:0;min-width:0}
.plot .empty{flex:1;color:var(--soft);font-size:.85rem;border:1px dashed var(--line);border-radius:6px;padding:1rem}
.grid{stroke:var(--grid)} .zero{stroke:var(--soft)} .band{fill:var(--band)}
.line{fill:none;stroke-width:1.8;vector-effect:non-scaling-stroke;stroke-linejoin:round} .line:hover{stroke-width:4}
.level{stroke:var(--soft);stroke-dasharray:2 3}
.level+text{paint-order:stroke;stroke:var(--page);stroke-width:4px}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;padding:0;margin:.8rem 0;font-size:.85rem}
.legend li{display:flex;align-items:center;gap:.45rem;min-width:0} .legend svg{flex:none} .legend small{display:inline}
.row{display:grid;grid-template-columns:minmax(0,17rem) minmax(0,1fr) 13.5rem;column-gap:1rem}
.row .name{padding:.25rem 0} .row .badge{font-size:.8rem} .row .field{width:100%;height:100%;min-height:36px}
.row .value{text-align:right;font-size:.85rem;font-variant-numeric:tabular-nums;padding:.25rem 0}
.row .value small{display:inline;margin-left:.4rem} .forest{margin:.8rem 0}
.whisker{stroke:currentColor;stroke-width:2} .mean{fill:currentColor} .seed{fill:currentColor;opacity:.6}
@media screen and (max-width:46rem){h1{font-size:1.55rem}.answer{font-size:1.1rem}
 .row{grid-template-columns:minmax(0,1fr) auto} .row .field{grid-row:2;grid-column:1/-1;height:36px}
 .row .value small{display:block;margin:0}}
"""
PAPER = """
@page{size:landscape;margin:12mm}
@media print{body{font-size:10pt} main{max-width:none;padding:0 3px} .box{overflow:visible;border:0}
 @supports not selector(::-webkit-scrollbar){.box{scrollbar-width:thin;scrollbar-color:var(--soft) transparent}}
.box::-webkit-scrollbar{height:10px;width:10px} .box::-webkit-scrollbar-thumb{background:var(--soft);border-radius:5px}
.box::-webkit-scrollbar-track{background:var(--panel)}
.tall{max-height:none} .tall pre{column-count:2;column-gap:8mm} pre{white-space:pre-wrap;padding:0;font-size:7.5pt}
 table{font-size:7pt} th,td{padding:.25em .35em} thead th,th:first-child{position:static}
 table.every{font-size:6pt} .every :is(td,th){white-space:normal;overflow-wrap:anywhere;min-width:0}
 .every th:first-child{min-width:11em}
 tr,figure,.row,.plan,.warning,.legend{break-inside:avoid} h2,h3,.legend{break-after:avoid} h2{margin-top:1.2rem}
 .charts{grid-template-columns:1fr 1fr} .maps{grid-template-columns:repeat(4,1fr)}
 *{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""


def _slots() -> str:
    """Colour classes, and dashes for the second and later rounds through the colours."""
    colours = "".join(f".c{i}{{--own:var(--c{i})}}" for i in range(8))
    dashes = "".join(f".d{i}{{stroke-dasharray:{dash}}}" for i, dash in enumerate(("7 4", "2 3", "9 3 2 3"), 1))
    return f"{colours}\n.line{{stroke:var(--own)}} .dot{{fill:var(--own)}}\n{dashes}"


STYLE = (
    f":root{{color-scheme:light dark;{DAY}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{NIGHT}}}}}"
    f"{LAYOUT}{CELLS}{_slots()}{PAPER}"
)
