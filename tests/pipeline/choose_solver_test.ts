import { afterAll, describe, expect, test } from "bun:test";
import { cpSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { packedLayers, readPackedTensor } from "../../lib/quant/packed/checkpoint.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { parseManifest } from "../../lib/output/record.ts";
import { chooseSolver } from "../../lib/pipeline/choose_solver.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { resolveConfig } from "../../lib/config/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { differences, gaussian, matrix, MODELS, workplace, writeCheckpoint } from "../_checkpoints.ts";
import { ditCheckpoint, dreamCheckpoint, store } from "../_models.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

/** Two blocks of random weights with sequences to calibrate on. */
const dream = store(place.fresh("dream"), dreamCheckpoint());
writeFileSync(
  join(dream, "calibration.jsonl"),
  Array.from(
    { length: 80 },
    (_, i) => `${JSON.stringify({ input_ids: [0, 1, 2, 3, 4, 5, 6, 7].map((j) => (i * 7 + j * j) % 40) })}\n`,
  ).join(""),
);
const dit = store(place.fresh("dit"), ditCheckpoint());
const drawn = store(place.fresh("drawn"), ditCheckpoint());
cpSync(join(MODELS, "glyph-dit", "scheduler_config.json"), join(drawn, "scheduler_config.json"));
/** Nothing that can be run: names and shapes alone. */
const layers = { "blocks.0.fc.weight": matrix(32, 64, gaussian(2048, 1)) };
const unknown = (config: Record<string, unknown>) => writeCheckpoint(place.fresh("unknown"), layers, config);
const language = unknown({ model_type: "other", architectures: ["OtherForCausalLM"] });
const image = unknown({ _class_name: "OtherTransformer2DModel" });

const configOf = (overrides: Record<string, unknown>) =>
  resolveConfig({
    overrides: { num_threads: 1, calibration_samples: 32, group_size: 16, bit_width: 4, ...overrides },
  }).config;

function chosen(input: string, overrides: Record<string, unknown> = {}) {
  using checkpoint = openCheckpoint(input);
  return chooseSolver(checkpoint, configOf(overrides));
}

describe("solver: auto", () => {
  const plan = join(place.path, "plan.json");
  const grid = (bits: number) => ({ bits, group_size: 16, zero_point: "real" });
  const planned = (bits: number) => {
    writeFileSync(
      plan,
      JSON.stringify({ version: 1, layers: { "model.layers.0.self_attn.q_proj.weight": grid(bits) } }),
    );
    return { bit_plan: plan, bit_width: 8 };
  };
  const cases: [what: string, input: string, Record<string, unknown>, solver: string, byWeights: string][] = [
    ["a language model", dream, {}, "best", "clip"],
    ["2 bits", dream, { bit_width: 2 }, "best", "clip"],
    ["8 bits", dream, { bit_width: 8 }, "round", "clip"],
    ["an image model at 8 bits", dit, { bit_width: 8 }, "round", "round"],
    [
      "8 bits, some layers with fewer",
      dream,
      { bit_width: 8, layer_bit_widths: { "q_proj": 4 } },
      "best",
      "clip",
    ],
    ["4 bits, all layers with 8", dream, { layer_bit_widths: { ".*": 8 } }, "round", "clip"],
    ["8 bits, a table with 4", dream, { bit_width: 8, embedding_bits: 4 }, "clip", "clip"],
    ["a plan of fewer bits", dream, planned(3), "best", "clip"],
    ["a budget", dream, { bit_width: 8, target_bits_per_weight: 4 }, "best", "clip"],
    ["min_accuracy", dream, { min_accuracy: 0.9 }, "clip", "clip"],
    [
      "phase 3",
      dream,
      { bit_width: 8, "thermodynamic.transition_optimization.enabled": true },
      "best",
      "clip",
    ],
    ["a target's 8 bits", dream, { bit_width: 8, group_size: 16, target: "llama.cpp" }, "round", "clip"],
    ["an image model without a schedule", dit, {}, "round", "round"],
    ["an image model", drawn, {}, "best", "round"],
    ["an unknown language model", language, {}, "clip", "clip"],
    ["an unknown image model", image, {}, "round", "round"],
  ];
  for (const [what, input, overrides, solver, byWeights] of cases) {
    test(`${what}: ${solver}`, () => {
      const found = chosen(input, overrides);
      expect([found.solver, found.chosen?.byWeights]).toEqual([solver, byWeights] as never);
    });
  }

  test("says which file an image model lacks", () => {
    expect(chosen(dit).chosen!.why).toContain("copy scheduler_config.json");
    const other = store(place.fresh("flow"), ditCheckpoint());
    writeFileSync(join(other, "scheduler_config.json"), '{"_class_name": "FlowMatchEulerDiscreteScheduler"}');
    expect(chosen(other).chosen!.why).toContain("its noise schedule is not supported");
  });

  test("leaves a configured solver as it is, but for phase 3", () => {
    for (const solver of ["round", "clip", "feedback", "best"]) {
      const found = chosen(dream, { solver, bit_width: 8 });
      expect([found.solver, found.chosen]).toEqual([solver, undefined] as never);
    }
    const phase3 = { "thermodynamic.transition_optimization.enabled": true };
    expect(chosen(dream, { solver: "round", ...phase3 }).solver).toBe("best");
    expect(chosen(dream, { solver: "feedback", ...phase3 }).solver).toBe("feedback");
  });
});

describe("a run with solver: auto", () => {
  async function run(input: string, overrides: Record<string, unknown>) {
    const output = place.fresh(), lines: string[] = [];
    const report = await quantizeCheckpoint({
      input,
      output,
      kernels,
      config: configOf(overrides),
      onEvent: ({ kind, message }) => void lines.push(`${kind}: ${message}`),
    });
    const manifest = parseManifest(readFileSync(join(output, "arrowquant.manifest.json"), "utf8"))!;
    return { output, report, lines, manifest };
  }

  /** Packed tensors by name. */
  function tensors(folder: string) {
    using checkpoint = openCheckpoint(folder);
    return new Map(
      [...packedLayers(checkpoint)].map(([name, layer]) =>
        [name, readPackedTensor(checkpoint, layer)] as const
      ),
    );
  }

  test("says in one line what was chosen and why; the manifest has it", async () => {
    const { lines, report, manifest } = await run(dream, {});
    expect(lines.filter((line) => line.startsWith("solver:"))).toEqual([
      "solver: best (fewer than 8 bits, and the model runs here)",
    ]);
    expect(report.solver).toEqual({ name: "best", why: "fewer than 8 bits, and the model runs here" });
    expect(manifest.solver).toEqual({
      name: "best",
      byWeights: "clip",
      roundsEight: true,
      why: "fewer than 8 bits, and the model runs here",
    });
    expect(JSON.parse(manifest.identity.settings).solver).toBe("auto");
    const named = await run(dream, { solver: "best" });
    expect([named.manifest.solver, named.lines.filter((line) => line.startsWith("solver:"))])
      .toEqual([undefined, []]);
    // Without layers of 8 bits and tables they are the same.
    expect(tensors(named.output)).toEqual(tensors((await run(dream, {})).output));
  });

  test("8 bits are those of round", async () => {
    for (const input of [dream, dit]) {
      const [auto, round] = [
        await run(input, { bit_width: 8 }),
        await run(input, { bit_width: 8, solver: "round" }),
      ];
      expect(tensors(auto.output)).toEqual(tensors(round.output));
      expect(differences(auto.output, round.output)).toEqual(["arrowquant.manifest.json"]);
      expect(auto.lines).toContain("solver: round (no layer has fewer than 8 bits)");
    }
  });

  test("layers of 8 bits among others are rounded, the others solved", async () => {
    const mixed = { layer_bit_widths: { "v_proj": 8 } };
    const [auto, round] = [await run(dream, mixed), await run(dream, { ...mixed, solver: "round" })];
    const [own, rounded] = [tensors(auto.output), tensors(round.output)];
    expect(own.size).toBe(14);
    for (const [name, tensor] of own) {
      const isSolved = auto.report.layers.find((layer) => layer.name === name)!.solved !== undefined;
      expect([name, isSolved]).toEqual([name, !name.includes("v_proj")]);
      if (!isSolved) expect(tensor).toEqual(rounded.get(name)!);
    }
  });

  test("a model that cannot run is quantized by its weights, by the rule of its family", async () => {
    for (const [input, solver] of [[language, "clip"], [image, "round"]] as const) {
      const [auto, named] = [await run(input, {}), await run(input, { solver })];
      expect(tensors(auto.output)).toEqual(tensors(named.output));
      expect(auto.lines).toContain(`solver: ${solver} (the model cannot run here)`);
    }
  });

  test("two runs give equal bytes", async () => {
    const [one, two] = [await run(dream, { bit_width: 3 }), await run(dream, { bit_width: 3 })];
    expect(differences(one.output, two.output)).toEqual([]);
  });
});
