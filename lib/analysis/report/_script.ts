/**
 * The script of the page: tables that sort and filter, charts, the theme. Plain JavaScript as text, so that
 * every runtime writes the same bytes. All text goes into the page as text nodes, never as markup.
 */
export const REPORT_SCRIPT = String.raw`
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };

  // Tables: columns arrive as arrays, texts that repeat as indices into a list.
  const STEP = 100;
  const special = { NaN: NaN, Infinity: Infinity, "-Infinity": -Infinity };
  const decode = ({ type, values, words }) =>
    words !== undefined
      ? values.map((index) => index === null ? null : words[index])
      : type === "number" || type === "integer"
      ? values.map((value) => typeof value === "string" ? special[value] : value)
      : values;
  const isNumeric = (type) => type === "number" || type === "integer";
  const show = (type, value, digits) => {
    if (value === null) return "-";
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (typeof value !== "number") return String(value);
    if (!Number.isFinite(value)) return String(value);
    if (digits !== undefined) return value.toFixed(digits);
    if (type === "integer") return String(value).replace(/\B(?=(\d{3})+$)/g, " ");
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-4 || size >= 1e7) ? value.toExponential(3) : String(Number(value.toPrecision(5)));
  };
  // Absent values and NaN last, whichever way.
  const compare = (direction) => (a, b) => {
    const late = (value) => value === null || Number.isNaN(value);
    if (late(a) || late(b)) return Number(late(a)) - Number(late(b));
    if (typeof a === "string" && typeof b === "string") return direction * a.localeCompare(b, "en", { numeric: true });
    return direction * (Number(a) - Number(b));
  };
  const conditions = (text, names, columns) =>
    text.trim().split(/\s+/).filter(Boolean).map((word) => {
      const [, name, operator, wanted] = /^([A-Za-z]\w*)(>=|<=|>|<|=|:)(.+)$/.exec(word) ?? [];
      const column = columns[names.findIndex((known) => known.toLowerCase() === name?.toLowerCase())];
      if (column === undefined) {
        const part = word.toLowerCase();
        return (row) => columns.some((own) => typeof own.values[row] === "string" && own.values[row].startsWith("data:") ? false : String(own.values[row] ?? "").toLowerCase().includes(part));
      }
      const number = Number(wanted);
      return (row) => {
        const value = column.values[row];
        if (value === null) return false;
        if (operator === ":" || operator === "=" && typeof value !== "number") {
          const own = String(value).toLowerCase();
          return operator === ":" ? own.includes(wanted.toLowerCase()) : own === wanted.toLowerCase();
        }
        return operator === "=" ? value === number : operator === ">=" ? value >= number : operator === "<=" ? value <= number : operator === ">" ? value > number : value < number;
      };
    });
  const table = (place) => {
    const source = data.tables[place.dataset.table];
    const columns = source.columns.map((column) => ({ ...column, values: decode(column) }));
    const names = columns.map(({ name }) => name);
    const rows = Array.from({ length: source.rows }, (_, i) => i);
    let order = rows, sorted = null, direction = 1, limit = STEP, filter = "";
    const body = element("tbody");
    const count = element("span", { className: "muted" });
    const more = element("button", { type: "button", textContent: "Show more" });
    const headers = columns.map((column, i) => {
      const button = element("button", { type: "button", title: column.doc ?? "" }, column.title);
      if (column.unit) button.append(element("small", { textContent: column.unit }));
      const header = element("th", { scope: "col", className: isNumeric(column.type) ? "number" : "" }, button);
      header.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        direction = sorted === i ? -direction : 1;
        sorted = i;
        limit = STEP;
        draw();
      });
      return header;
    });
    const cell = (column, row) => {
      const value = column.values[row];
      const made = element("td", { className: (isNumeric(column.type) ? "number" : "") + (value === null ? " absent" : "") });
      if (typeof value === "string" && /^data:image\/png;base64,[A-Za-z0-9+/=]*$/.test(value)) {
        made.append(element("img", { src: value, alt: "sample" }));
      } else if (value === "met" || value === "MISSED") {
        made.append(element("span", { className: value === "met" ? "met" : "missed", textContent: value }));
      } else made.textContent = show(column.type, value, column.digits);
      return made;
    };
    const draw = () => {
      const wanted = conditions(filter, names, columns);
      order = rows.filter((row) => wanted.every((condition) => condition(row)));
      if (sorted !== null) {
        const { values } = columns[sorted], by = compare(direction);
        order.sort((a, b) => by(values[a], values[b]) || a - b);
      }
      body.replaceChildren(...order.slice(0, limit).map((row) => element("tr", {}, ...columns.map((column) => cell(column, row)))));
      headers.forEach((header, i) => header.setAttribute("aria-sort", sorted !== i ? "none" : direction > 0 ? "ascending" : "descending"));
      count.textContent = order.length + " of " + (source.total ?? source.rows) + " rows" + (limit < order.length ? ", " + limit + " shown" : "");
      more.hidden = limit >= order.length;
    };
    more.addEventListener("click", () => {
      limit += 5 * STEP;
      draw();
    });
    const input = element("input", { type: "search", placeholder: "filter: words, or column>0.5", ariaLabel: "Filter rows" });
    input.addEventListener("input", () => {
      filter = input.value;
      limit = STEP;
      draw();
    });
    const scroll = element("div", { className: "scroll", tabIndex: 0 }, element("table", {}, element("thead", {}, element("tr", {}, ...headers)), body));
    place.append(element("div", { className: "tools" }, input, count, more), scroll);
    draw();
  };
  // A table is built when it is first opened: thousands of rows nobody looks at cost nothing.
  for (const place of document.querySelectorAll("[data-table]")) {
    const details = place.closest("details");
    const build = () => {
      if (place.childElementCount === 0) table(place);
    };
    if (details === null || details.open) build();
    else details.addEventListener("toggle", build, { once: true });
  }

  // Charts.
  const isDark = () =>
    document.documentElement.dataset.theme === "dark" ||
    document.documentElement.dataset.theme === undefined && matchMedia("(prefers-color-scheme: dark)").matches;
  let drawing = 0;
  const drawCharts = async () => {
    const turn = ++drawing;
    const theme = data.themes[isDark() ? "dark" : "light"];
    // A narrow page has no room for four names side by side.
    const isNarrow = innerWidth < 600;
    const config = isNarrow ? { ...theme, legend: { ...theme.legend, columns: 2, gradientLength: 180 }, axis: { ...theme.axis, labelLimit: 120 } } : theme;
    // Charts one below the other have no width "container": theirs is the place's, less names and an axis.
    const fitted = (spec, place) => {
      if (spec.vconcat === undefined) return spec;
      const width = Math.min(900, Math.max(150, place.clientWidth - (isNarrow ? 150 : 260)));
      return { ...spec, vconcat: spec.vconcat.map((part) => part.width === data.fittedWidth ? { ...part, width } : part) };
    };
    for (const place of document.querySelectorAll("[data-chart]")) {
      if (turn !== drawing) return;
      try {
        place.vegaView?.finalize();
        const { view } = await vegaEmbed(place, fitted(data.charts[place.dataset.chart], place), {
          config,
          ast: true,
          renderer: "svg",
          mode: "vega-lite",
          actions: { export: true, source: false, compiled: false, editor: false },
          downloadFileName: place.dataset.name,
          tooltip: { theme: isDark() ? "dark" : "light" },
        });
        place.vegaView = view;
      } catch (error) {
        place.textContent = "This chart could not be drawn: " + error.message;
        place.classList.add("failed");
        console.error(error);
      }
    }
    if (turn === drawing) document.documentElement.dataset.charts = "drawn";
  };
  document.getElementById("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    drawCharts();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
  drawCharts();
})();
`.trim();
