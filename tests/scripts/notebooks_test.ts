import { afterAll, describe, expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { findProgram } from "../../scripts/_command/programs.ts";
import { runProgram } from "../../scripts/_command/run_program.ts";
import { cellsOf, changedOutputs } from "../../scripts/notebooks.ts";
import { isDeno, ROOT, run, workplace } from "../_checkpoints.ts";

const place = workplace();
afterAll(place.remove);

function notebook(...cells: string[]): string {
  const path = `${place.fresh("notebook")}.ipynb`;
  writeFileSync(
    path,
    JSON.stringify({
      nbformat: 4,
      nbformat_minor: 5,
      metadata: { kernelspec: { name: "deno", display_name: "Deno", language: "typescript" } },
      cells: [
        { cell_type: "markdown", id: "a", metadata: {}, source: ["# not code: const x: number = 'text';"] },
        ...cells.map((source, i) => ({
          cell_type: "code",
          id: `b${i}`,
          metadata: {},
          execution_count: null,
          outputs: [],
          source: [source],
        })),
      ],
    }),
  );
  return path;
}

describe("notebooks.ts", () => {
  test("joins cells of code, and types hold across them", () => {
    const good = notebook("const one: number = 1;", "one + 1;");
    expect(cellsOf(good)).toEqual(["const one: number = 1;", "one + 1;"]);
    expect(run("notebooks.ts", [good, "--check"]).code).toBe(0);
    const bad = notebook("const one = 1;", "one.length;");
    const { code, stdout } = run("notebooks.ts", [bad, "--check"]);
    expect(code).toBe(1);
    expect(stdout).toContain("Property 'length' does not exist on type");
  }, 120_000);

  test("a cell that throws fails the run", () => {
    if (isDeno || findProgram("jupyter-nbconvert") === undefined) {
      console.log(`skipped: ${isDeno ? "Bun's tests start Jupyter" : "no jupyter-nbconvert"}`);
      return;
    }
    expect(run("notebooks.ts", [notebook("const two = 1 + 1;")])).toMatchObject({ code: 0 });
    const { code, stdout } = run("notebooks.ts", [
      notebook("const two = 1 + 1;", 'throw new Error("as it should");'),
    ]);
    expect(code).toBe(1);
    expect(stdout).toContain("as it should");
  }, 120_000);

  test("what is no notebook is refused", () => {
    const path = `${place.fresh()}.ipynb`;
    writeFileSync(path, '{"nbformat": 3}');
    expect(() => cellsOf(path)).toThrow("must have nbformat 4 and cells, got 3");
    writeFileSync(path, "not json");
    expect(run("notebooks.ts", [path]).code).toBe(3);
  });

  test("what a cell shows is compared with what is stored, up to times and other machines' digits", () => {
    const notebook = (...plain: string[]) => ({
      metadata: {},
      cells: [{
        cell_type: "code",
        outputs: plain.map((text) => ({ output_type: "execute_result", data: { "text/plain": text } })),
      }],
    });
    const changed = (a: string, b: string, isSame = true) =>
      changedOutputs(notebook(a), notebook(b), isSame).length;
    const table = (kl: string, seconds: string) =>
      `method  kl     seconds\n------  -----  -------\nbest    ${kl}  ${seconds}`;
    expect(changed(table("0.001", "   1.25"), table("0.001", "  11.50"))).toBe(0);
    expect(changed(table("0.001", "   1.25"), table("0.002", "   1.25"))).toBe(1);
    expect(changed(table("0.001", "   1.25"), table("0.002", "   1.25"), false)).toBe(0);
    expect(changed("2 bits, took 3.5 s", "2 bits, took 4 s")).toBe(0);
    expect(changed("2 bits, took 3.5 s", "3 bits, took 3.5 s")).toBe(1);
    expect(changed("one", "another", false)).toBe(1);
    expect(changed("native avx512_vnni (a)", "native avx512_vbmi (a)", false)).toBe(0);
    expect(changedOutputs(notebook("one"), notebook(), true)).toEqual([]);
  });

  test("those of the repository end in assertions and are stored with what they show", () => {
    const names = readdirSync(join(ROOT, "notebooks")).filter((name) => name.endsWith(".ipynb"));
    expect(names.sort()).toEqual([
      "01_quantize_and_look.ipynb",
      "02_time_axis_and_phases.ipynb",
      "03_compare_methods.ipynb",
    ]);
    for (const name of names) {
      const path = join(ROOT, "notebooks", name);
      const { cells } = JSON.parse(readFileSync(path, "utf8")) as {
        cells: { cell_type: string; outputs?: { data?: Record<string, unknown> }[] }[];
      };
      const outputs = cells.flatMap(({ outputs }) => outputs ?? []);
      expect(outputs.some(({ data }) => data?.["image/svg+xml"] !== undefined)).toBe(true);
      expect(JSON.stringify(outputs)).not.toMatch(/\/(?:root|home|tmp)\//);
      expect(cellsOf(path).at(-1)!.match(/assert\./g)!.length).toBeGreaterThan(2);
    }
  });
});

test("a program that is stopped hears the signal that lets it end what it has started", async () => {
  const heard = place.fresh("heard"), started = place.fresh("started"), controller = new AbortController();
  const script = `trap 'echo $? > "${heard}"; exit' INT; touch "${started}"; while :; do sleep 0.05; done`;
  const timer = setInterval(() => {
    if (existsSync(started)) controller.abort("SIGINT");
  }, 20);
  try {
    const { signal } = controller;
    await runProgram("sh", ["-c", script], { cwd: place.path, signal, killSignal: "SIGINT" });
    for (let tries = 0; tries < 500 && !existsSync(heard); tries++) {
      await new Promise((r) => setTimeout(r, 20));
    }
    expect(existsSync(heard)).toBe(true);
  } finally {
    clearInterval(timer);
  }
});
