import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { fitted, pageTable } from "../../lib/analysis/report/_data.ts";
import { escapeHtml } from "../../lib/analysis/report/escape.ts";
import { reportHtml, reportMarkdown, reportText } from "../../lib/analysis/report/mod.ts";
import { readRun, type Run, writeRun } from "../../lib/analysis/run.ts";
import { chartsOf } from "../../lib/analysis/run_charts.ts";
import { tableFromRows } from "../../lib/analysis/tables.ts";
import { isDeno, MODELS, run } from "../_checkpoints.ts";
import { Browser, findChromium, type Page } from "./_browser.ts";
import { layerRows, syntheticTables } from "./_synthetic.ts";

const HOSTILE =
  `</script><script>window.hacked = 1</script><img src=x onerror="window.hacked=1"> "' & \u202e |`;

let folder: string;
const place = (name: string) => join(folder, name);

/** Synthetic: nothing in it was measured. */
const runOf = (changes: Partial<Run> = {}): Run => ({
  name: "run",
  title: "synthetic",
  command: "none: a test made this",
  date: "2026-01-02T03:04:05.000Z",
  seconds: 12.5,
  toolVersion: "0.1.0",
  environment: { runtime: "test", cores: 2 },
  configuration: { bits: 2, nested: { threshold: 0.5 } },
  summary: [{ label: "bits per weight", value: "2.5 bits" }],
  sections: [{
    title: "Section",
    notes: ["A note."],
    columns: [{ key: "name", title: "name" }, { key: "value", title: "value", digits: 2 }],
    rows: [{ name: "b", value: 1 }, { name: "a", value: 2.345 }, { name: "c", value: null }],
  }],
  goals: [{ goal: "goal", wanted: "≥ 1", measured: "2", met: true }, {
    goal: "other",
    wanted: "≥ 1",
    measured: null,
    met: null,
    reason: "no",
  }],
  skipped: [{ what: "thing", reason: "not here" }],
  tables: {},
  ...changes,
});

const message = async (promise: Promise<unknown>): Promise<string> => {
  try {
    await promise;
  } catch (error) {
    return `${(error as { code?: string }).code}: ${(error as Error).message}`;
  }
  throw new Error("nothing was thrown");
};

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "arrowquant-report-"));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

describe("run folder", () => {
  test("comes back as it was written", async () => {
    const written = runOf({ name: "whole", tables: await syntheticTables() });
    await writeRun(place("whole"), written);
    const read = await readRun(place("whole"));
    expect({ ...read, tables: null }).toEqual({ ...written, tables: null });
    expect(Object.keys(read.tables).sort()).toEqual(Object.keys(written.tables).sort());
    for (const [name, table] of Object.entries(written.tables)) {
      expect(read.tables[name as "layers"]!.objects()).toEqual(table.objects());
    }
  });

  test("what is not one is refused with path and reason", async () => {
    await writeRun(place("good"), runOf({ tables: { layers: await tableFromRows("layers", layerRows(3)) } }));
    const broken = async (change: (run: Record<string, unknown>) => void) => {
      cpSync(place("good"), place("bad"), { recursive: true });
      const file = join(place("bad"), "run.json");
      const value = JSON.parse(readFileSync(file, "utf8"));
      change(value);
      writeFileSync(file, JSON.stringify(value));
      const text = await message(readRun(place("bad")));
      rmSync(place("bad"), { recursive: true });
      expect(text).toContain(JSON.stringify(join(place("bad"), "run.json")));
      return text.replace(/^.*run\.json": /, "");
    };
    expect(await broken((run) => run["formatVersion"] = 2)).toBe(
      "formatVersion must be 1 for this version (0.1.0), got 2",
    );
    expect(await broken((run) => run["format"] = "other")).toBe(
      'format must be "arrowquant-run", got "other"',
    );
    expect(await broken((run) => delete run["tables"])).toBe("tables must be an object, got nothing");
    expect(await broken((run) => run["sections"] = [{ title: 1 }])).toBe(
      "sections[0].title must be a text, got 1",
    );
    expect(await broken((run) => run["tables"] = { layers: { file: "../../etc/passwd", rows: 3 } })).toBe(
      'tables.layers.file must be "tables/layers.parquet", got "../../etc/passwd"',
    );
    expect(await broken((run) => run["tables"] = { layers: { file: "tables/layers.parquet", rows: 4 } }))
      .toBe(
        "tables.layers.rows must be the 3 rows that the file has, got 4",
      );
    expect(await broken((run) => run["tables"] = { __proto__: null, secrets: {} })).toContain(
      "tables must be some of layers",
    );
    expect(await broken((run) => (run["sections"] as { rows: unknown[] }[])[0]!.rows = [{ name: ["x"] }]))
      .toContain(
        "sections[0].rows[0].name must be no list or object",
      );
  });

  test("missing columns, cut files, folders without a run", async () => {
    await writeRun(
      place("short"),
      runOf({ tables: { layers: await tableFromRows("layers", layerRows(3)) } }),
    );
    const table = join(place("short"), "tables", "layers.parquet");
    const bytes = readFileSync(table);
    writeFileSync(table, bytes.subarray(0, bytes.length - 9));
    expect(await message(readRun(place("short")))).toContain(
      'layers.parquet" as table "layers": it must be parquet',
    );
    rmSync(table);
    expect(await message(readRun(place("short")))).toContain("AQ_CHECKPOINT");
    const { parquetWriteBuffer } = await import("hyparquet-writer");
    writeFileSync(
      table,
      new Uint8Array(parquetWriteBuffer({
        columnData: [{ name: "name", data: ["a"], type: "STRING" }],
        kvMetadata: [{ key: "arrowquant.table", value: "layers" }, {
          key: "arrowquant.table_version",
          value: "1",
        }],
      })),
    );
    expect(await message(readRun(place("short")))).toContain(
      "it must have all columns, lacks model, setting, kind",
    );
    mkdirSync(place("empty"));
    expect(await message(readRun(place("empty")))).toContain(
      "it must have run.json, as a folder of quantize --report",
    );
    expect(await message(readRun(place("nowhere")))).toContain("nowhere");
    writeFileSync(place("file"), "");
    expect(await message(readRun(place("file")))).toContain(
      "a run must be a folder with run.json, got a file",
    );
  });
});

describe("text and Markdown", () => {
  test("hold summary, sections, goals, configuration and command", async () => {
    const text = await reportText([runOf()]);
    for (
      const part of [
        "none: a test made this",
        "2.5 bits",
        "a      2.35",
        "met",
        "skipped",
        "nested.threshold  0.5",
      ]
    ) {
      expect(text).toContain(part);
    }
    const markdown = await reportMarkdown([runOf()], new Map());
    expect(markdown).toContain("| name | value |\n| --- | ---: |\n| b | 1.00 |");
    expect(markdown).toContain("```sh\nnone: a test made this\n```");
  });

  test("hostile names stay names", async () => {
    const hostile = runOf({
      name: HOSTILE,
      command: "```\n# x",
      summary: [{ label: HOSTILE, value: "\x1b[2J" }],
    });
    const text = await reportText([hostile]);
    expect(text).not.toContain("\x1b");
    expect(text).not.toContain("\u202e");
    const markdown = await reportMarkdown([hostile]);
    expect(markdown).not.toContain("<script");
    expect(markdown).not.toContain("\u202e");
    expect(markdown).toContain("\\|");
    expect(markdown).toContain("````sh\n```\n# x\n````");
  });

  test("two runs are compared", async () => {
    const a = runOf({ name: "a", tables: { layers: await tableFromRows("layers", layerRows(12)) } });
    const b = runOf({
      name: "b",
      tables: {
        layers: await tableFromRows(
          "layers",
          layerRows(12, "3 clip").map((row) => row.bits === null ? row : { ...row, relativeRmsError: 0.125 }),
        ),
      },
    });
    const text = await reportText([a, b]);
    expect(text).toContain("layers: a (A) and b (B)");
    expect(text).toMatch(/model\.layers\.\d\.\S+ +both +0\.\d{5} +0\.12500 +-0\.\d{5}/);
    expect(await reportMarkdown([a, a])).toContain("a (A) and a (2) (B)");
  });

  test("no run at all", async () => {
    expect(await message(reportHtml([]))).toContain("there must be at least one run, got none");
  });
});

describe("size and time", () => {
  test("300 layers are far below five megabytes, 10 000 below, and nothing is lost without saying so", async () => {
    const small = await reportHtml([
      runOf({ tables: { layers: await tableFromRows("layers", layerRows(300)) } }),
    ]);
    expect(small.length).toBeLessThan(1_500_000);
    const layers = await tableFromRows("layers", layerRows(10_000));
    const large = await reportHtml([runOf({ tables: { layers } })]);
    expect(large.length).toBeLessThan(5_000_000);
    const page = pageTable("layers", "", layers);
    const [cut] = fitted([page], 100_000);
    expect(JSON.stringify(cut).length).toBeLessThanOrEqual(100_000);
    expect([cut!.total, cut!.rows > 500]).toEqual([10_000, true]);
    expect(fitted([page])[0]!.total).toBe(undefined);
  });
});

describe("commands", () => {
  test("quantize.ts --report, report.ts on what it left, and its errors", () => {
    const model = join(MODELS, "dream-mini");
    const quantize = (bits: string, name: string) =>
      run("quantize.ts", [
        model,
        place(`${name}-model`),
        "--bits",
        bits,
        "--solver",
        "clip",
        "--quiet",
        "--report",
        place(name),
      ]);
    expect(quantize("2", "q2")).toEqual({ code: 0, stdout: "", stderr: "" });
    expect(quantize("3", "q3")).toEqual({ code: 0, stdout: "", stderr: "" });
    expect(readdirSync(place("q2")).sort()).toEqual([
      "charts",
      "report.html",
      "report.md",
      "report.txt",
      "run.json",
      "tables",
    ]);
    expect(readdirSync(join(place("q2"), "charts")).sort()).toEqual(
      ["codes.svg", "layers-heat-relativeError.svg", "layers.svg"],
    );
    const markdown = readFileSync(join(place("q2"), "report.md"), "utf8");
    for (const [, picture] of markdown.matchAll(/!\[[^\]]*\]\(([^)]*)\)/g)) {
      expect(existsSync(join(place("q2"), picture!))).toBe(true);
    }

    const both = run("report.ts", [place("q2"), place("q3"), "-o", place("both.html")]);
    expect([both.code, both.stdout.trim()]).toEqual([0, place("both.html")]);
    const text = run("report.ts", [place("q2"), place("q3"), "--format", "text"]);
    expect(text.stdout).toContain("layers: q2 (A) and q3 (B)");
    expect(text.stdout).toMatch(/bit_width +2 \(from --bits\)/);
    expect(run("report.ts", [place("q2"), "-o", place("x.md")]).code).toBe(0);
    expect(readFileSync(place("x.md"), "utf8")).toMatch(/^# ArrowQuant report/);

    expect(run("report.ts", []).code).toBe(2);
    expect(run("report.ts", [place("q2"), "--format", "pdf"]).code).toBe(2);
    const device = run("report.ts", [place("q2"), "-o", "/dev/null"]);
    expect([device.code, device.stderr]).toEqual([
      4,
      'error: Cannot write "/dev/null": it must be a file, got a device or pipe\n',
    ]);
    expect(statSync("/dev/null").isCharacterDevice()).toBe(true);
    expect(run("report.ts", [place("nothing")])).toMatchObject({ code: 3 });
    expect(run("quantize.ts", [model, place("z"), "--dry-run", "--report", place("zz")]).code).toBe(2);
    expect(run("quantize.ts", [model, place("z"), "--report", place("z")]).code).toBe(2);
    // What cannot be written is said before anything is quantized.
    const blocked = run("quantize.ts", [model, place("z"), "--report", join(place("x.md"), "report")]);
    expect([blocked.code, blocked.stderr.includes("a part of the path is a file"), existsSync(place("z"))])
      .toEqual([4, true, false]);
  }, 120_000);
});

describe("in a browser", () => {
  const chromium = findChromium();
  let browser: Browser | undefined;
  let whole: string;

  beforeAll(async () => {
    whole = place("page.html");
    const tables = await syntheticTables();
    const hostile = runOf({
      name: HOSTILE,
      title: HOSTILE,
      command: HOSTILE,
      summary: [{ label: HOSTILE, value: HOSTILE }],
      sections: [{
        title: HOSTILE,
        notes: [HOSTILE],
        columns: [{ key: HOSTILE, title: HOSTILE }],
        rows: [{ [HOSTILE]: HOSTILE }],
      }],
      tables: {
        layers: await tableFromRows(
          "layers",
          layerRows(3).map((row, i) => ({
            ...row,
            model: HOSTILE,
            name: HOSTILE + i,
            relativeRmsError: NaN,
          })),
        ),
        drift: await tableFromRows("drift", []),
      },
    });
    writeFileSync(whole, await reportHtml([runOf({ name: "first", tables }), hostile]));
    if (chromium !== undefined && !isDeno) browser = await Browser.open(chromium);
  }, 120_000);
  afterAll(async () => await browser?.close());

  const drawn = async (path: string, width: number): Promise<Page | undefined> => {
    if (browser === undefined) {
      console.log(
        `skipped: ${isDeno ? "the page is the same in both runtimes: Bun's tests open it" : "no chromium"}`,
      );
      return undefined;
    }
    const page = await browser.page(pathToFileURL(path).href, { width, height: 900 });
    await page.until("document.documentElement.dataset.charts === 'drawn'");
    return page;
  };

  for (const width of [390, 1280]) {
    test(
      `at ${width} pixels: no error, no request, every chart, nothing wider than the page, nothing executed`,
      async () => {
        const page = await drawn(whole, width);
        if (page === undefined) return;
        expect(page.messages).toEqual([]);
        expect(page.requests).toEqual([]);
        const charts = chartsOf(await syntheticTables()).length;
        expect(
          await page.evaluate(
            "document.querySelectorAll('.chart > svg, .chart .chart-wrapper svg, .chart svg.marks').length",
          ),
        )
          .toBeGreaterThanOrEqual(charts);
        expect(await page.evaluate("document.querySelectorAll('.failed').length")).toBe(0);
        expect(
          await page.evaluate(
            "[...document.querySelectorAll('[data-chart]')].every((place) => place.querySelector('svg.marks')?.textContent.length > 10)",
          ),
        ).toBe(true);
        expect(await page.evaluate("document.documentElement.scrollWidth <= innerWidth")).toBe(true);
        expect(await page.evaluate("window.hacked === undefined")).toBe(true);
        const screenshot = await page.screenshot();
        expect(screenshot.length).toBeGreaterThan(20_000);
      },
      120_000,
    );
  }

  test("tables sort, filter and show more; the theme changes", async () => {
    const page = await drawn(whole, 1280);
    if (page === undefined) return;
    const cells = (column: number) =>
      page.evaluate(
        `[...document.querySelectorAll('#run-0 details.table table tbody')][0].innerText && [...document.querySelector('#run-0 [data-table] tbody').rows].map((row) => row.cells[${column}].textContent).join()`,
      );
    const click = (index: number) =>
      page.evaluate(`document.querySelectorAll('#run-0 [data-table] th button')[${index}].click()`);
    expect(await cells(0)).toBe("b,a,c");
    await click(0);
    expect(await cells(0)).toBe("a,b,c");
    await click(0);
    expect(await cells(0)).toBe("c,b,a");
    await click(1);
    expect(await cells(1)).toBe("1.00,2.35,-");
    await click(1);
    expect(await cells(1)).toBe("2.35,1.00,-");
    expect(
      await page.evaluate("document.querySelectorAll('#run-0 [data-table] th')[1].getAttribute('aria-sort')"),
    ).toBe("descending");
    const filter = (text: string) =>
      page.evaluate(
        `(() => { const input = document.querySelector('#run-0 [data-table] input'); input.value = ${
          JSON.stringify(text)
        }; input.dispatchEvent(new Event('input')); })()`,
      );
    await filter("value>1.5");
    expect(await cells(0)).toBe("a");
    await filter("B");
    expect(await cells(0)).toBe("b");
    await filter("");
    // The table of drift has 153 rows: a hundred, then all.
    const drift =
      "[...document.querySelectorAll('#run-0 details.table')].find((each) => each.querySelector('summary').textContent.startsWith('drift'))";
    await page.evaluate(`${drift}.open = true`);
    await page.until(`${drift}.querySelectorAll('tbody tr').length === 100`);
    await page.evaluate(`${drift}.querySelector('.tools button').click()`);
    expect(await page.evaluate(`${drift}.querySelectorAll('tbody tr').length`)).toBe(153);
    const background = () => page.evaluate("getComputedStyle(document.body).backgroundColor");
    const before = await background();
    await page.evaluate(
      "delete document.documentElement.dataset.charts; document.getElementById('theme').click()",
    );
    await page.until("document.documentElement.dataset.charts === 'drawn'");
    expect(await background()).not.toBe(before);
    expect(page.messages).toEqual([]);
  }, 120_000);

  test("an empty run, NaN everywhere and 10 000 layers", async () => {
    writeFileSync(
      place("none.html"),
      await reportHtml([runOf({ sections: [], goals: [], summary: [], tables: {} })]),
    );
    const none = await drawn(place("none.html"), 390);
    if (none === undefined) return;
    expect(none.messages).toEqual([]);
    const layers = await tableFromRows(
      "layers",
      layerRows(10_000).map((row, i) => i % 2 === 0 ? { ...row, relativeRmsError: NaN } : row),
    );
    writeFileSync(place("many.html"), await reportHtml([runOf({ tables: { layers } })]));
    const many = (await drawn(place("many.html"), 1280))!;
    expect(many.messages).toEqual([]);
    expect(await many.evaluate("document.querySelector('figcaption').textContent")).toContain(
      "values are NaN or infinite and not drawn",
    );
  }, 120_000);
});

test("escaping leaves no markup and no hidden characters", () => {
  expect(escapeHtml(`<a href="x">&'\u202e\u0000`)).toBe(
    "&lt;a href=&quot;x&quot;&gt;&amp;&#39;\\u{202e}\\u{0}",
  );
});

test("several quantizations are ranked by held-out error, then by output error, not by that of weights", async () => {
  const run = (name: string, heldOut: number | null, output: number | null, weights: number) =>
    runOf({
      name,
      errors: { metric: heldOut === null ? "not measured" : "KL", heldOut, output, weights, bits: 2.5 },
    });
  const runs = [run("third", null, 0.1, 0.2), run("second", 0.2, 0.3, 0.1), run("first", 0.1, 0.4, 0.9)];
  const [table] = (await reportText(runs)).split("== ");
  const places = ["Runs by error", "first", "second", "third"].map((name) => table!.indexOf(`\n${name}`));
  expect(places).toEqual(places.toSorted((a, b) => a - b));
  expect(places[0]).toBeGreaterThanOrEqual(-1);
  expect(await reportMarkdown(runs)).toContain("The error of weights does not rank solvers");
  expect(await reportText(runs.slice(0, 1))).not.toContain("Runs by error");
});
