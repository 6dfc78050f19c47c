/**
 * The libraries of the analysis, each loaded when something first needs it: most runs never do. A module that
 * came over HTTP has no package beside it, so there they are named with their versions.
 */
import { createRequire } from "node:module";
import { ConfigError } from "../errors.ts";

const IS_REMOTE = import.meta.url.startsWith("http");

/** Versions as in package.json; a test compares them. */
export const VERSIONS = {
  "@resvg/resvg-wasm": "2.6.2",
  "@uwdata/flechette": "2.6.0",
  "arquero": "8.0.3",
  "dejavu-fonts-ttf": "2.37.3",
  "hyparquet": "1.31.5",
  "hyparquet-writer": "0.17.0",
  "vega": "6.4.0",
  "vega-embed": "7.3.0",
  "vega-lite": "6.5.0",
} as const;

/** Entry to look for in each package: a font has no module. */
const ENTRIES: Partial<Record<string, string>> = { "dejavu-fonts-ttf": "dejavu-fonts-ttf/package.json" };

/**
 * Checks that every package is installed, before the work whose report they would make. The npm package
 * leaves their installation to users who want tables and charts.
 *
 * @param isThere whether a module can be found; for tests
 * @throws {ConfigError} when packages are missing; the message has the command that installs them
 */
export function checkLibraries(isThere: (specifier: string) => boolean = canResolve): void {
  const names = Object.keys(VERSIONS) as (keyof typeof VERSIONS)[];
  const missing = names.filter((name) => !isThere(ENTRIES[name] ?? name));
  if (missing.length === 0) return;
  throw new ConfigError(
    `Cannot make tables and charts: their packages must be installed, got none of ${
      missing.join(", ")
    }: npm install ${missing.map((name) => `${name}@${VERSIONS[name]}`).join(" ")}`,
  );
}

function canResolve(specifier: string): boolean {
  try {
    import.meta.resolve(specifier);
    return true;
  } catch {
    return false; // the one thing that it throws for
  }
}

function load<Module>(name: keyof typeof VERSIONS, installed: () => Promise<Module>): Promise<Module> {
  const remote = `npm:${name}@${VERSIONS[name]}`; // computed: nothing tries to resolve it before it is asked for
  return IS_REMOTE ? import(remote) : installed();
}

/** Arrow. */
export const loadFlechette = () => load("@uwdata/flechette", () => import("@uwdata/flechette"));
/** Data frames; a remote import of arquero finds the version of flechette that was loaded before. */
export async function loadArquero(): Promise<typeof import("arquero")> {
  if (IS_REMOTE) await loadFlechette();
  return await load("arquero", () => import("arquero"));
}
export const loadParquetReader = () => load("hyparquet", () => import("hyparquet"));
export const loadParquetWriter = () => load("hyparquet-writer", () => import("hyparquet-writer"));
/** From a compiled specification to a scene. */
export const loadVega = (): Promise<typeof import("vega")> => load("vega", () => import("vega"));
/** From a chart's specification to vega's. */
export const loadVegaLite = () => load("vega-lite", () => import("vega-lite"));
/** SVG to pixels. */
export const loadResvg = () => load("@resvg/resvg-wasm", () => import("@resvg/resvg-wasm"));

/**
 * Path of a package's file, as a font or a script that a page takes in.
 *
 * @throws {TypeError} in a module that came over HTTP, beside which there are no packages
 */
export function packageFile(specifier: string): string {
  if (IS_REMOTE) {
    throw new TypeError(
      `Cannot find "${specifier}": pixels and reports need the packages of an installed arrowquant, got a ` +
        "module loaded over HTTP; SVG and tables work there",
    );
  }
  return createRequire(import.meta.url).resolve(specifier);
}
