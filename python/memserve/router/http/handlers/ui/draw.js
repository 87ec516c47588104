// Elements, rows and small charts. Values are inserted as text: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; children that are not nodes become text, null is skipped. */
export function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((one) => one !== null && one !== undefined));
  return node;
}

/** Replace a node's children only if what they show has changed, so that selections and focus stay. */
export function show(node, signature, ...children) {
  if (node.dataset.shows === signature) return;
  node.dataset.shows = signature;
  node.replaceChildren(...children.flat());
}

/** Make `body` have one row per item, in order. Rows keep their identity, and with it the focus in them.
 *  cells(item): [{text | nodes, head?, num?, signature?}, ...] */
export function rows(body, items, keyOf, cells) {
  const old = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  const focused = document.activeElement;
  const wanted = items.map((item) => {
    const key = String(keyOf(item));
    const row = old.get(key) ?? el("tr", { "data-key": key });
    old.delete(key);
    const described = cells(item);
    while (row.cells.length < described.length) {
      const cell = described[row.cells.length];
      row.append(cell.head ? el("th", { scope: "row" }) : el("td", { class: cell.num ? "num" : null }));
    }
    described.forEach((cell, i) => {
      const signature = cell.signature ?? String(cell.text);
      show(row.cells[i], signature, ...(cell.nodes ? cell.nodes() : [cell.text]));
    });
    return row;
  });
  for (const gone of old.values()) gone.remove();
  wanted.forEach((row, i) => {
    if (body.rows[i] !== row) body.insertBefore(row, body.rows[i] ?? null);
  });
  if (focused && focused !== document.activeElement && body.contains(focused)) focused.focus({ preventScroll: true });
}

/** A line of values over time, null where there is none, from 0 to at least `least`; decoration for a number. */
export function sparkline(values, least, slots) {
  const width = 240, height = 48, top = 3;
  const most = Math.max(least, ...values.filter((one) => one !== null));
  const start = slots - values.length;
  const x = (i) => ((start + i) / (slots - 1)) * width;
  const y = (value) => height - 1 - (value / most) * (height - 1 - top);
  const runs = [];
  let run = null;
  values.forEach((value, i) => {
    if (value === null) run = null;
    else {
      if (!run) runs.push((run = []));
      run.push([x(i), y(value)]);
    }
  });
  const at = (points) => points.map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join(" L");
  const chart = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", class: "spark", "aria-hidden": "true",
  });
  chart.append(svg("path", { class: "base", d: `M0,${height - 0.5} H${width}` }));
  for (const points of runs) {
    const [first, last] = [points[0], points[points.length - 1]];
    if (points.length === 1) points.push([first[0] + 1, first[1]]);
    chart.append(svg("path", { class: "area", d: `M${first[0].toFixed(1)},${height} L${at(points)} L${last[0].toFixed(1)},${height} Z` }));
    chart.append(svg("path", { class: "line", d: `M${at(points)}` }));
  }
  return chart;
}

/** A bar of `value` within `most`, beside its text. Drawn as SVG: its length is no style, which the page's policy refuses. */
export function bar(value, most, text, kind = "") {
  const length = most > 0 ? Math.min(100, (100 * value) / most) : 0;
  return el("span", { class: "meter" },
    svg("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true", class: `bar ${kind}` },
      svg("rect", { class: "track", width: 100, height: 8 }),
      svg("rect", { class: "fill", width: length.toFixed(2), height: 8 })),
    el("span", { class: "meter-text" }, text));
}

/** Parts of a whole side by side: [[amount, kind], ...] of `most`. */
export function stack(parts, most) {
  let at = 0;
  const chart = svg("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true", class: "bar stack" },
    svg("rect", { class: "track", width: 100, height: 8 }));
  for (const [amount, kind] of parts) {
    const width = most > 0 ? (100 * amount) / most : 0;
    chart.append(svg("rect", { class: kind, x: at.toFixed(2), width: width.toFixed(2), height: 8 }));
    at += width;
  }
  return chart;
}

/** A state as a mark and a word: not every reader can tell the colours apart. */
export function badge(text, kind) {
  const marks = { good: "●", warn: "▲", bad: "✕", idle: "○" };
  return el("span", { class: `badge ${kind}` }, el("span", { "aria-hidden": "true" }, marks[kind] ?? "○"), ` ${text}`);
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.0995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 0.9995) return `${(value * 1000).toFixed(0)} ms`;
  return value < 120 ? `${value.toFixed(value < 9.995 ? 2 : 1)} s` : `${(value / 60).toFixed(1)} min`;
}

export function count(value) {
  if (value === null || value === undefined) return "–";
  return value >= 1e6 ? `${(value / 1e6).toFixed(1)} M` : value >= 1e5 ? `${(value / 1e3).toFixed(0)} k` : value.toLocaleString("en");
}

export function percent(value) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
}

export function duration(total) {
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const [size, name] = units.find(([unit]) => total >= unit) ?? [1, "s"];
  return `${Math.floor(total / size)} ${name}`;
}
