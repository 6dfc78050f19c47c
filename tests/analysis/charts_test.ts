import { describe, expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { ADVANCES, textWidth } from "../../lib/analysis/_text_widths.ts";
import { shortNames } from "../../lib/analysis/_chart.ts";
import { themeColours, THEMES } from "../../lib/analysis/_theme.ts";
import * as charts from "../../lib/analysis/charts/mod.ts";
import { renderPng, renderSvg } from "../../lib/analysis/render.ts";
import { columnsOf, type RowOf, TABLE_NAMES, type TableName } from "../../lib/analysis/schema.ts";
import { chartsOf } from "../../lib/analysis/run_charts.ts";
import { tableFromRows, type TableLike } from "../../lib/analysis/tables.ts";
import { denoBinary } from "../_deno.ts";
import { isDeno } from "../_checkpoints.ts";
import { digests, everyChart } from "./_charts.ts";
import { layerRows, peerRows, syntheticTables, timeRows } from "./_synthetic.ts";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const DRAW = {
  layers: [charts.errorByLayer],
  time: [charts.errorOverTime, charts.transitionKl, charts.timeParameters],
  phases: [charts.phasesAgainstBaseline],
  peers: [charts.accuracyByBits],
  kernels: [charts.kernelRoofline, charts.kernelThroughput],
  samples: [charts.sampleSheet],
  drift: [charts.trajectoryDrift],
  losses: [charts.lossHistory],
  codes: [charts.codeHistogram],
} satisfies Record<(typeof TABLE_NAMES)[number], ((table: TableLike) => charts.Spec)[]>;

/** Every object inside a specification. */
function* objectsIn(value: charts.Json): Generator<{ readonly [key: string]: charts.Json }> {
  if (typeof value !== "object" || value === null) return;
  if (Array.isArray(value)) {
    for (const item of value) yield* objectsIn(item);
    return;
  }
  const object = value as { readonly [key: string]: charts.Json };
  yield object;
  for (const [key, item] of Object.entries(object)) if (key !== "values") yield* objectsIn(item);
}

const textsOf = (svg: string) => [...svg.matchAll(/<text[^>]*>([^<]*)<\/text>/g)].map(([, text]) => text!);

describe("every chart", () => {
  test("is drawn without a warning in both themes, with its title", async () => {
    for (const [name, spec] of Object.entries(await everyChart())) {
      for (const theme of THEMES) {
        const svg = await renderSvg(spec, { theme });
        const { text } = spec["title"] as { text: string };
        expect([name, svg.includes(text), svg.includes(themeColours(theme).background)]).toEqual([
          name,
          true,
          true,
        ]);
        expect([name, /NaN|undefined|Infinity/.test(svg.replace(/aria-label="[^"]*"/g, ""))]).toEqual([
          name,
          false,
        ]);
      }
    }
  });

  test("says a unit on every quantitative axis, and every colour comes from the theme", async () => {
    let axes = 0;
    for (const [name, spec] of Object.entries(await everyChart())) {
      for (const object of objectsIn(spec)) {
        for (const channel of ["x", "y"]) {
          const encoded = object[channel] as { type?: string; axis?: { title?: string } } | undefined;
          if (encoded?.type !== "quantitative" || encoded.axis?.title === undefined) continue;
          axes++;
          const { title } = encoded.axis;
          expect([name, title, /\(.+\)|a second|^code$/.test(title)]).toEqual([name, title, true]);
        }
        for (const value of Object.values(object)) {
          expect([name, typeof value === "string" && /^#[0-9a-f]{3,8}$/i.test(value)]).toEqual([name, false]);
        }
      }
    }
    expect(axes).toBeGreaterThan(20);
  });

  test("of an empty table is a chart that says so", async () => {
    for (const name of TABLE_NAMES) {
      for (const draw of DRAW[name]) {
        const texts = textsOf(await renderSvg(draw(await tableFromRows(name, []))));
        expect([draw.name, texts.some((text) => /^no .* in the table$/.test(text))]).toEqual([
          draw.name,
          true,
        ]);
      }
    }
  });

  test("of another table is refused with the columns it lacks", async () => {
    const drift = await tableFromRows("drift", []);
    for (const [name, draws] of Object.entries(DRAW)) {
      if (name === "drift") continue;
      for (const draw of draws) {
        expect(() => draw(drift)).toThrow(/^Cannot draw .*: the table must have columns .*, lacks /);
      }
    }
  });

  test("has the same bytes in Bun and in Deno", async () => {
    const deno = denoBinary();
    if (isDeno || deno === undefined) {
      console.log(`skipped: ${isDeno ? "Bun's tests start Deno, not the other way round" : "no Deno"}`);
      return;
    }
    const here = await digests();
    const program = join(ROOT, "tests/analysis/_charts.ts");
    const importMap = `--import-map=${join(ROOT, "tests/deno/import_map.json")}`;
    const { stdout, stderr } = spawnSync(deno, [
      "run",
      "-A",
      "--no-check",
      importMap,
      program,
    ], {
      encoding: "utf8",
    });
    expect(stderr).toBe("");
    expect(Object.keys(here).length).toBeGreaterThan(20);
    expect(JSON.parse(stdout)).toEqual(here);
  });
});

describe("awkward values", () => {
  test("NaN and infinities are counted, not drawn", async () => {
    const rows = layerRows(12).map((row, i) =>
      i === 0 ? { ...row, relativeRmsError: NaN } : i === 1 ? { ...row, relativeRmsError: Infinity } : row
    );
    const svg = await renderSvg(charts.errorByLayer(await tableFromRows("layers", rows)));
    expect(svg).toContain("2 values are NaN or infinite and not drawn");
    const only = timeRows().map((row) => ({ ...row, stepKl: NaN, kl: null, relativeError: -Infinity }));
    const table = await tableFromRows("time", only);
    expect(await renderSvg(charts.transitionKl(table))).toContain("no errors of a whole model in the table");
  });

  test("whatever may be absent is: no chart stumbles, and no axis is without an extent", async () => {
    const drawn = new Set<string>(); // a column that a chart does not read leaves it as it was
    for (const [name, table] of Object.entries(await syntheticTables()) as [TableName, TableLike][]) {
      const schema = columnsOf(name);
      const optional = Object.keys(schema).filter((column) => schema[column]!.required !== true);
      const without = async (isAbsent: (column: string) => boolean) =>
        await tableFromRows(
          name,
          (table.objects() as Record<string, unknown>[]).map((row) =>
            Object.fromEntries(
              Object.entries(row).map((
                [key, value],
              ) => [key, optional.includes(key) && isAbsent(key) ? null : value]),
            )
          ) as RowOf<typeof name>[],
        );
      const tables = [
        await without(() => true),
        await without((column) => /(?:Low|High)$/.test(column)),
        await without((column) => column.endsWith("High")),
        ...await Promise.all(optional.map((own) => without((column) => column === own))),
        ...await Promise.all(optional.map((own) => without((column) => column !== own))),
      ];
      for (const changed of tables) {
        for (const { spec } of chartsOf({ [name]: changed })) {
          const text = JSON.stringify(spec);
          if (drawn.has(text)) continue;
          drawn.add(text);
          await renderSvg(spec);
        }
      }
    }
    expect(drawn.size).toBeGreaterThan(80);
  }, 120_000);

  test("zeros and negative values keep a linear scale; values over decades get a logarithm", async () => {
    const scaleOf = async (kl: readonly number[]) => {
      const rows = peerRows().slice(1, 1 + kl.length).map((row, i) => ({
        ...row,
        kl: kl[i]!,
        klLow: null,
        klHigh: null,
      }));
      const spec = charts.accuracyByBits(await tableFromRows("peers", rows), { metric: "kl" });
      const found = [...objectsIn(spec)].map((object) =>
        object["y"] as { scale?: { type?: string } } | undefined
      );
      return found.find((y) => y?.scale !== undefined)?.scale?.type;
    };
    expect(await scaleOf([0.001, 0.01, 1])).toBe("log");
    expect(await scaleOf([0, 0.01, 1])).toBe(undefined);
    expect(await scaleOf([0.5, 0.6, 1])).toBe(undefined);
  });

  test("10 000 layers become a picture of bounded size", async () => {
    const table = await tableFromRows("layers", layerRows(10_000));
    const spec = charts.errorByLayer(table);
    expect(JSON.stringify(spec).length).toBeLessThan(60_000);
    const svg = await renderSvg(spec);
    expect(svg.length).toBeLessThan(100_000);
    expect(svg).toContain("8334 layers: line and band are median and range of 28 neighbours");
  });

  test("one row, hostile and long names, several models", async () => {
    const [row] = layerRows(1);
    const one = await renderSvg(charts.errorByLayer(await tableFromRows("layers", [row!])));
    expect(one).toContain("relative RMS error");
    const hostile = `</text><script>alert(1)</script>${"x".repeat(3000)}`;
    const svg = await renderSvg(
      charts.errorByLayer(await tableFromRows("layers", [{ ...row!, name: hostile }])),
    );
    expect(svg).not.toContain("<script");
    const two = [...peerRows(), ...peerRows().map((each) => ({ ...each, model: "other" }))];
    expect(textsOf(await renderSvg(charts.accuracyByBits(await tableFromRows("peers", two))))).toContain(
      "other",
    );
  });

  test("what is not Vega-Lite is refused", async () => {
    const message = await renderSvg({ mark: "dodo", data: { values: [] } }).catch((error) => error.message);
    expect(message).toMatch(/^Cannot draw: /);
    expect(await renderPng({}, { zoom: 0 }).catch((error) => error.message)).toBe(
      "Cannot draw: zoom must lie in (0, 8], got 0",
    );
  });
});

describe("what a reader must be able to tell", () => {
  test("settings beyond the palette: a colour that comes again has another shape", async () => {
    const rows = Array.from({ length: 20 }, (_, i): RowOf<"time"> => ({
      model: "m",
      setting: `setting ${i}`,
      tUnit: "timestep",
      tBegin: 0,
      tEnd: 1,
      stepKl: 1 + i,
    }));
    const svg = await renderSvg(charts.transitionKl(await tableFromRows("time", rows)));
    const symbols = svg.matchAll(
      /role-legend-symbol"[^>]*><path transform="[^"]*" d="([^"]+)" fill="(#\w+)"/g,
    );
    const looks = [...symbols].map(([, shape, colour]) => `${shape} ${colour}`);
    expect(looks.length).toBe(20);
    expect(new Set(looks).size).toBe(20);
  });

  test("names on the front do not cover one another", async () => {
    const row = (method: string, bitsPerWeight: number, kl: number): RowOf<"peers"> => ({
      model: "m",
      method,
      library: "arrowquant",
      bitsPerWeight,
      task: "all",
      kl,
    });
    const rows = [
      row("a long name", 2, 1),
      row("close by", 2.05, 0.98),
      row("below", 2.1, 0.1),
      row("far", 8, 0.001),
    ];
    const texts = textsOf(await renderSvg(charts.accuracyByBits(await tableFromRows("peers", rows))));
    const times = (name: string) => texts.filter((text) => text === name).length;
    // Each is drawn twice: first as its own background.
    expect(["a long name", "close by", "below", "far"].map(times)).toEqual([2, 0, 2, 2]);
  });

  test("heat maps one below the other have one scale of colours", async () => {
    const rows = ["a", "b"].flatMap((setting, s) =>
      [0, 1, 2].map((g): RowOf<"time"> => ({
        model: "m",
        setting,
        layer: "l.weight",
        timeGroup: g,
        tUnit: "mask ratio",
        tBegin: g / 3,
        tEnd: (g + 1) / 3,
        relativeError: 10 ** -(s * 2 + g),
      }))
    );
    const spec = charts.errorOverTime(await tableFromRows("time", rows));
    const domains = [...objectsIn(spec)].flatMap(({ scale }) =>
      (scale as { scheme?: string } | undefined)?.scheme === undefined
        ? []
        : [(scale as { domain?: number[] }).domain]
    );
    expect(domains).toEqual([[1e-4, 1], [1e-4, 1]]);
  });

  test("time parameters: the layer that smoothing changed most, and its boundary from near", async () => {
    const theta = (
      layer: string,
      stage: string,
      tBegin: number,
      tEnd: number,
      scale: number,
    ): RowOf<"time"> => ({
      model: "m",
      setting: "2 bits",
      layer,
      stage,
      tUnit: "timestep",
      tBegin,
      tEnd,
      scale,
      zeroPoint: 8,
      activationLow: -8 * scale,
      activationHigh: 7 * scale,
    });
    const calm = ["before", "after"].map((stage) => theta("calm", stage, 0, 1000, 1));
    const wild = [theta("wild", "before", 0, 500, 1), theta("wild", "before", 500, 1000, 9)];
    const kept = [theta("wild", "after", 0, 500, 1), theta("wild", "after", 500, 1000, 9)];
    const step = [theta("step", "before", 0, 500, 1), theta("step", "before", 500, 1000, 3)];
    const smooth = [
      theta("step", "after", 0, 490, 1),
      theta("step", "after", 490, 500, 2),
      theta("step", "after", 500, 1000, 3),
    ];
    const table = await tableFromRows("time", [...calm, ...wild, ...kept, ...step, ...smooth]);
    const svg = await renderSvg(charts.timeParameters(table));
    expect(textsOf(svg)).toContain("step");
    const near = charts.timeParameters(table, { isClose: true });
    const times = [...objectsIn(near)].flatMap(({ data }) => {
      const { values } = (data ?? { values: [] }) as unknown as {
        values: { tBegin?: number; tEnd?: number }[];
      };
      return values.flatMap(({ tBegin, tEnd }) => tBegin === undefined ? [] : [tBegin, tEnd!]);
    });
    expect([Math.min(...times), Math.max(...times)]).toEqual([475, 525]);
    expect(textsOf(await renderSvg(near))).toContain("timestep t (steps)");
    const unsmoothed = await tableFromRows("time", wild);
    expect(textsOf(await renderSvg(charts.timeParameters(unsmoothed)))).toContain("wild");
    expect(textsOf(await renderSvg(charts.timeParameters(unsmoothed, { isClose: true })))).toContain(
      "no smoothed boundary in the table",
    );
  });
});

describe("Pareto front", () => {
  const front = (points: readonly (readonly [number, number])[], higher = true) =>
    charts.frontOf(points, ([bits]) => bits, ([, value]) => value, higher);

  test("keeps what nothing else beats", () => {
    expect(front([[4, 0.9], [2, 0.5], [3, 0.4], [2, 0.6], [8, 0.9]])).toEqual([[2, 0.6], [4, 0.9]]);
    expect(front([[4, 0.1], [2, 0.5], [3, 0.7]], false)).toEqual([[2, 0.5], [4, 0.1]]);
    expect(front([])).toEqual([]);
  });
});

describe("names on an axis", () => {
  test("lose what all have in common, never what tells them apart", () => {
    expect([...shortNames(["model.layers.0.q.weight", "model.layers.1.q.weight"]).values()]).toEqual([
      "0.q",
      "1.q",
    ]);
    expect([...shortNames(["a.weight", "a"]).values()]).toEqual(["a.weight", "a"]);
    expect([...shortNames(["model.head.weight"]).values()]).toEqual(["model.head"]);
    const blocks = Array.from({ length: 12 }, (_, i) => `blocks.${i}.attn.weight`);
    expect([...shortNames([...blocks, "head.weight"]).values()].slice(-2)).toEqual(["11.attn", "head"]);
    expect([...shortNames(["x.a", "x.b", "a"]).values()]).toEqual(["x.a", "x.b", "a"]);
    expect([...shortNames(["a.b", "a.b.c"]).values()]).toEqual(["b", "b.c"]);
  });
});

describe("pixels", () => {
  test("have text from the font that comes along, at the size asked for", async () => {
    const spec: charts.Spec = {
      $schema: "https://vega.github.io/schema/vega-lite/v6.json",
      width: 200,
      height: 40,
      data: { values: [{ text: "Σ‖ŷ−y‖² ≤ 0.5 ✓" }] },
      mark: { type: "text", fontSize: 20 },
      encoding: { text: { field: "text", type: "nominal" } },
    };
    const size = (png: Uint8Array) => {
      const view = new DataView(png.buffer, png.byteOffset);
      return [view.getUint32(16), view.getUint32(20)];
    };
    const [one, two] = [await renderPng(spec, { zoom: 1 }), await renderPng(spec, { zoom: 2 })];
    expect(size(two)).toEqual(size(one).map((side) => 2 * side));
    const without = await renderPng({ ...spec, data: { values: [{ text: "" }] } }, { zoom: 1 });
    expect(one.length).toBeGreaterThan(without.length + 500);
  });

  test("widths are those of the font's own table", () => {
    const path = createRequire(import.meta.url).resolve("dejavu-fonts-ttf/ttf/DejaVuSans.ttf");
    expect([...ADVANCES]).toEqual(fontAdvances(readFileSync(path), 32, ADVANCES.length));
    expect(textWidth("mm", 2048)).toBe(2 * ADVANCES["m".charCodeAt(0) - 32]!);
    expect(textWidth("層", 10)).toBe(10);
  });
});

describe("palette", () => {
  /** Machado, Oliveira, Fernandes 2009, severity 1. */
  const SEEN = {
    normal: [1, 0, 0, 0, 1, 0, 0, 0, 1],
    protanopia: [0.152286, 1.052583, -0.204868, 0.114503, 0.786281, 0.099216, -0.003882, -0.048116, 1.051998],
    deuteranopia: [0.367322, 0.860646, -0.227968, 0.280085, 0.672501, 0.047413, -0.01182, 0.04294, 0.968881],
    tritanopia: [1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602, 0.004733, 0.691367, 0.3039],
  };
  const linear = (hex: string) =>
    [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255).map((v) =>
      v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
    );
  const multiply = (m: readonly number[], v: readonly number[]) =>
    [0, 3, 6].map((row) => m[row]! * v[0]! + m[row + 1]! * v[1]! + m[row + 2]! * v[2]!);
  const lab = (rgb: readonly number[]) => {
    const xyz = multiply([0.4124, 0.3576, 0.1805, 0.2126, 0.7152, 0.0722, 0.0193, 0.1192, 0.9505], rgb);
    const [x, y, z] = xyz.map((v, i) => v / [0.9505, 1, 1.089][i]!).map((v) =>
      v > 0.008856 ? Math.cbrt(v) : 7.787 * v + 16 / 116
    );
    return [116 * y! - 16, 500 * (x! - y!), 200 * (y! - z!)];
  };
  const luminance = (hex: string) =>
    0.2126 * linear(hex)[0]! + 0.7152 * linear(hex)[1]! + 0.0722 * linear(hex)[2]!;
  const contrast = (a: string, b: string) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high! + 0.05) / (low! + 0.05);
  };

  test("the first four colours differ for every kind of sight, and text is readable", () => {
    for (const theme of THEMES) {
      const { background, text, muted, categories } = themeColours(theme);
      expect(contrast(text, background)).toBeGreaterThan(7);
      expect(contrast(muted, background)).toBeGreaterThan(4.5);
      for (const [sight, matrix] of Object.entries(SEEN)) {
        const seen = categories.slice(0, 4).map((hex) =>
          lab(multiply(matrix, linear(hex)).map((v) => Math.min(1, Math.max(0, v))))
        );
        for (let i = 0; i < seen.length; i++) {
          expect([theme, categories[i], contrast(categories[i]!, background) > 2.5]).toEqual([
            theme,
            categories[i],
            true,
          ]);
          for (let j = 0; j < i; j++) {
            const distance = Math.hypot(...seen[i]!.map((value, k) => value - seen[j]![k]!));
            expect([theme, sight, categories[i], categories[j], distance > 10]).toEqual([
              theme,
              sight,
              categories[i],
              categories[j],
              true,
            ]);
          }
        }
      }
    }
  });
});

/** Advances of characters, from a TrueType font's `cmap` (format 4) and `hmtx`. */
function fontAdvances(file: Uint8Array, first: number, count: number): number[] {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const tables = new Map(
    Array.from({ length: view.getUint16(4) }, (_, i) => {
      const at = 12 + 16 * i;
      return [new TextDecoder().decode(file.subarray(at, at + 4)), view.getUint32(at + 8)] as const;
    }),
  );
  const cmap = tables.get("cmap")!, hmtx = tables.get("hmtx")!;
  const metrics = view.getUint16(tables.get("hhea")! + 34);
  const record = Array.from({ length: view.getUint16(cmap + 2) }, (_, i) => cmap + 4 + 8 * i)
    .find((at) => view.getUint16(at) === 3 && view.getUint16(at + 2) === 1)!;
  const map = cmap + view.getUint32(record + 4);
  const segments = view.getUint16(map + 6) / 2;
  return Array.from({ length: count }, (_, i) => {
    const code = first + i;
    const segment = Array.from({ length: segments }, (_, s) => s).find((s) =>
      code <= view.getUint16(map + 14 + 2 * s)
    )!;
    const start = view.getUint16(map + 16 + 2 * segments + 2 * segment);
    const delta = view.getInt16(map + 16 + 4 * segments + 2 * segment);
    const place = map + 16 + 6 * segments + 2 * segment;
    const offset = view.getUint16(place);
    const glyph = offset === 0
      ? (code + delta) & 0xffff
      : view.getUint16(place + offset + 2 * (code - start));
    return view.getUint16(hmtx + 4 * Math.min(glyph, metrics - 1));
  });
}

test("charts have no control characters of names, which no XML may have", async () => {
  const rows = layerRows(4).map((row, i) => ({ ...row, name: `\x1b]0;x\x07${i}.weight` }));
  const svg = await renderSvg(charts.errorByLayer(await tableFromRows("layers", rows)));
  // deno-lint-ignore no-control-regex
  expect(svg.match(/[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]/)).toBe(null);
});
