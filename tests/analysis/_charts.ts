/** Every chart on synthetic tables, by name; run as a program it prints the digests of their files. */
import { createHash } from "node:crypto";
import process from "node:process";
import * as charts from "../../lib/analysis/charts/mod.ts";
import { renderPng, renderSvg } from "../../lib/analysis/render.ts";
import { tableFromRows } from "../../lib/analysis/tables.ts";
import { layerRows, syntheticTables } from "./_synthetic.ts";

export async function everyChart(): Promise<Record<string, charts.Spec>> {
  const { layers, time, phases, peers, kernels, samples, drift, losses, codes } = await syntheticTables();
  const many = async (count: number) => await tableFromRows("layers", layerRows(count));
  return {
    errorByLayer: charts.errorByLayer(layers),
    cosineByLayer: charts.errorByLayer(layers, { metric: "cosine" }),
    errorOf300Layers: charts.errorByLayer(await many(300)),
    errorOf10000Layers: charts.errorByLayer(await many(10_000)),
    errorOverTime: charts.errorOverTime(time),
    transitionKl: charts.transitionKl(time),
    timeParameters: charts.timeParameters(time),
    accuracyByBits: charts.accuracyByBits(peers),
    klByBits: charts.accuracyByBits(peers, { metric: "kl" }),
    phases: charts.phasesAgainstBaseline(phases),
    overhead: charts.phasesAgainstBaseline(phases, { metric: "overhead" }),
    lossHistory: charts.lossHistory(losses),
    codeHistogram: charts.codeHistogram(codes),
    kernelRoofline: charts.kernelRoofline(kernels),
    kernelThroughput: charts.kernelThroughput(kernels),
    trajectoryDrift: charts.trajectoryDrift(drift),
    sampleSheet: charts.sampleSheet(samples),
  };
}

export async function digests(): Promise<Record<string, string>> {
  const found: Record<string, string> = {};
  const digest = (data: string | Uint8Array) => createHash("sha256").update(data).digest("hex");
  for (const [i, [name, spec]] of Object.entries(await everyChart()).entries()) {
    found[`${name}.svg`] = digest(await renderSvg(spec));
    // Pixels take most of the time: some do.
    if (i % 4 === 0) found[`${name}.png`] = digest(await renderPng(spec, { theme: "dark", zoom: 1 }));
  }
  return found;
}

if (import.meta.main) process.stdout.write(JSON.stringify(await digests()));
