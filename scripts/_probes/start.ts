/**
 * `scripts/_probes/start.ts [LAYERS FOLDER]`: prints how long the import of mod.ts takes; with LAYERS, how
 * long writing the whole report of a quantization with so many synthetic layers into FOLDER takes, its
 * libraries' loading included, and how large the page gets.
 */
import { statSync } from "node:fs";
import process from "node:process";

const [layerText, folder] = process.argv.slice(2);
const begin = performance.now();
if (layerText === undefined || folder === undefined) {
  await import("../../mod.ts");
  console.log(JSON.stringify({ milliseconds: performance.now() - begin }));
} else {
  const { tablesOf } = await import("../../lib/analysis/rows.ts");
  const { writeReport } = await import("../../lib/analysis/report/folder.ts");
  const model = "synthetic", setting = "4 clip", bits = 4, weights = 4096 * 4096;
  const names = Array.from({ length: Number(layerText) }, (_, i) => `model.layers.${i}.mlp.up_proj.weight`);
  const page = await writeReport(folder, {
    name: "synthetic",
    title: "synthetic: nothing in it was measured",
    command: "scripts/_probes/start.ts",
    date: new Date(0).toISOString(),
    seconds: 0,
    toolVersion: "",
    environment: {},
    configuration: {},
    summary: [],
    sections: [],
    goals: [],
    skipped: [],
    tables: await tablesOf({
      layers: names.map((name, i) => ({
        model,
        setting,
        name,
        kind: "feed-forward",
        action: "quantized",
        bits,
        groupSize: 64,
        weights,
        bitsPerWeight: 4.5,
        relativeRmsError: 0.08 + 0.01 * Math.sin(i),
        cosine: 0.996 + 0.001 * Math.sin(i),
        maxError: 0.1 + 0.01 * Math.cos(i),
        bytesBefore: 2 * weights,
        bytesAfter: 4.5 * weights / 8,
        milliseconds: 100 + Math.cos(i),
      })),
      codes: names.flatMap((layer, i) =>
        Array.from({ length: 2 ** bits }, (_, code) => ({
          model,
          setting,
          layer,
          bits,
          code,
          count: 1000 + Math.round(100 * Math.sin(i + code)),
        }))
      ),
    }),
  });
  console.log(JSON.stringify({ milliseconds: performance.now() - begin, bytes: statSync(page).size }));
}
