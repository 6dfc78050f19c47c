/** The report's style sheet: one column on a phone, two on a desk, light and dark. */
import { FONT, type Theme, themeColours, THEMES } from "../_theme.ts";

function variables(theme: Theme): string {
  const { background, text, muted, grid, categories } = themeColours(theme);
  return `color-scheme:${theme};--background:${background};--text:${text};--muted:${muted};--line:${grid};--accent:${
    categories[0]
  };--bad:${categories[1]};--good:${categories[2]};--panel:${theme === "light" ? "#f6f7f8" : "#1e2227"};`;
}

const [LIGHT, DARK] = THEMES.map(variables);

export const REPORT_STYLE = `
:root{${LIGHT}}
@media (prefers-color-scheme:dark){:root{${DARK}}}
:root[data-theme=light]{${LIGHT}}
:root[data-theme=dark]{${DARK}}
*{box-sizing:border-box}
body{margin:0;background:var(--background);color:var(--text);font:15px/1.5 system-ui,${FONT}}
main,header,footer{max-width:1240px;margin:0 auto;padding:0 16px}
header{padding-top:20px}
h1{font-size:1.5rem;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:36px 0 12px;padding-top:12px;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:24px 0 8px;overflow-wrap:anywhere}
p,ul{margin:6px 0}
.muted,figcaption small{color:var(--muted)}
code,pre{font:13px/1.45 ui-monospace,"DejaVu Sans Mono",monospace}
pre{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:10px 12px;overflow-x:auto;margin:8px 0;white-space:pre-wrap;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:12px 0;align-items:center}
a{color:var(--accent)}
button,input{font:inherit;color:inherit;background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:4px 10px}
button{cursor:pointer}
button:focus-visible,input:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--accent);outline-offset:1px}
#theme{margin-left:auto}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,210px),1fr));gap:10px;margin:12px 0}
.card{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:10px 12px;overflow-wrap:anywhere}
.card dt{color:var(--muted);font-size:.85rem}
.card dd{margin:0;font-size:1.1rem}
dl{margin:0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr));gap:20px;align-items:start}
figure{position:relative;margin:0;min-width:0;border:1px solid var(--line);border-radius:8px;padding:12px}
figure.wide{grid-column:1/-1}
figcaption{font-weight:600;margin-bottom:4px;padding-right:28px;overflow-wrap:anywhere}
figcaption small{display:block;font-weight:400}
.chart{width:100%;min-height:60px;overflow-x:auto}
.chart.vega-embed{display:block;position:static;padding-right:0}
.chart.vega-embed summary{top:6px;right:6px}
.failed{color:var(--bad)}
details.table{border:1px solid var(--line);border-radius:8px;margin:10px 0;padding:0 12px}
details.table>summary{cursor:pointer;padding:10px 0;font-weight:600;overflow-wrap:anywhere}
.tools{display:flex;flex-wrap:wrap;gap:6px 12px;align-items:center;margin:6px 0 10px}
.tools input{flex:1 1 220px;min-width:0;max-width:420px}
.scroll{overflow:auto;max-height:70vh;margin-bottom:10px}
table{border-collapse:collapse;font-size:13px;width:max-content;min-width:100%}
th,td{padding:4px 10px;text-align:left;border-bottom:1px solid var(--line);vertical-align:top;max-width:520px;overflow-wrap:anywhere}
th{position:sticky;top:0;background:var(--panel);white-space:nowrap;z-index:1;padding:0}
th button{border:0;border-radius:0;background:none;padding:6px 10px;font-weight:600;width:100%;text-align:inherit}
th small{display:block;font-weight:400;color:var(--muted)}
th[aria-sort=ascending] button::after{content:" ▲";font-size:.75em}
th[aria-sort=descending] button::after{content:" ▼";font-size:.75em}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.absent{color:var(--muted)}
td img{height:40px;image-rendering:pixelated;display:block}
.met{color:var(--good)}
.missed{color:var(--bad);font-weight:600}
footer{padding:24px 16px 40px;color:var(--muted);font-size:.85rem}
@media (max-width:600px){body{font-size:14px}h1{font-size:1.25rem}figure{padding:8px}details.table{padding:0 8px}}
`.trim();
