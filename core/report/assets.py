"""Style and script of the report, as text, so that the page stands alone.

The script draws overlay panels, sorts tables and answers the mouse over curves. It uses no library and
loads nothing; the page's content security policy forbids both.
"""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1c1f23;--soft:#5d6570;--line:#e2e4e8;
  --grid:#eceef1;--link:#1f5fc4;--shade:#f3f5f8;--good:#0b7a53;--bad:#b3261e;--warn:#fff6dd;
  --warnline:#e9cf83;--c1:#2a6fdb;--c2:#d1661c;--c3:#0a8f6a;--c4:#b5408f;--c5:#7a5cc9;--c6:#9a7400;
  --c7:#c8423f;--c8:#35839f}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1c2026;--ink:#e7eaee;--soft:#9aa4b1;
  --line:#323943;--grid:#2a3038;--link:#86b4ff;--shade:#232932;--good:#5fd0a3;--bad:#ff8a80;
  --warn:#3a3216;--warnline:#6d5c20;--c1:#6ea6ff;--c2:#f29a57;--c3:#4fcfa5;--c4:#e583c2;--c5:#b19cf5;
  --c6:#d9b548;--c7:#f08582;--c8:#74c3de}
}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",
  Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 4px}
h2{font-size:1.2rem;margin:0 0 6px}
h3{font-size:1rem;margin:14px 0 4px}
p{margin:6px 0;max-width:76ch}
.soft,figcaption,caption{color:var(--soft)}
small,.small{font-size:.86rem}
a{color:var(--link)}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--shade);padding:12px;border-radius:8px;overflow:auto;max-height:520px;margin:8px 0}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:14px 0 20px;padding:0}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;
  margin:16px 0}
.scroll{overflow-x:auto}
.note{background:var(--warn);border:1px solid var(--warnline);border-radius:8px;padding:8px 12px}
dl.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:4px 28px;
  margin:10px 0 0}
dl.facts div{display:flex;gap:10px;border-bottom:1px solid var(--grid);padding:3px 0}
dl.facts dt{color:var(--soft);min-width:8.5em}
dl.facts dd{margin:0;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
table{font-size:.93rem}
th,td{padding:4px 9px;border-bottom:1px solid var(--grid);text-align:right;white-space:nowrap}
th{white-space:normal;vertical-align:bottom}
th{border-bottom:2px solid var(--line);font-weight:600;background:var(--card)}
th.t,td.t{text-align:left}
tbody tr:hover{background:var(--shade)}
table.sortable th{cursor:pointer;user-select:none}
table.sortable th button{all:unset;cursor:pointer;font-weight:600}
table.sortable th button:focus-visible{outline:2px solid var(--link);border-radius:3px}
th .way{display:inline-block;width:.9em;color:var(--soft)}
.tall{max-height:460px;overflow:auto}
.tall thead th{position:sticky;top:0}
tr.method td{font-weight:600}
.good{color:var(--good)}
.bad{color:var(--bad)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:14px;margin-top:10px}
figure{margin:0}
figure.dots svg{max-width:760px}
.chart{border:1px solid var(--grid);border-radius:10px;padding:10px 12px;position:relative}
.chart figcaption{font-size:.86rem}
.chart figcaption b{color:var(--ink);font-size:.95rem}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:11px}
svg .grid{stroke:var(--grid)}
svg .axis{stroke:var(--line)}
svg .cross{stroke:var(--soft);stroke-dasharray:3 3}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.86rem;margin:4px 0 0;padding:0;
  list-style:none}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:5px;
  vertical-align:-1px}
.tip{position:absolute;pointer-events:none;background:var(--card);border:1px solid var(--line);
  border-radius:6px;padding:3px 8px;font-size:.8rem;box-shadow:0 2px 8px #0003;display:none;z-index:2;
  white-space:nowrap}
.panel{margin:14px 0 20px;break-inside:avoid}
.views{display:flex;flex-wrap:wrap;gap:10px}
.view{flex:1 1 220px;max-width:400px}
.view b{display:block;font-size:.86rem;margin-bottom:3px}
.frame{position:relative;background:#000;border-radius:6px;overflow:hidden}
.frame canvas{display:block;width:100%;height:auto;touch-action:pan-y}
.frame span{position:absolute;color:#ffd75f;font-size:11px;text-shadow:0 0 3px #000,0 0 3px #000}
.frame .l{left:4px;top:50%}
.frame .r{right:4px;top:50%}
.frame .u{top:2px;left:50%}
.frame .d{bottom:2px;left:50%}
.controls{display:flex;flex-wrap:wrap;align-items:center;gap:6px 16px;margin:8px 0 2px;font-size:.88rem}
.controls .slide{flex:1 1 260px;position:relative}
.controls input[type=range]{width:100%;margin:0;accent-color:var(--c1)}
.controls canvas{display:block;width:100%;height:16px}
.controls label:not([hidden]){display:inline-flex;align-items:center;gap:6px;white-space:nowrap}
.controls .short{width:90px}
select,button.plain{font:inherit;color:inherit;background:var(--shade);border:1px solid var(--line);
  border-radius:6px;padding:2px 8px}
details{margin:10px 0}
summary{cursor:pointer;color:var(--link)}
footer{color:var(--soft);font-size:.86rem;margin-top:24px}
@media print{:root{--bg:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--grid:#ddd;--shade:#fff}
body{font-size:11px}
nav,.controls,details:not([open]),.tip{display:none}
main{max-width:none;padding:0}
section{border:0;padding:0;margin:12px 0}
.chart,.panel,tr{break-inside:avoid}
.tall{max-height:none}
.frame{-webkit-print-color-adjust:exact;print-color-adjust:exact}
}
"""

SCRIPT = r"""
"use strict";
(() => {
const all = (selector, root) => Array.from((root || document).querySelectorAll(selector));
const short = value => Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3)
  ? value.toExponential(2) : String(+value.toPrecision(4));

// Tables: a click on a heading sorts by it, a second click turns the order round.
for (const table of all("table.sortable")) {
  const heads = all("thead th", table), body = table.tBodies[0];
  const key = cell => cell.dataset.v === undefined ? cell.textContent : cell.dataset.v;
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const text = head.classList.contains("t"), up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) {
      other.removeAttribute("aria-sort");
      other.querySelector(".way").textContent = "";
    }
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    head.querySelector(".way").textContent = up ? "▲" : "▼";
    const rows = Array.from(body.rows).map(row => [key(row.cells[column]), row]);
    rows.sort(([a], [b]) => {
      if (text) return (up ? 1 : -1) * a.localeCompare(b, "en", {numeric: true});
      if (a === "" || b === "") return (a === "") - (b === "");   // undefined values stay at the end
      return (up ? 1 : -1) * (Number(a) - Number(b) || 0);
    });
    body.append(...rows.map(([, row]) => row));
  }));
  const filter = table.closest("section, body").querySelector(`select[data-for="${table.id}"]`);
  if (filter) filter.addEventListener("change", () => {
    for (const row of body.rows) row.hidden = filter.value !== "" && row.dataset.label !== filter.value;
  });
}

// Curves: the values under the mouse.
for (const chart of all(".chart[data-chart]")) {
  const data = JSON.parse(chart.dataset.chart), svg = chart.querySelector("svg");
  const tip = chart.querySelector(".tip"), cross = svg.querySelector(".cross");
  const leave = () => { tip.style.display = "none"; cross.setAttribute("visibility", "hidden"); };
  svg.addEventListener("mouseleave", leave);
  svg.addEventListener("mousemove", event => {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const at = (event.clientX - box.left) / box.width * view.width;
    const x = data.x0 + (at - data.left) / (data.right - data.left) * (data.x1 - data.x0);
    const lines = [];
    let nearest = null;
    for (const series of data.series) {
      let best = -1;
      for (let i = 0; i < series.x.length; i++)
        if (best < 0 || Math.abs(series.x[i] - x) < Math.abs(series.x[best] - x)) best = i;
      if (best < 0) continue;
      lines.push(`${series.name}: ${short(series.y[best])}`);
      if (nearest === null || Math.abs(series.x[best] - x) < Math.abs(nearest - x)) nearest = series.x[best];
    }
    if (nearest === null) return leave();
    const px = data.left + (nearest - data.x0) / ((data.x1 - data.x0) || 1) * (data.right - data.left);
    for (const end of ["x1", "x2"]) cross.setAttribute(end, px);
    cross.setAttribute("visibility", "visible");
    tip.replaceChildren(...[`step ${short(nearest)}`, ...lines].map(line => {
      const item = document.createElement("div"); item.textContent = line; return item; }));
    tip.style.display = "block";
    const left = px / view.width * box.width, room = chart.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(4, Math.min(left + 14, room)) + "px";
    tip.style.top = "44px";
  });
}

// Overlay panels: slices of an image with label maps drawn over it.
const load = source => new Promise((resolve, reject) => {
  const image = new Image();
  image.onload = () => resolve(image);
  image.onerror = () => reject(new Error("an image of this page is damaged"));
  image.src = source;
});
async function panel(root) {
  const data = JSON.parse(root.querySelector("script").textContent);
  const {n, w, h, columns, pitch, rise} = data;
  const sheets = await Promise.all(data.sheets.map(load));
  const small = document.createElement("canvas"); small.width = w; small.height = h;
  const pen = small.getContext("2d", {willReadFrequently: true});
  const tile = (sheet, k) => [sheets[sheet], (k % columns) * pitch, Math.floor(k / columns) * rise, w, h];
  const indices = (sheet, k) => {
    pen.clearRect(0, 0, w, h);
    pen.drawImage(...tile(sheet, k), 0, 0, w, h);
    const pixels = pen.getImageData(0, 0, w, h).data, found = new Uint8Array(w * h);
    for (let i = 0; i < found.length; i++) found[i] = pixels[4 * i];
    return found;
  };
  const fill = (context, map, colour, alpha, width, height) => {
    const layer = pen.createImageData(w, h);
    for (let i = 0; i < map.length; i++) {
      const rgb = colour(map[i]);
      if (rgb) layer.data.set([...rgb, alpha], 4 * i);
    }
    pen.putImageData(layer, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, w, h, 0, 0, width, height);
  };
  const line = (context, x0, y0, x1, y1) => { context.moveTo(x0, y0); context.lineTo(x1, y1); };
  const outline = (context, map, width, height) => {
    const sx = width / w, sy = height / h;
    for (const [value, rgb] of Object.entries(data.colours)) {
      context.beginPath();
      const is = (x, y) => x >= 0 && y >= 0 && x < w && y < h && map[y * w + x] === Number(value);
      for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {
        if (!is(x, y)) continue;
        if (!is(x - 1, y)) line(context, x * sx, y * sy, x * sx, (y + 1) * sy);
        if (!is(x + 1, y)) line(context, (x + 1) * sx, y * sy, (x + 1) * sx, (y + 1) * sy);
        if (!is(x, y - 1)) line(context, x * sx, y * sy, (x + 1) * sx, y * sy);
        if (!is(x, y + 1)) line(context, x * sx, (y + 1) * sy, (x + 1) * sx, (y + 1) * sy);
      }
      context.strokeStyle = `rgb(${rgb})`;
      context.lineWidth = 2;
      context.lineCap = "round";
      context.stroke();
    }
  };
  const slider = root.querySelector("input.slices"), number = root.querySelector("output");
  const style = root.querySelector("select.style"), opacity = root.querySelector("input.opacity");
  const canvases = all(".frame canvas", root);
  const draw = () => {
    const k = Number(slider.value) - 1, alpha = Math.round(255 * Number(opacity.value));
    number.textContent = `slice ${data.numbers[k]} of ${data.total}`;
    data.views.forEach((view, at) => {
      const canvas = canvases[at], context = canvas.getContext("2d"), {width, height} = canvas;
      context.imageSmoothingEnabled = true; context.imageSmoothingQuality = "high";
      context.fillStyle = "#000"; context.fillRect(0, 0, width, height);
      context.drawImage(...tile(view.image, k), 0, 0, width, height);
      if (view.labels !== undefined && style.value !== "none") {
        const map = indices(view.labels, k);
        if (style.value === "outline") outline(context, map, width, height);
        else fill(context, map, value => data.colours[value], alpha, width, height);
      }
      if (view.difference !== undefined && style.value !== "none") {
        const ref = indices(view.difference[0], k), pred = indices(view.difference[1], k);
        const map = ref.map((value, i) => value === pred[i] ? 0 : value === 0 ? 2 : pred[i] === 0 ? 1 : 3);
        fill(context, map, value => data.errors[value - 1], 215, width, height);
      }
    });
  };
  const strip = root.querySelector(".slide canvas"), brush = strip.getContext("2d");
  const peak = Math.max(1, ...data.voxels);
  brush.fillStyle = "#8a94a3";
  data.voxels.forEach((count, k) => {
    const width = strip.width / n, height = count ? Math.max(2, count / peak * strip.height) : 0;
    brush.fillRect(k * width, strip.height - height, Math.max(1, width - 1), height);
  });
  slider.addEventListener("input", draw);
  style.addEventListener("change", draw);
  opacity.addEventListener("input", draw);
  for (const canvas of canvases) canvas.addEventListener("wheel", event => {
    if (event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    slider.value = Number(slider.value) + (event.deltaY > 0 ? 1 : -1);
    draw();
  }, {passive: false});
  draw();
  root.dataset.ready = "1";
}
for (const gallery of all(".gallery")) {
  const choose = gallery.querySelector("select.cases"), items = all(".panel", gallery);
  const show = () => items.forEach((item, at) => { item.hidden = at !== choose.selectedIndex; });
  choose.addEventListener("change", show);
  show();
}
const scrolled = all(".panel").filter(item => item.querySelector("script"));  // the others are plain pictures
Promise.all(scrolled.map(panel)).then(() => { document.documentElement.dataset.ready = "1"; });
})();
"""
