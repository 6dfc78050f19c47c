/** θ from calibration to run time: what the pipeline makes, guards, stores, and what models do with it. */
import { afterAll, describe, expect, test } from "bun:test";
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { DEFAULT_CONFIG, resolveConfig } from "../../lib/config/mod.ts";
import { CheckpointError, WeightsError } from "../../lib/errors.ts";
import {
  type DitModel,
  generateImages,
  loadDit,
  loadDream,
  loadModel,
  loadScheduler,
  loadStoredModel,
  storedTimeParameters,
} from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { fewestWithin, groupsByInputs, orderByStaticCost } from "../../lib/phases/activation_grids.ts";
import { layerErrors } from "../../lib/eval/mod.ts";
import { layerGuard, observeParts } from "../../lib/phases/activations.ts";
import { loadCalibration } from "../../lib/calibration/mod.ts";
import { phaseSettings } from "../../lib/phases/settings.ts";
import { loadPhaseModel, type PhaseContext } from "../../lib/phases/context.ts";
import { fitSampler } from "../../lib/phases/sampler.ts";
import { type PhaseSettings, runPhases } from "../../lib/phases/mod.ts";
import { denseWeights } from "../../lib/solve/dense_weights.ts";
import { meanStepKl, StepKlMeter } from "../../lib/calibration/step_kl.ts";
import { dequantize, quantize } from "../../lib/quant/mod.ts";
import { openCheckpoint, SIDECAR_FILE } from "../../lib/tensor/mod.ts";
import {
  activationGrid,
  equalTimeGroups,
  type LayerParameters,
  maskRatioAxis,
  readTimeParameters,
  TimeParameters,
  timestepAxis,
  writeTimeParameters,
} from "../../lib/time/mod.ts";
import { MODELS, workplace } from "../_checkpoints.ts";
import { allInt8Kernels } from "../_kernels.ts";
import { ditCheckpoint, dreamCheckpoint, store } from "../_models.ts";
import { roundedToGrid } from "../_reference.ts";
import { thrown } from "../tensor/_files.ts";

const kernels = await openKernels();
const place = workplace();
afterAll(() => {
  kernels.close();
  place.remove();
});

const DREAM = join(MODELS, "dream-mini"), DIT = join(MODELS, "glyph-dit");

async function rounded(path: string, source: string) {
  const checkpoint = openCheckpoint(path);
  const calibrated = await loadCalibration(loadModel(path, kernels), { source, samples: 48, seed: 3 });
  const weights = new Map(
    calibrated.model.stages.flatMap(({ layers }) =>
      layers.filter(({ name }) => /blocks|layers/.test(name)).map((layer) => {
        const { rows, cols } = layer.weights, data = denseWeights(kernels, layer);
        const options = { bits: 2, groupSize: 0, solver: "round" } as const;
        return [layer.name, quantize(kernels, { data, dtype: "F32" }, rows, cols, options)] as const;
      })
    ),
  );
  const context: PhaseContext = { checkpoint, calibrated, kernels, source, seed: 3 };
  return { context, weights };
}
const dream = await rounded(DREAM, join(DREAM, "calibration.jsonl"));
const glyphs = await rounded(DIT, join(DIT, "calibration_images.safetensors"));
const run = ({ context, weights }: typeof dream, settings: PhaseSettings) =>
  runPhases(context, weights, settings);

const quantized = async (made: Parameters<typeof store>[1]) => {
  const output = place.fresh(), input = store(place.fresh(), made);
  const { config } = resolveConfig({ overrides: { solver: "clip", bit_width: 4, group_size: 16 } });
  await quantizeCheckpoint({ input, output, config, kernels });
  return output;
};
const small = await quantized(dreamCheckpoint());
const smallDit = await quantized(ditCheckpoint());
copyFileSync(join(DIT, "scheduler_config.json"), join(smallDit, "scheduler_config.json"));
const masks = equalTimeGroups(maskRatioAxis(10), 2);
const ids = Int32Array.from({ length: 3 * 8 }, (_, i) => (i * 7) % 49);

describe("rounded activations at run time", () => {
  /** θ that rounds what one layer reads. */
  const thetaOf = (own: LayerParameters, name: string) =>
    new TimeParameters(masks, new Map([[name, own]]), "f");
  const activation = {
    bits: 8,
    scale: Float32Array.of(0.02, 0.05),
    zeroPoint: Int32Array.of(128, 90),
  } as const;

  test("are the float product of rounded inputs, by integer kernels of every instruction set", async () => {
    for (const { kernels: each, name } of await allInt8Kernels()) {
      const plain = loadDream(small, each), layer = plain.parts.head;
      for (const own of [{ activation }, { perToken: 8 }, { perToken: 4 }] as LayerParameters[]) {
        let input = new Float32Array(0);
        plain.forward(ids, 3, {
          observe: (seen, x, rows) => {
            if (seen.name === layer.name) input = x.slice(0, rows * seen.weights.cols);
          },
        });
        const packed = "packed" in layer.weights ? dequantize(each, layer.weights) : undefined;
        const { rows, cols } = layer.weights, dense = packed ?? denseWeights(each, layer);
        const out = loadDream(small, each, { timeParameters: thetaOf(own, layer.name) }).forward(ids, 3, {
          t: 0.9,
        });
        for (let token = 0; token < ids.length; token++) {
          const x = input.subarray(token * cols, (token + 1) * cols);
          const bits = own.perToken ?? 8;
          const grid = own.activation === undefined
            ? activationGrid(Math.min(0, ...x), Math.max(0, ...x), bits)
            : { scale: activation.scale[1]!, zeroPoint: activation.zeroPoint[1]! };
          const codes = roundedToGrid(x, grid, bits);
          for (let row = 0; row < rows; row++) {
            let wanted = 0, size = 0;
            for (let k = 0; k < cols; k++) {
              wanted += codes[k]! * dense[row * cols + k]!;
              size += Math.abs(codes[k]! * dense[row * cols + k]!);
            }
            // A grid's whole zero point may be the next one, which moves a code by one where it lies between
            // two.
            const slack = own.perToken === undefined ? 1e-5 * size + 1e-6 : 0.05 * size + 0.05;
            expect([name, Math.abs(out[token * rows + row]! - wanted) <= slack]).toEqual([name, true]);
          }
        }
      }
    }
  });

  test("inputs that are not finite are refused, and the layer is named", () => {
    const plain = loadDream(small, kernels);
    const first = plain.parts.blocks[0]!;
    first.attentionNorm.fill(NaN);
    const name = first.query.name;
    const model = loadDream(small, kernels, { timeParameters: thetaOf({ activation }, name) });
    model.parts.blocks[0]!.attentionNorm.fill(NaN);
    const error = thrown(() => model.forward(ids, 3, { t: 0.5 }));
    expect(error).toBeInstanceOf(WeightsError);
    expect(error.message).toContain(name);
  });

  test("a time outside the axis is refused", () => {
    const name = loadDream(small, kernels).parts.head.name;
    const model = loadDream(small, kernels, { timeParameters: thetaOf({ perToken: 8 }, name) });
    for (const t of [0, -0.1, 1.5, NaN]) expect(() => model.forward(ids, 3, { t })).toThrow(RangeError);
  });

  test("bad θ", () => {
    expect(() => thetaOf({ perToken: 5 as 4 }, "x")).toThrow("activation bits must be 4 or 8, got 5");
    expect(() => thetaOf({ perToken: 8, activation }, "x")).toThrow("got both");
    const numbers = (...values: number[]) => Float32Array.from(values);
    const good = { gain: numbers(1, 1), bias: numbers(0, 0), noiseVariance: numbers(0, 0) };
    const withSampler = (change: object) => () =>
      new TimeParameters(masks, new Map(), "f", { ...good, ...change });
    expect(withSampler({})).not.toThrow();
    for (
      const change of [{ gain: numbers(1, 0) }, { bias: numbers(NaN, 0) }, { noiseVariance: numbers(-1, 0) }]
    ) {
      expect(withSampler(change)).toThrow(RangeError);
    }
    expect(withSampler({ gain: numbers(1) })).toThrow(TypeError);
  });
});

describe("static grids", () => {
  test("as few layers as needed take grids of each token's own", async () => {
    const activations = { groups: 3, bits: 4 } as const;
    const meter = new StepKlMeter(dream.context.calibrated);
    const klOf = async (own: PhaseSettings["activations"]) => {
      const { model, report } = await run(dream, { activations: own });
      return { kl: meanStepKl(meter.measure(loadPhaseModel(dream.context, model))), model, report };
    };
    const all = await klOf(activations), none = await klOf({ ...activations, isPerToken: true });
    expect([all.report.perToken.length, none.report.perToken.length]).toEqual([0, dream.weights.size]);
    const some = await klOf({ ...activations, perTokenLimit: 1.1 });
    const unrounded = meanStepKl(meter.measure(loadPhaseModel(dream.context, { weights: dream.weights })));
    expect(some.kl).toBeLessThanOrEqual(1.1 * Math.max(none.kl, unrounded));
    expect(all.kl).toBeGreaterThan(1.1 * Math.max(none.kl, unrounded));
    for (const [name, own] of some.model.timeParameters!.layers) {
      expect([own.perToken, own.activation === undefined]).toEqual(
        some.report.perToken.includes(name) ? [4, true] : [undefined, false],
      );
    }
    const loose = await klOf({ ...activations, perTokenLimit: 1e6 });
    expect(loose.report.perToken).toEqual([]);
  });

  test("the fewest within a limit, where the cost falls with each", () => {
    for (const count of [1, 2, 3, 7, 16]) {
      for (let wanted = 0; wanted <= count; wanted++) {
        const asked: number[] = [];
        const costOf = (changed: number) => {
          asked.push(changed);
          return changed >= wanted ? 1 : 2;
        };
        expect(fewestWithin(count, 1, costOf)).toBe(wanted);
        expect(asked.length).toBeLessThanOrEqual(2 + 2 * Math.ceil(Math.log2(count + 1)));
      }
    }
    expect(fewestWithin(5, 0, () => 1)).toBe(5);
  });

  test("a layer with a grid far too wide comes first", () => {
    const loaded = loadPhaseModel(dream.context, { weights: dream.weights });
    const grids = new Map([...dream.weights.keys()].map((name) => [
      name,
      {
        bits: 8,
        scale: Float32Array.of(name.includes("layers.2.mlp.down") ? 1e4 : 0.05),
        zeroPoint: Int32Array.of(128),
      } as const,
    ]));
    const order = orderByStaticCost(dream.context, loaded, grids, equalTimeGroups(maskRatioAxis(1000), 1));
    expect(order[0]).toEqual(["model.layers.2.mlp.down_proj.weight"]);
    expect(order.flat().sort()).toEqual([...dream.weights.keys()].sort());
  });

  test("an input that is not finite is an error that names the layer, whoever rounds it", () => {
    const name = "model.layers.1.mlp.up_proj.weight",
      grid = { bits: 8, zeroPoint: Int32Array.of(128) } as const;
    const narrow = new Map([[name, { ...grid, scale: Float32Array.of(0.05) }]]);
    const wide = new Map([[name, { ...grid, scale: Float32Array.of(0.06) }]]);
    const groups = equalTimeGroups(maskRatioAxis(1000), 1), loaded = loadPhaseModel(dream.context, {});
    // NaN in the first value that the layer reads
    const { model } = loaded as Extract<typeof loaded, { kind: "dream" }>,
      forward = model.forward.bind(model);
    model.forward = (ids, batch, options) =>
      forward(ids, batch, {
        ...options,
        observe: (layer, x, rows) => {
          const own = x.slice();
          if (layer.name === name) own[0] = NaN;
          options?.observe?.(layer, own, rows);
        },
      });
    const parameters = new TimeParameters(groups, new Map([[name, { activation: narrow.get(name)! }]]), "");
    const weights = new Map([[name, dream.weights.get(name)!]]);
    const guard = layerGuard(dream.context, groups, narrow, wide);
    const roundings: (() => void)[] = [
      () => orderByStaticCost(dream.context, loaded, narrow, groups),
      () => layerErrors(dream.context, loaded, [{ weights, timeParameters: parameters }], groups),
      () => observeParts(dream.context, loaded, "heldOut", guard.observe),
    ];
    for (const rounding of roundings) {
      const error = thrown(rounding);
      expect(error).toBeInstanceOf(WeightsError);
      expect(error.message).toContain(`got NaN or infinity in what "${name}" reads`);
    }
  });

  test("adaptive groups are as many as asked, kept only if they help, and no more than what was seen", async () => {
    const activations = { groups: 4, bits: 4, grouping: "adaptive" } as const;
    const { report } = await run(dream, { activations });
    const isEqual = report.boundaries!.join() === "0,250,500,750,1000";
    expect(report.boundaries!.length).toBe(5);
    expect(report.warnings.some((text) => text.startsWith("adaptive time groups were rejected"))).toBe(
      isEqual,
    );
    const loaded = loadPhaseModel(dream.context, { weights: dream.weights });
    const names = new Set(dream.weights.keys());
    expect(groupsByInputs(dream.context, loaded, names, maskRatioAxis(1000), 100)).toBeUndefined();
  });

  test("bad settings", async () => {
    const refused: [PhaseSettings, string][] = [
      [
        { activations: { groups: 3, bits: 8, perTokenLimit: 0.9 } },
        "perTokenLimit must be at least 1, got 0.9",
      ],
      [
        { activations: { groups: 3, bits: 8, perTokenLimit: NaN } },
        "perTokenLimit must be at least 1, got NaN",
      ],
      [{ activations: { groups: 3, bits: 8 }, output: { groups: 4 } }, "the same groups, got 3 and 4"],
      [{ output: {} }, "must have a number of time groups, got none"],
      [{ output: { groups: 2 }, timeScales: { groups: 2 } }, "got both"],
      [{ output: { groups: 2, markovWeight: 101 } }, "markovWeight must lie in [0, 100], got 101"],
      [{ output: { groups: 2, markovWeight: NaN } }, "markovWeight must lie in [0, 100], got NaN"],
      [{ timeScales: { groups: 0 } }, "groups must be a whole number from 1 to 100, got 0"],
      [{ sampler: { groups: 2 } }, "the model must be an image model"],
    ];
    for (const [settings, message] of refused) await expect(run(dream, settings)).rejects.toThrow(message);
    const short = await rounded(withTimesteps(4), "synthetic");
    await expect(run(short, { sampler: { groups: 5 } })).rejects.toThrow(
      "at most the 4 bins of the axis, got 5",
    );
  });
});

/** A small DiT with so many timesteps. */
function withTimesteps(timesteps: number): string {
  const folder = store(place.fresh(), ditCheckpoint());
  const config = JSON.parse(readFileSync(join(DIT, "scheduler_config.json"), "utf8")) as object;
  writeFileSync(
    join(folder, "scheduler_config.json"),
    JSON.stringify({ ...config, num_train_timesteps: timesteps }),
  );
  return folder;
}

describe("parameters in closed form", () => {
  test("are kept where the held-out step KL falls, and only there", async () => {
    const meter = new StepKlMeter(glyphs.context.calibrated);
    for (const settings of [{ output: { groups: 3 } }, { timeScales: { groups: 3 } }] as PhaseSettings[]) {
      const { model, report } = await run(glyphs, settings);
      const { kept, heldOutBefore, heldOutAfter } = (report.output ?? report.timeScales)!;
      expect(kept).toBe(true); // rounding to nearest leaves much to correct
      expect(heldOutAfter).toBeLessThan(heldOutBefore);
      const again = meanStepKl(meter.measure(loadPhaseModel(glyphs.context, model)));
      expect(again).toBe(heldOutAfter);
      expect(model.weights).toBe(glyphs.weights);
    }
    // On the language model ten groups lower each layer's own error and not the model's.
    const { model, report } = await run(dream, { output: { groups: 10 } });
    expect([report.output!.kept, model.timeParameters]).toEqual([false, undefined]);
    expect(report.warnings.join()).toContain("the output correction was rejected: held-out step KL");
    const forced = await run(dream, { output: { groups: 3 }, isGuarded: false });
    expect(forced.model.timeParameters!.layers.size).toBe(dream.weights.size);
  });

  test("the Gauss-Markov prior brings neighbouring groups together", async () => {
    const weights = new Map([...glyphs.weights].slice(0, 4));
    const roughness = async (markovWeight: number) => {
      const { model } = await run({ ...glyphs, weights }, {
        output: { groups: 4, markovWeight },
        isGuarded: false,
      });
      let sum = 0;
      for (const { output } of model.timeParameters!.layers.values()) {
        const rows = output!.bias.length / 4;
        for (let i = rows; i < output!.bias.length; i++) {
          sum += (output!.bias[i]! - output!.bias[i - rows]!) ** 2;
        }
      }
      return sum;
    };
    const [none, some, much] = [await roughness(0), await roughness(1), await roughness(100)];
    expect(some).toBeLessThan(none);
    expect(much).toBeLessThan(0.05 * none);
  });

  test("the configuration asks for them", () => {
    expect(phaseSettings(DEFAULT_CONFIG, true)).toEqual({
      activations: { groups: 10, bits: 8, grouping: "equal", perTokenLimit: 1.05 },
      output: undefined,
      timeScales: undefined,
      sampler: undefined,
      validation: undefined,
      smoothing: undefined,
      refinement: undefined,
    });
    const { config } = resolveConfig({
      overrides: {
        solver: "clip",
        time_groups: "adaptive",
        per_token_limit: null,
        output_correction: true,
        sampler_correction: true,
        num_time_groups: 3,
        "thermodynamic.transition_optimization.markov_weight": 2,
      },
    });
    const own = phaseSettings(config, true);
    expect(own.activations).toEqual({ groups: 3, bits: 8, grouping: "adaptive", perTokenLimit: undefined });
    expect([own.output, own.sampler]).toEqual([{ groups: 3, markovWeight: 2 }, { groups: 3 }]);
    expect(phaseSettings(config, false).sampler).toBeUndefined();
    expect(() =>
      resolveConfig({ overrides: { solver: "clip", output_correction: true, time_scales: "per_group" } })
    ).toThrow(
      "shared with output_correction true",
    );
  });
});

describe("the sampler's correction", () => {
  const { model } = loadModel(DIT, kernels) as { readonly model: DitModel };
  const groups = equalTimeGroups(timestepAxis(1000), 2), scheduler = loadScheduler(DIT);
  /** A model whose last layer has a gain and a bias of its own. */
  const bent = (gain: number, bias: number, sampler?: ConstructorParameters<typeof TimeParameters>[3]) => {
    const { name, weights: { rows } } = model.parts.output2;
    const output = {
      gain: new Float32Array(2 * rows).fill(gain),
      bias: new Float32Array(2 * rows).fill(bias),
    };
    return loadDit(DIT, kernels, {
      timeParameters: new TimeParameters(groups, new Map([[name, { output }]]), "f", sampler),
    });
  };

  test("finds gain and bias that were put in, and takes them out", () => {
    // The layer's own bias is behind the gain: gain · ŵx + bias + b.
    const folder = (own: DitModel) => ({ kind: "dit", folder: DIT, model: own }) as const;
    const { sampler, before, after } = fitSampler(glyphs.context, folder(bent(1.25, 0.1)), groups);
    for (const gain of sampler.gain) expect(Math.abs(gain - 1.25)).toBeLessThan(0.02);
    expect(after).toBeLessThan(0.1 * before);
    const labels = [1, 2], options = { steps: 5, seed: 4, sampler: "ddim" } as const;
    const wanted = generateImages(model, scheduler, labels, options).slice();
    const distance = (own: DitModel) =>
      generateImages(own, scheduler, labels, options).reduce((sum, v, i) => sum + (v - wanted[i]!) ** 2, 0);
    expect(distance(bent(1.25, 0.1, sampler))).toBeLessThan(0.3 * distance(bent(1.25, 0.1)));
  });

  test("one that changes nothing gives the same images; noise variance narrows a step of DDPM", () => {
    const of = (gain: number, bias: number, variance: number) => ({
      gain: new Float32Array(2).fill(gain),
      bias: new Float32Array(2).fill(bias),
      noiseVariance: new Float32Array(2).fill(variance),
    });
    const options = { timesteps: [600, 300], seed: 4, sampler: "ddpm" } as const;
    const drawn = (own: DitModel) => generateImages(own, scheduler, [3], options).slice();
    const plain = drawn(bent(1, 0));
    expect(drawn(bent(1, 0, of(1, 0, 0)))).toEqual(plain);
    expect(drawn(bent(1, 0, of(1, 0, 0.5)))).not.toEqual(plain);
    // One step: what is added is the noise times the deviation, here worked out by hand.
    const [from, to] = [scheduler.alphaBar(600), scheduler.alphaBar(300)], n = 4;
    const x = new Float32Array(n).fill(0.2), noise = Float32Array.of(1, -1, 2, 0.5);
    const step = (variance: number) => {
      const samples = x.slice(), correction = { gain: 2, bias: 0, noiseVariance: variance };
      scheduler.stepDdpm(samples, new Float32Array(n).fill(0.1), 600, 300, noise, undefined, correction);
      return samples;
    };
    const NOISE = 0.02, beta = 1 - from / to, ofEpsilon = beta / Math.sqrt((1 - from) * from / to);
    const large = scheduler.config.varianceType.startsWith("fixed_large");
    const variance = large ? beta : (1 - to) / (1 - from) * beta,
      narrow = variance - ofEpsilon ** 2 * NOISE / 4;
    const mean = step(1e9)[0]!; // noise that leaves nothing of the step's own
    expect(narrow).toBeGreaterThan(0);
    step(NOISE).forEach((value, i) => {
      expect(Math.abs(value - mean - Math.sqrt(narrow) * noise[i]!)).toBeLessThan(1e-5);
    });
  });
});

describe("beside a checkpoint", () => {
  const activation = {
    bits: 8,
    scale: Float32Array.of(0.02, 0.05),
    zeroPoint: Int32Array.of(128, 90),
  } as const;
  const sampler = {
    gain: Float32Array.of(1, 1.5),
    bias: Float32Array.of(0, 0.25),
    noiseVariance: Float32Array.of(0, 0.125),
  };

  test("time parameters come back with grids a token and the sampler's correction", async () => {
    const checkpoint = openCheckpoint(smallDit);
    const { modelFingerprint } = await import("../../lib/time/mod.ts");
    const timesteps = loadScheduler(smallDit).config.trainTimesteps;
    const [first, second] = [
      loadDit(smallDit, kernels).parts.blocks[0]!.query,
      loadDit(smallDit, kernels).parts.blocks[0]!.key,
    ];
    const layers = new Map<string, LayerParameters>([[first.name, { activation }], [second.name, {
      perToken: 8,
    }]]);
    const groups = equalTimeGroups(timestepAxis(timesteps), 2);
    writeTimeParameters(smallDit, new TimeParameters(groups, layers, modelFingerprint(checkpoint), sampler));
    const stored = storedTimeParameters(checkpoint)!;
    expect(stored.sampler).toEqual(sampler);
    expect(stored.layers.get(second.name)!.perToken).toBe(8);
    expect(stored.layers.get(first.name)!.activation).toEqual(activation);
    const { model } = loadStoredModel(smallDit, kernels);
    expect(model.timeParameters!.groups.count).toBe(2);
    expect(thrown(() => storedTimeParameters(checkpoint, { groups: 3 })).message).toContain(
      "must have 3 time groups, got 2",
    );
    expect(() => storedTimeParameters(checkpoint, { groups: 3 })).toThrow(CheckpointError);
    // Of a quantization with other scales.
    const other = await quantized(ditCheckpoint());
    const { config } = resolveConfig({ overrides: { solver: "clip", bit_width: 8, group_size: 32 } });
    const another = place.fresh();
    await quantizeCheckpoint({
      input: store(place.fresh(), ditCheckpoint()),
      output: another,
      config,
      kernels,
    });
    mkdirSync(another, { recursive: true });
    for (const name of [SIDECAR_FILE, "scheduler_config.json"]) {
      copyFileSync(join(smallDit, name), join(another, name));
    }
    const error = thrown(() => storedTimeParameters(openCheckpoint(another)));
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.message).toContain("it must belong to the model beside it");
    expect(storedTimeParameters(openCheckpoint(other))).toBeUndefined();
  });

  test("a file with some of the sampler's numbers, or other bits a token, is refused", () => {
    const path = join(smallDit, SIDECAR_FILE), good = readFileSync(path), text = good.toString("latin1");
    const expected = {
      fingerprint: storedTimeParameters(openCheckpoint(smallDit))!.fingerprint,
      layers: new Map(
        [...storedTimeParameters(openCheckpoint(smallDit))!.layers.keys()].map((
          name,
        ) => [name, { rows: 1, weightGroups: 1 }]),
      ),
    };
    const folder = place.fresh();
    mkdirSync(folder);
    const broken = (bytes: Uint8Array) => {
      writeFileSync(join(folder, SIDECAR_FILE), bytes);
      return thrown(() => readTimeParameters(folder, expected)).message;
    };
    const renamed = Buffer.from(text.replace("sampler.noise_variance", "sampler.noise_variancf"), "latin1");
    expect(broken(renamed)).toContain("part of a layer");
    const at = good.indexOf(Buffer.from(Int32Array.of(8).buffer), text.indexOf("__metadata__"));
    expect(at).toBeGreaterThan(0);
    const bits = Buffer.from(good);
    bits.writeInt32LE(5, at);
    expect(broken(bits)).toContain("activation_per_token 4 or 8, got 5");
  });
});
