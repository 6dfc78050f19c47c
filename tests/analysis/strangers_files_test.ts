import { afterAll, expect, test } from "bun:test";
import { existsSync, mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { writeReport } from "../../lib/analysis/report/folder.ts";
import type { Run } from "../../lib/analysis/run.ts";
import { tableFromRows } from "../../lib/analysis/tables.ts";
import { OutputError } from "../../lib/errors.ts";
import { MADE_BY, writeResult } from "../../lib/files/results.ts";
import { encodePng } from "../../lib/models/mod.ts";
import { prepareReport } from "../../scripts/_command/run.ts";
import { rejection, workplace } from "../_checkpoints.ts";
import { layerRows } from "./_synthetic.ts";

const place = workplace();
afterAll(() => place.remove());

const runOf = (changes: Partial<Run> = {}): Run => ({
  ...{ name: "run", title: "synthetic", command: "none", date: "2026-01-02T03:04:05.000Z", seconds: 1 },
  ...{ toolVersion: "0.1.0", environment: {}, configuration: {}, summary: [], sections: [], goals: [] },
  ...{ skipped: [], tables: {}, ...changes },
});

test("a report is written over its own files, not over those of somebody else", async () => {
  const folder = place.fresh("report"),
    run = runOf({ tables: { layers: await tableFromRows("layers", layerRows(3)) } });
  await writeReport(folder, run);
  await writeReport(folder, run);
  prepareReport(folder);
  const names = [
    "run.json",
    "report.html",
    "report.md",
    "report.txt",
    "charts/layers.svg",
    "tables/layers.parquet",
  ];
  for (const name of names) {
    const path = join(folder, name), own = readFileSync(path);
    writeFileSync(path, "precious");
    const error = await rejection(writeReport(folder, run));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain(`Cannot write ${JSON.stringify(path)}`);
    expect(readFileSync(path, "utf8")).toBe("precious");
    if (!name.includes("/")) expect(() => prepareReport(folder)).toThrow("--force");
    writeFileSync(path, own);
  }
  writeFileSync(join(folder, "report.md"), "precious");
  await writeReport(folder, run, { force: true });
  expect(readFileSync(join(folder, "report.md"), "utf8")).toContain(MADE_BY);
});

test("a page and a picture are no stranger's either, nor written by way of a link", async () => {
  const run = runOf(), victim = place.fresh("victim");
  writeFileSync(victim, "precious");
  for (const name of ["page.html", "picture.png"]) {
    const path = place.fresh(name).replace(/(\.\w+)-(\d+)$/, "-$2$1");
    const write = async (force?: boolean) =>
      name === "page.html"
        ? await writeReport(path, run, { force })
        : writeResult(path, encodePng(new Uint8Array(4), 2, 2, 1), force);
    await write();
    await write();
    rmSync(path);
    symlinkSync(victim, path);
    expect((await rejection(write())).message).toContain("got a link");
    rmSync(path);
    writeFileSync(path, "precious");
    expect((await rejection(write())).message).toContain("this tool did not make");
    await write(true);
    await write();
    expect(readFileSync(victim, "utf8")).toBe("precious");
  }
  const folder = place.fresh("report"), elsewhere = place.fresh("elsewhere");
  for (const each of [folder, elsewhere]) mkdirSync(each);
  symlinkSync(elsewhere, join(folder, "charts"));
  expect((await rejection(writeReport(folder, run))).message).toContain('"charts" as a folder, got a link');
  expect(existsSync(join(elsewhere, "layers.svg"))).toBe(false);
});
