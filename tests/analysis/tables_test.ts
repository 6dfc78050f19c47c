import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { checkLibraries, VERSIONS } from "../../lib/analysis/_libraries.ts";
import {
  columnsOf,
  type RowOf,
  schemaMarkdown,
  TABLE_NAMES,
  TABLE_SCHEMAS,
} from "../../lib/analysis/schema.ts";
import {
  columnsOnThread,
  decodeTable,
  encodeTable,
  readTable,
  TABLE_FORMATS,
  writeTable,
} from "../../lib/analysis/table_files.ts";
import { compareRuns, compareTables, rowsOf, tableFromRows } from "../../lib/analysis/tables.ts";
import { FormatError } from "../../lib/errors.ts";

/** Synthetic rows: nothing here was measured. */
const layer = (name: string, changes: Partial<RowOf<"layers">> = {}): RowOf<"layers"> => ({
  model: "synthetic",
  setting: "2 clip",
  name,
  kind: "attention",
  action: "quantized",
  bits: 2,
  groupSize: 64,
  weights: 4096,
  bitsPerWeight: 2.5,
  relativeRmsError: 0.25,
  cosine: 0.97,
  bytesBefore: 8192,
  bytesAfter: 1280,
  milliseconds: 1.5,
  ...changes,
});

const AWKWARD: RowOf<"layers">[] = [
  layer("plain"),
  layer('quote " comma , line\r\nfeed', { reason: "", relativeRmsError: NaN, cosine: Infinity }),
  layer("</script><b>ümläut 層", { maxError: -Infinity, bits: null, groupSize: null, milliseconds: null }),
  layer("", { weights: 2 ** 53 - 1, relativeRmsError: 5e-324, cosine: 0.1 + 0.2, reason: "NaN" }),
];

const message = async (promise: Promise<unknown>): Promise<string> => {
  try {
    await promise;
  } catch (error) {
    return (error as Error).message;
  }
  throw new Error("nothing was thrown");
};

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "arrowquant-tables-"));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

describe("schema", () => {
  test("every key is a column, every number has a unit, and the documentation names each column", () => {
    const markdown = schemaMarkdown();
    for (const name of TABLE_NAMES) {
      const columns = columnsOf(name);
      for (const key of TABLE_SCHEMAS[name].key) expect(Object.keys(columns)).toContain(key);
      for (const [column, { type, unit }] of Object.entries(columns)) {
        const isNumber = type === "integer" || type === "number";
        expect([name, column, isNumber]).toEqual([name, column, unit !== undefined]);
        expect(markdown).toContain(`| \`${column}\` | ${type}`);
      }
    }
  });

  test("versions of the libraries are package.json's", () => {
    const root = fileURLToPath(new URL("../../package.json", import.meta.url));
    const { dependencies } = JSON.parse(readFileSync(root, "utf8"));
    for (const [name, version] of Object.entries(VERSIONS)) {
      expect([name, dependencies[name]]).toEqual([name, version]);
    }
  });

  test("libraries that are not installed are named with the command that installs them", () => {
    expect(() => checkLibraries()).not.toThrow();
    expect(() => checkLibraries((name) => !name.startsWith("vega-embed"))).toThrow(
      "got none of vega-embed: npm install vega-embed@" + VERSIONS["vega-embed"],
    );
    expect(() => checkLibraries(() => false)).toThrow("dejavu-fonts-ttf@");
  });
});

describe("tableFromRows", () => {
  test("has every column in order and null where nothing is", async () => {
    const table = await tableFromRows("layers", [layer("a")]);
    expect(table.columnNames()).toEqual(Object.keys(columnsOf("layers")));
    expect(table.get("maxError", 0)).toBe(null);
    expect(rowsOf("layers", table)[0]!.weights).toBe(4096);
    expect((await tableFromRows("time", [])).columnNames()).toEqual(Object.keys(columnsOf("time")));
  });

  test("refuses what does not fit, with row and value", async () => {
    const bad = (changes: object) =>
      message(tableFromRows("layers", [layer("a"), { ...layer("b"), ...changes }]));
    expect(await bad({ bits: 2.5 })).toBe(
      'Cannot make table "layers": bits of row 1 must be a safe integer, got 2.5',
    );
    expect(await bad({ name: null })).toBe(
      'Cannot make table "layers": name of row 1 must be a text, got null',
    );
    expect(await bad({ cosine: "0.9" })).toBe(
      'Cannot make table "layers": cosine of row 1 must be a number, got "0.9"',
    );
    expect(await bad({ milisecond: 1 })).toContain('row 1 has "milisecond"');
  });
});

describe("files", () => {
  for (const format of TABLE_FORMATS) {
    test(`${format}: everything comes back, NaN, infinities, empty and absent texts`, async () => {
      const table = await tableFromRows("layers", AWKWARD);
      const back = await decodeTable("layers", await encodeTable("layers", table, format), format);
      expect(back.columnNames()).toEqual(table.columnNames());
      expect(back.objects()).toEqual(table.objects());
    });

    test(`${format}: every table, without rows and with booleans`, async () => {
      for (const name of TABLE_NAMES) {
        const empty = await tableFromRows(name, []);
        expect((await decodeTable(name, await encodeTable(name, empty, format), format)).numRows()).toBe(0);
      }
      const rows: RowOf<"samples">[] = [
        { model: "m", setting: "s", sample: 0, isCorrect: true, answer: "" },
        { model: "m", setting: "s", sample: 1, isCorrect: false },
        { model: "m", setting: "s", sample: 2 },
      ];
      const table = await tableFromRows("samples", rows);
      const back = await decodeTable("samples", await encodeTable("samples", table, format), format);
      expect(back.objects()).toEqual(table.objects());
    });

    test(`${format}: through a file; another table's file, junk and a cut file are refused`, async () => {
      const path = join(folder, `layers.${format}`);
      const table = await tableFromRows("layers", AWKWARD);
      await writeTable(path, "layers", table);
      expect((await readTable(path, "layers")).objects()).toEqual(table.objects());
      const bytes = new Uint8Array(readFileSync(path));
      const refused = async (broken: Uint8Array<ArrayBuffer>, name: "layers" | "time" = "layers") => {
        try {
          const read = await decodeTable(name, broken, format, path);
          return read.numRows() === AWKWARD.length ? "same" : "read";
        } catch (error) {
          if (!(error instanceof FormatError)) throw error;
          expect(error.message).toContain(`Cannot read ${JSON.stringify(path)} as table "${name}": `);
          return "refused";
        }
      };
      expect(await refused(bytes, "time")).toBe("refused");
      expect(await refused(new TextEncoder().encode("junk"))).toBe("refused");
      expect(await refused(new Uint8Array())).toBe("refused");
      expect(await refused(bytes.slice(0, bytes.length >> 1))).toBe("refused");
    });
  }

  test("a column short, another version, a file that is not there, an unknown ending", async () => {
    const table = await tableFromRows("drift", [{ model: "m", setting: "s", step: 1 }]);
    const text = new TextDecoder().decode(await encodeTable("drift", table, "json"));
    const decode = (changed: string) =>
      message(decodeTable("drift", new TextEncoder().encode(changed), "json", "drift.json"));
    expect(await decode(text.replace('"version":1', '"version":2'))).toBe(
      'Cannot read "drift.json" as table "drift": its version must be 1, got 2',
    );
    expect(await decode(text.replace('"step",', ""))).toBe(
      'Cannot read "drift.json" as table "drift": it must have all columns, lacks step',
    );
    const csv = new TextDecoder().decode(await encodeTable("drift", table, "csv"));
    const wrong = csv.replace(",1,", ",one,");
    expect(await message(decodeTable("drift", new TextEncoder().encode(wrong), "csv", "x.csv"))).toBe(
      'Cannot read "x.csv" as table "drift": step of row 0 must be a safe integer, got "one"',
    );
    expect(await message(readTable(join(folder, "none.csv"), "drift"))).toContain("none.csv");
    expect(await message(readTable(join(folder, "drift.xlsx"), "drift"))).toContain("must end with .arrow");
    writeFileSync(join(folder, "drift.csv"), "model,setting\r\n");
    expect(await message(readTable(join(folder, "drift.csv"), "drift"))).toContain("lacks step");
  });
});

describe("tables of earlier versions", () => {
  for (const format of TABLE_FORMATS) {
    test(`${format}: a column that came later is absent from every row`, async () => {
      const columns = columnsOf("layers") as Record<string, unknown>, { outputError } = columns;
      delete columns["outputError"]; // as the schema was
      const table = await tableFromRows("layers", [layer("a", { bits: 3 })]);
      const old = await encodeTable("layers", table, format).finally(() =>
        columns["outputError"] = outputError
      );
      const read = await decodeTable("layers", old as Uint8Array<ArrayBuffer>, format);
      expect(read.columnNames()).toContain("outputError");
      expect([read.get("outputError", 0), read.get("bits", 0)]).toEqual([null, 3]);
    });
  }
});

describe("compareRuns", () => {
  const run = async (rows: RowOf<"layers">[]) => ({
    tables: { layers: await tableFromRows("layers", rows) },
  });

  test("joins on the key without what is constant, keeps what only one run has, and subtracts", async () => {
    const a = await run([layer("q", { relativeRmsError: 0.5 }), layer("only a")]);
    const b = await run([
      layer("only b", { setting: "3 clip" }),
      layer("q", { setting: "3 clip", relativeRmsError: 0.125, bits: 3 }),
    ]);
    const rows = (await compareRuns(a, b)).objects() as Record<string, unknown>[];
    expect(rows.map((row) => [row["name"], row["in"]])).toEqual([["q", "both"], ["only a", "a"], [
      "only b",
      "b",
    ]]);
    expect(rows[0]!["relativeRmsErrorDifference"]).toBe(-0.375);
    expect([rows[0]!["settingA"], rows[0]!["settingB"], rows[0]!["bitsDifference"]]).toEqual([
      "2 clip",
      "3 clip",
      1,
    ]);
    expect(rows[1]!["relativeRmsErrorB"]).toBe(null);
    expect(rows[1]!["relativeRmsErrorDifference"]).toBe(null);
    expect("maxErrorA" in rows[0]!).toBe(false);
  });

  test("says what cannot be joined", async () => {
    const a = await run([layer("q"), layer("q", { setting: "other" })]);
    expect(await message(compareRuns(a, a, { on: ["name"] }))).toBe(
      'Cannot compare tables: name must tell rows apart, got "[\\"q\\"]" twice in the first',
    );
    expect(await message(compareRuns(a, { tables: {} }))).toBe(
      'Cannot compare runs: both must have table "layers", the second has none',
    );
    expect(await message(compareTables(a.tables.layers, a.tables.layers, ["nmae"]))).toContain("got nmae");
  });
});

describe("tables from strangers", () => {
  const tableOf = (...names: string[]) => tableFromRows("layers", names.map((name) => layer(name)));

  test("texts in CSV never begin like a formula, and come back as they were", async () => {
    const names = ["=1+1", "+a", "-a", "@a", "\ta", "\ra", "'=a", "''-a", "'a", "a=", "−a"],
      table = await tableOf(...names);
    const csv = new TextDecoder().decode(await encodeTable("layers", table, "csv"));
    expect(csv.match(/(^|,)"[=+\-@\t\r]/m)).toBe(null);
    expect(csv).toContain(`"'=1+1"`);
    const back = await decodeTable("layers", new TextEncoder().encode(csv), "csv");
    expect(rowsOf("layers", back).map(({ name }) => name)).toEqual(names);
    // numbers stay numbers
    const negative = await tableFromRows("layers", [layer("a", { maxError: -1.5 })]);
    expect(new TextDecoder().decode(await encodeTable("layers", negative, "csv"))).toContain(",-1.5,");
  });

  test("are given up where they take too long or too much memory", async () => {
    const bytes = await encodeTable("layers", await tableOf("a"), "parquet");
    const read = (limits: object) =>
      columnsOnThread({ name: "layers", bytes, format: "parquet", path: "x.parquet" }, {
        ...{ milliseconds: 60_000, millisecondsPerByte: 0, bytes: 2 ** 40, bytesPerByte: 0 },
        ...limits,
      });
    expect((await read({})).length).toBe(Object.keys(columnsOf("layers")).length);
    expect(await message(read({ milliseconds: -1 }))).toMatch(/x\.parquet.*must be read within/);
    expect(await message(read({ bytes: -(2 ** 40) }))).toMatch(/x\.parquet.*must take at most/);
  });

  test("whose texts are more than a page can hold are refused", async () => {
    const long = "a".repeat(2 ** 20), rows = Array.from({ length: 257 }, () => layer(long));
    const text = JSON.stringify(rows.map(({ name: _, ...row }) => row)).length;
    expect(text).toBeLessThan(2 ** 20);
    const request = {
      name: "layers",
      bytes: await encodeTable("layers", await tableFromRows("layers", rows), "parquet"),
    } as const;
    expect(request.bytes.length).toBeLessThan(2 ** 26);
    expect(await message(decodeTable("layers", request.bytes, "parquet"))).toMatch(
      /texts must have at most 268435456 characters/,
    );
  });
});
