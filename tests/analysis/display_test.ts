import { describe, expect, test } from "bun:test";
import { trajectoryDrift } from "../../lib/analysis/charts/mod.ts";
import { type Display, showChart, showTable } from "../../lib/analysis/display.ts";
import { tableFromRows } from "../../lib/analysis/tables.ts";
import { driftRows, layerRows } from "./_synthetic.ts";

const bundleOf = (display: Display) =>
  (display as unknown as Record<symbol, () => Record<string, unknown>>)[Symbol.for("Jupyter.display")]!();

describe("what a notebook shows", () => {
  test("a chart: Vega-Lite with the schema that front ends know, SVG, HTML and text", async () => {
    const spec = trajectoryDrift(await tableFromRows("drift", driftRows()));
    const shown = await showChart(spec, { theme: "dark" });
    const bundle = bundleOf(shown);
    expect(Object.keys(bundle).sort()).toEqual([
      "application/vnd.vegalite.v5+json",
      "image/svg+xml",
      "text/html",
      "text/plain",
    ]);
    const chart = bundle["application/vnd.vegalite.v5+json"] as Record<string, unknown>;
    expect(chart["$schema"]).toBe("https://vega.github.io/schema/vega-lite/v5.json");
    expect((chart["config"] as Record<string, unknown>)["background"]).toBe("#16191d");
    expect(spec["$schema"]).toContain("/v6.json");
    expect(bundle["image/svg+xml"]).toContain("</svg>");
    // Front ends take <svg> out of HTML that they do not trust; a picture stays.
    const [, alt, data] = /^<img alt="([^"]*)" src="data:image\/svg\+xml;base64,([A-Za-z0-9+/=]+)">$/.exec(
      String(bundle["text/html"]),
    )!;
    expect(alt).toBe("Drift of free-running trajectories");
    expect(new TextDecoder().decode(Uint8Array.fromBase64(data!))).toBe(String(bundle["image/svg+xml"]));
    expect(String(shown)).toBe("Drift of free-running trajectories");
  });

  test("a table: its first rows, chosen columns, nothing executable", async () => {
    const rows = layerRows(30).map((row, i) => i === 0 ? { ...row, name: "<script>alert(1)</script>" } : row);
    const table = await tableFromRows("layers", rows);
    const bundle = bundleOf(showTable(table, { columns: ["name", "relativeRmsError"], rows: 3 }));
    expect(bundle["text/html"]).toContain("&lt;script&gt;alert(1)");
    expect(bundle["text/html"]).not.toContain("<script");
    expect(String(bundle["text/html"]).match(/<tr>/g)!.length).toBe(4);
    expect(String(bundle["text/plain"]).split("\n").at(-1)).toBe("3 of 30 rows");
    expect(String(bundleOf(showTable(table))["text/html"])).not.toContain("undefined");
    expect(() => showTable(table, { columns: ["nmae"] })).toThrow('got "nmae"');
  });
});
