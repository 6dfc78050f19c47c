/**
 * Charts as SVG and PNG without a browser and without a display, the same bytes in Bun and Deno. Pixels are
 * drawn by resvg's WebAssembly build with DejaVu Sans, so that no font of the machine is looked for.
 */
import { readFileSync } from "node:fs";
import type { Spec } from "./_chart.ts";
import { loadResvg, loadVega, loadVegaLite, packageFile } from "./_libraries.ts";
import { textWidth } from "./_text_widths.ts";
import { type Theme, themeColours, withTheme } from "./_theme.ts";

/** Control characters, of a stranger's names, that no XML file may have and that a terminal would obey. */
// deno-lint-ignore no-control-regex
const NO_XML = /[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]/g;

/** How a chart is drawn. */
export interface RenderOptions {
  /** Default `light`. */
  readonly theme?: Theme | undefined;
}

/** Pixels a unit of the SVG: 2 is sharp on every screen. */
const DEFAULT_ZOOM = 2;
const MAX_ZOOM = 8;

/**
 * A chart as the text of an SVG file.
 *
 * @throws {TypeError} when the specification is not valid Vega-Lite
 *
 * @example
 * ```ts
 * import { trajectoryDrift } from "./charts/mod.ts";
 * import { renderSvg } from "./render.ts";
 * import { tableFromRows } from "./tables.ts";
 * const table = await tableFromRows("drift", [
 *   { model: "m", setting: "2 clip", step: 0, relativeDistance: 0 },
 *   { model: "m", setting: "2 clip", step: 1, relativeDistance: 0.25 },
 * ]);
 * console.log((await renderSvg(trajectoryDrift(table))).slice(0, 4)); // <svg
 * ```
 */
export async function renderSvg(spec: Spec, { theme = "light" }: RenderOptions = {}): Promise<string> {
  const [vega, { compile }] = await Promise.all([loadVega(), loadVegaLite()]);
  useTextWidths(vega);
  const problems: string[] = [];
  const ignore = () => logger,
    note = (...parts: readonly unknown[]) => (problems.push(parts.join(" ")), logger);
  const logger: object = { level: ignore, warn: note, error: note, info: ignore, debug: ignore };
  let compiled;
  try {
    type Arguments = Parameters<typeof compile>;
    const [themed, options] = [withTheme(spec, theme), { logger }] as unknown as Arguments;
    compiled = compile(themed, options).spec;
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : cause;
    throw new TypeError(`Cannot draw: the chart must be valid Vega-Lite, got ${reason}`, { cause });
  }
  if (problems.length > 0) throw new TypeError(`Cannot draw: Vega-Lite says ${problems.join("; ")}`);
  const view = new vega.View(vega.parse(compiled), { renderer: "none", logger: logger as never });
  try {
    const svg = await alone(() => {
      resetIds(vega);
      return view.toSVG();
    });
    if (problems.length > 0) throw new TypeError(`Cannot draw: Vega says ${problems.join("; ")}`);
    return svg.replace(NO_XML, "\ufffd");
  } finally {
    view.finalize();
  }
}

/**
 * A chart as the bytes of a PNG file.
 *
 * @throws {RangeError} when `zoom` is not in (0, 8]
 * @throws {TypeError} when the specification is not valid Vega-Lite
 */
export async function renderPng(
  spec: Spec,
  options: RenderOptions & { readonly zoom?: number | undefined } = {},
): Promise<Uint8Array<ArrayBuffer>> {
  const { zoom = DEFAULT_ZOOM, theme = "light" } = options;
  if (!(zoom > 0 && zoom <= MAX_ZOOM)) {
    throw new RangeError(`Cannot draw: zoom must lie in (0, ${MAX_ZOOM}], got ${zoom}`);
  }
  const svg = await renderSvg(spec, options);
  const { Resvg } = await openResvg();
  const image = new Resvg(svg, {
    background: themeColours(theme).background,
    fitTo: { mode: "zoom", value: zoom },
    font: { fontBuffers: fonts(), defaultFontFamily: "DejaVu Sans", sansSerifFamily: "DejaVu Sans" },
  });
  try {
    const rendered = image.render();
    try {
      return new Uint8Array(rendered.asPng());
    } finally {
      rendered.free();
    }
  } finally {
    image.free();
  }
}

let resvg: ReturnType<typeof loadResvg> | undefined;

/** resvg's module, instantiated once. */
function openResvg(): ReturnType<typeof loadResvg> {
  return resvg ??= (async () => {
    const library = await loadResvg();
    await library.initWasm(readFileSync(packageFile("@resvg/resvg-wasm/index_bg.wasm")));
    return library;
  })();
}

let loadedFonts: Uint8Array[] | undefined;

function fonts(): Uint8Array[] {
  return loadedFonts ??= ["DejaVuSans", "DejaVuSans-Bold"].map((name) =>
    new Uint8Array(readFileSync(packageFile(`dejavu-fonts-ttf/ttf/${name}.ttf`)))
  );
}

let last: Promise<unknown> = Promise.resolve();

/** Runs one after the other: what vega counts it counts for all drawings together. */
function alone<Result>(work: () => Promise<Result>): Promise<Result> {
  const done = last.then(work);
  last = done.catch(() => {}); // who asked for it gets the error
  return done;
}

/** Gradients and clips are numbered on and on: a chart's bytes would depend on what was drawn before. */
function resetIds(vega: Awaited<ReturnType<typeof loadVega>>): void {
  (vega as unknown as { resetSVGDefIds(): void }).resetSVGDefIds();
}

/** Without a canvas vega takes every letter for 0.8 em wide: labels would be cut that fit (vega#2940). */
function useTextWidths(vega: Awaited<ReturnType<typeof loadVega>>): void {
  type TextItem = { readonly fontSize?: number; readonly fontWeight?: string | number };
  type Metrics = { textMetrics: { width: (item: TextItem, text: unknown) => number } };
  (vega as unknown as Metrics).textMetrics.width = ({ fontSize = 11, fontWeight }, text) =>
    textWidth(String(text ?? ""), fontSize, fontWeight === "bold" || Number(fontWeight) >= 600);
}
