"""The style sheet of the report's page: light and dark, a phone and a desk."""

# Colours after Okabe and Ito, which most colour-blind people can tell apart; lighter on a dark ground.
STYLE = """
:root{color-scheme:light dark;--ground:#fffffb;--ink:#1b1b1a;--soft:#6d6a63;--faint:#dedbd2;--shade:#0072b212;
--s0:#444;--s1:#0072b2;--s2:#d1480a;--s3:#008a62;--s4:#a3508c;--s5:#b97a00;--s6:#3b9bd1;--s7:#8a5a2b;--s8:#aaa69c}
@media(prefers-color-scheme:dark){:root{--ground:#151514;--ink:#e9e6df;--soft:#9c978c;--faint:#35332f;--shade:#6cb8ee1c;
--s0:#c9c5bb;--s1:#5cb3ee;--s2:#ff8652;--s3:#3ccf9f;--s4:#e08fca;--s5:#efb03c;--s6:#9ad4f5;--s7:#cf9f6f;--s8:#6a675f}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.6rem 1.1rem 4rem;max-width:1180px;background:var(--ground);color:var(--ink);
font:16px/1.5 "Iowan Old Style",Palatino,"Palatino Linotype","Book Antiqua",Georgia,serif;
font-variant-numeric:lining-nums tabular-nums;-webkit-text-size-adjust:100%}
h1{font-size:1.75rem;font-weight:400;line-height:1.15;margin:0}
h2{font-size:1.2rem;font-weight:400;font-style:italic;margin:2.6rem 0 .2rem;padding-top:.7rem;
border-top:1px solid var(--faint)}
p{margin:.3rem 0 .8rem;max-width:46rem}
.sub,.note,.about{color:var(--soft)}
.note,.trust{font-size:.86rem}.trust{color:var(--soft)}
.doubt{border-left:3px solid var(--s2);padding-left:.7rem}
.keys{position:sticky;top:0;background:var(--ground);padding:.5rem 0 .4rem;z-index:1;margin:.4rem 0 0}
.key{white-space:nowrap;margin-right:1.1rem}
.key i{display:inline-block;width:1.1rem;height:0;border-top:.2rem solid;vertical-align:.25em;margin-right:.35rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.2rem,1fr));gap:1.1rem 1.4rem;margin:1.3rem 0 .6rem}
.tile b{display:block;font-weight:400;font-size:1.7rem;line-height:1.15}
.tile span{display:block;font-size:.84rem;color:var(--soft);line-height:1.3}
.panels{display:flex;flex-wrap:wrap;gap:1rem 1.2rem;margin:.7rem 0}
.panels>*{flex:1 1 max(min(100%,18rem),31%);min-width:0}
.panels.by2>*{flex-basis:max(min(100%,18rem),45%)}
.panels.by4>*{flex-basis:max(min(100%,15rem),23%)}
.panels>:only-child{max-width:40rem}
figure{margin:0;min-width:0}
figure.wide{max-width:40rem}
.look{display:grid;gap:.6rem 2rem;align-items:start}
.look figure{position:sticky;top:3rem}
@media(min-width:68rem){.look{grid-template-columns:minmax(19rem,1fr) minmax(0,max-content)}}
figcaption{font-size:.95rem;line-height:1.3;margin-bottom:.15rem}
.about{display:block;font-size:.82rem}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:10px/1 ui-sans-serif,system-ui,"Helvetica Neue",Arial,sans-serif;fill:var(--soft)}
svg text.row{fill:var(--ink);font-size:10.5px}
svg text.name{font-size:10.5px}
.line{fill:none;stroke:currentColor;stroke-width:1.5;stroke-linejoin:round;stroke-linecap:round}
.line.thin{stroke-width:1}.line.dashed{stroke-dasharray:3 3;stroke-width:1.1}
.cloud{fill:none;stroke:currentColor;stroke-width:2.4;stroke-linecap:round;opacity:.42}
.mark{fill:currentColor;stroke:var(--ground);stroke-width:.8}
.beyond{fill:none;stroke:currentColor;stroke-width:1.3}
.whisker{stroke:currentColor;stroke-width:1.4;opacity:.55}
.grid{stroke:var(--faint);stroke-width:.6}.axis{stroke:var(--soft);stroke-width:.8}
.rule{stroke:var(--ink);stroke-width:.8;stroke-dasharray:1 3;stroke-linecap:round}
.inside{fill:var(--shade)}
svg text.value{font-size:9.5px;fill:var(--ink)}
.s0{color:var(--s0)}.s1{color:var(--s1)}.s2{color:var(--s2)}.s3{color:var(--s3)}.s4{color:var(--s4)}
.s5{color:var(--s5)}.s6{color:var(--s6)}.s7{color:var(--s7)}.s8{color:var(--s8)}
svg text.s0{fill:var(--s0)}svg text.s1{fill:var(--s1)}svg text.s2{fill:var(--s2)}svg text.s3{fill:var(--s3)}
svg text.s4{fill:var(--s4)}svg text.s5{fill:var(--s5)}svg text.s6{fill:var(--s6)}svg text.s7{fill:var(--s7)}
svg text.s8{fill:var(--s8)}
.scroll{overflow-x:auto;margin:.6rem 0 1rem}
table{border-collapse:collapse;font-size:.92rem}
th{font-weight:400;text-align:right;color:var(--soft);padding:.15rem .7rem;border-bottom:1px solid var(--ink);
vertical-align:bottom}
td{text-align:right;padding:.12rem .7rem;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
tr.gap td{padding-top:.75rem}
td small{display:block;color:var(--soft);font-size:.78rem;line-height:1.2}
td small b{color:var(--ink)}
td.none{color:var(--soft)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.1rem;font-size:.92rem;margin:.6rem 0}
dt{color:var(--soft)}dd{margin:0;min-width:0;overflow-wrap:anywhere}
code{font:.84rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media(max-width:34rem){body{padding:1rem .8rem 3rem}h1{font-size:1.4rem}
dl{grid-template-columns:1fr}dt{margin-top:.5rem}
td,th{padding-left:.4rem;padding-right:.4rem}table{font-size:.8rem}
td:first-child{white-space:normal;max-width:6.4rem}.interval{display:none}.tile b{font-size:1.4rem}}
@media print{.keys{position:static}h2{break-after:avoid}figure{break-inside:avoid}}
"""
