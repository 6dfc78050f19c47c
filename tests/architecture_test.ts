/** The order of the tree: what may import what, how large a folder may be, and where documents may reach. */
import { describe, expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { ROOT } from "./_checkpoints.ts";

/** Floors of lib from low to high: a file imports from its own floor and from lower ones. */
const FLOORS = [
  ...[
    "errors",
    "progress",
    "files",
    "config",
    "native",
    "tensor",
    "names",
    "lora",
    "quant",
    "output",
    "plan",
    "time",
    "thermo",
  ],
  ...["models", "calibration", "solve", "phases", "pipeline", "interop", "eval", "bench", "analysis"],
];
const MAX_FILES_PER_FOLDER = 16;
const MAX_LINES_PER_FUNCTION = 80;
/** As in deno.json. */
const MAX_COLUMNS = 110;

function filesBelow(folder: string): string[] {
  return readdirSync(join(ROOT, folder), { withFileTypes: true }).flatMap((entry) => {
    const path = `${folder}/${entry.name}`;
    return entry.isDirectory() ? filesBelow(path) : [path];
  });
}

const sourceOf = (path: string) => readFileSync(join(ROOT, path), "utf8");
/** Source without comments: their examples import, too. */
const codeOf = (path: string) => sourceOf(path).replace(/\/\*[\s\S]*?\*\/|(?<=^|\s)\/\/.*$/gm, "");

/** Relative imports of a file, by path from the project's folder. */
function importsOf(path: string): string[] {
  const specifiers = [...codeOf(path).matchAll(/(?:\bfrom|\bimport)\s*\(?\s*"(\.[^"]+)"/g)];
  return specifiers.map(([, specifier]) => relative(ROOT, join(ROOT, dirname(path), specifier!)));
}

const floorOf = (path: string) => FLOORS.indexOf(path.split("/")[1]!.replace(/\.ts$/, ""));
const library = filesBelow("lib").filter((path) => path.endsWith(".ts"));
const imports = new Map(library.map((path) => [path, importsOf(path)]));

/** Files from which `path` is reached again, as one path around; empty where there is none. */
function circleThrough(path: string): string[] {
  const seen = new Set<string>();
  const walk = (at: string, trail: string[]): string[] => {
    for (const next of imports.get(at) ?? []) {
      if (next === path) return [...trail, at];
      if (seen.has(next)) continue;
      seen.add(next);
      const found = walk(next, [...trail, at]);
      if (found.length > 0) return found;
    }
    return [];
  };
  return walk(path, []);
}

describe("lib", () => {
  test("has a floor for every folder", () => {
    expect(library.filter((path) => floorOf(path) < 0)).toEqual([]);
  });
  test("imports from its own floor and below", () => {
    const upward = [...imports].flatMap(([path, targets]) =>
      targets.filter((target) => !target.startsWith("lib/") || floorOf(target) > floorOf(path))
        .map((target) => `${path} -> ${target}`)
    );
    expect(upward).toEqual([]);
  });
  test("imports files that are there", () => {
    const missing = [...imports.values()].flat().filter((path) => !existsSync(join(ROOT, path)));
    expect(missing).toEqual([]);
  });
  test("has no circle of imports", () => {
    expect(library.map(circleThrough).filter((circle) => circle.length > 0)).toEqual([]);
  });
  test("never names a path of scripts or tests", () => {
    const naming = library.filter((path) => /["'`/](?:scripts|tests)\//.test(codeOf(path)));
    expect(naming).toEqual([]);
  });
});

/** Begins of functions, as the formatter lays them out; the indentation is caught. */
const FUNCTION_HEAD =
  /^(\s*)(?:export )?(?:default )?(?:(?:async )?function\*?\s+\w+|(?:const|readonly) \w+.*= (?:async )?(?:<[^>]*>)?\(|(?:(?:static|async|override|private|public|get|set) )*\*?[#\w]+(?:<.*>)?\()/;
const STATEMENT = /^\s*(?:if|for|while|switch|return|catch|await|throw|else|super)\b/;

/** Functions of a file that have more lines than allowed. Bodies end at a brace as far left as their head. */
function longFunctions(path: string): string[] {
  const lines = sourceOf(path).split("\n");
  return lines.flatMap((line, start) => {
    const indent = FUNCTION_HEAD.exec(line)?.[1];
    if (indent === undefined || STATEMENT.test(line)) return [];
    const from = (first: string) => (text: string, i: number) => i > start && text.startsWith(indent + first);
    const open = line.endsWith("(") ? lines.findIndex(from(")")) : start;
    if (open < 0 || !lines[open]!.endsWith("{") || lines[open]!.includes("=> ({")) return [];
    const end = lines.findIndex((text, i) => i > open && text.startsWith(`${indent}}`));
    const count = end - start + 1;
    return count > MAX_LINES_PER_FUNCTION ? [`${path}:${start + 1}: ${count} lines`] : [];
  });
}

test("no function of lib and scripts has more than eighty lines", () => {
  const sources = [...library, ...filesBelow("scripts").filter((path) => path.endsWith(".ts"))];
  expect(sources.flatMap(longFunctions)).toEqual([]);
});

/** Lines of comments that are wider than the code may be; examples are code, and the formatter's. */
function wideComments(path: string): string[] {
  let isExample = false;
  return sourceOf(path).split("\n").flatMap((line, i) => {
    if (/^\s*\/\*\*/.test(line)) isExample = false;
    if (/^\s*\* ```/.test(line)) isExample = !isExample;
    const isWide = line.length > MAX_COLUMNS && /^\s*(?:\/\*|\*(?: |$)|\/\/)/.test(line) && !isExample;
    return isWide ? [`${path}:${i + 1}: ${line.length} columns`] : [];
  });
}

test("comments of lib, scripts and the kernels are wrapped at the width of TypeScript", () => {
  const generated = /^lib\/native\/(?:functions|signatures|wasm_binary)\.ts$/;
  const sources = ["mod.ts", ...library, ...filesBelow("scripts")].filter((path) => path.endsWith(".ts"));
  const kernels = filesBelow("kernels").filter((path) => /\.(?:[ch]|cu)$/.test(path));
  expect(sources.filter((path) => !generated.test(path)).concat(kernels).flatMap(wideComments)).toEqual([]);
});

test("what lib and scripts export, another file names", () => {
  const sources = ["lib", "scripts", "tests"].flatMap(filesBelow).filter((path) => path.endsWith(".ts"));
  const names = new Map(sources.map((path) => [path, new Set(codeOf(path).match(/\w+/g))]));
  const exported = sources.filter((path) => !path.startsWith("tests/")).flatMap((path) =>
    [...sourceOf(path).matchAll(/^export (?:async )?(?:function\*?|const|class) (\w+)/gm)]
      .map(([, name]) => ({ path, name: name! }))
  );
  const generated = /^lib\/native\/(?:functions|signatures)\.ts$/, entry = new Set(["main", "loadAnalysis"]); // of commands and bundles
  const alone = exported.filter(({ path, name }) =>
    !generated.test(path) && !entry.has(name) &&
    !sources.some((other) => other !== path && names.get(other)!.has(name))
  );
  expect(alone).toEqual([]);
});

test("no folder holds more than sixteen files", () => {
  const counts = new Map<string, number>();
  for (const path of ["lib", "scripts", "kernels", "tests"].flatMap(filesBelow)) {
    if (!path.startsWith("tests/models/")) counts.set(dirname(path), (counts.get(dirname(path)) ?? 0) + 1);
  }
  expect([...counts].filter(([, count]) => count > MAX_FILES_PER_FOLDER)).toEqual([]);
});

test("documents and notebooks import public modules only", () => {
  const { exports } = JSON.parse(sourceOf("deno.json")) as { exports: Record<string, string> };
  const doors = new Set(Object.values(exports).map((path) => path.slice(2)));
  const documents = ["README.md", ...["docs", "notebooks"].flatMap(filesBelow)];
  const others = documents.filter((path) => /\.(?:md|ipynb)$/.test(path)).flatMap((path) =>
    [...sourceOf(path).matchAll(/from \\?"(\.[^"\\]+)/g)]
      .map(([, specifier]) => relative(ROOT, join(ROOT, dirname(path), specifier!)))
      .filter((target) => !doors.has(target)).map((target) => `${path}: ${target}`)
  );
  expect(others).toEqual([]);
});

test("the places that docs/architecture.md names are there", () => {
  const table = sourceOf("docs/architecture.md").split("## Where is …")[1]!;
  const places = [...table.matchAll(/`((?:lib|kernels|docs|tests|scripts)\/[^`\s]+)`/g)].map(([, path]) =>
    path!
  );
  expect(places.length).toBeGreaterThan(20);
  expect(places.filter((path) => !existsSync(join(ROOT, path)))).toEqual([]);
});

test("package-lock.json is of this package.json: npm install leaves a fresh clone clean", () => {
  const own = JSON.parse(sourceOf("package.json"));
  const { packages: { "": locked } } = JSON.parse(sourceOf("package-lock.json"));
  for (const key of ["name", "version", "dependencies", "devDependencies", "optionalDependencies"]) {
    expect([key, locked[key]]).toEqual([key, own[key]]);
  }
  expect(locked.bin.arrowquant).toBe(own.bin.arrowquant.replace(/^\.\//, ""));
});

test("package.json and deno.json have the same doors and the same command", () => {
  const { exports, bin } = JSON.parse(sourceOf("package.json"));
  expect({ ...exports, "./cli": bin.arrowquant }).toEqual(JSON.parse(sourceOf("deno.json")).exports);
});
