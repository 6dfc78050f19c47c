import { afterAll, describe, expect, test } from "bun:test";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { crc32, inflateSync } from "node:zlib";
import { resolveConfig } from "../../lib/config/mod.ts";
import { CheckpointError, WeightsError } from "../../lib/errors.ts";
import {
  encodePng,
  generateImages,
  imageNoise,
  imageSteps,
  loadDit,
  loadModel,
  loadScheduler,
  RandomStream,
  Scheduler,
  tileImages,
} from "../../lib/models/mod.ts";
import { schedulerConfig } from "../../lib/models/schedulers.ts";
import { ConfigFields } from "../../lib/models/model_config.ts";
import { openKernels, withThreads } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { SafetensorsFile } from "../../lib/tensor/mod.ts";
import { MODELS, workplace } from "../_checkpoints.ts";
import { allKernels, gaussians } from "../_kernels.ts";
import { ditCheckpoint, type ImageSizes, randomTensor, SMALL_IMAGE, store } from "../_models.ts";
import { type ImageModel, imagePrediction, readWeights, relativeError } from "../_reference.ts";
import { thrown } from "../tensor/_files.ts";

const GLYPHS = join(MODELS, "glyph-dit");
const place = workplace();
const kernels = await openKernels({ threads: 1 });
const everyKernels = await allKernels();
afterAll(() => {
  for (const { kernels: each } of everyKernels) each.close();
  kernels.close();
  place.remove();
});

const scheduler = (fields: Record<string, unknown> = {}) =>
  new Scheduler(schedulerConfig(new ConfigFields("test", fields)));

function reference(sizes: ImageSizes): ImageModel {
  return { ...sizes, width: sizes.heads * sizes.headSize, epsilon: 1e-5 };
}

describe("golden outputs of glyph-dit", () => {
  using golden = SafetensorsFile.open(join(GLYPHS, "golden.safetensors"));
  const floats = (name: string) => new Float32Array(golden.read(name).buffer);
  const integers = (name: string) => Int32Array.from(new BigInt64Array(golden.read(name).buffer), Number);
  const [sample, timestep, label, epsilon] = [
    floats("sample"),
    integers("timestep"),
    integers("class_label"),
    floats("epsilon"),
  ];
  const [noise, ddimLabels, timesteps, images] = [
    floats("ddim.noise"),
    integers("ddim.class_label"),
    integers("ddim.timesteps"),
    floats("ddim.image"),
  ];

  for (const { name, kernels: each } of everyKernels) {
    test(`${name}: ε to 2e-4, image for image`, () => {
      const got = loadDit(GLYPHS, each).forward(sample, timestep, label);
      for (let i = 0; i < 6; i++) {
        const part = [i * 256, (i + 1) * 256] as const;
        expect(relativeError(got.subarray(...part), epsilon.subarray(...part))).toBeLessThan(2e-4);
      }
    });

    if (name.endsWith("scalar")) continue; // slow: the oracle's ε, above, is what its images would be made of
    const count = 8;
    test(`${name}: DDIM images to 1e-3`, () => {
      const drawn = generateImages(
        loadDit(GLYPHS, each),
        loadScheduler(GLYPHS),
        ddimLabels.subarray(0, count),
        {
          steps: 10,
          noise: noise.slice(0, count * 256),
        },
      );
      for (const [i, value] of drawn.entries()) expect(Math.abs(value - images[i]!)).toBeLessThan(1e-3);
    });
  }

  test("timesteps are those of the protocol", () => {
    expect([...loadScheduler(GLYPHS).timesteps(10)]).toEqual([...timesteps]);
  });
});

describe("forward pass", () => {
  const count = 3;
  const compare = (path: string, sizes: ImageSizes) => {
    const elements = sizes.channels * sizes.size ** 2;
    const samples = gaussians(8, count * elements);
    const [times, labels] = [[999, 0, 417], [0, sizes.classes, 3]];
    const got = loadDit(path, withThreads(kernels, 2)).forward(samples, times, labels).slice();
    const weights = readWeights(path, kernels);
    const wanted = times.flatMap((time, i) =>
      imagePrediction(
        weights,
        reference(sizes),
        samples.subarray(i * elements, (i + 1) * elements),
        time,
        labels[i]!,
      )
    );
    return relativeError(got, wanted);
  };

  const variants: [string, ImageSizes][] = [
    ["a learned variance and three channels", SMALL_IMAGE],
    ["neither biases in attention nor a learned variance", {
      ...SMALL_IMAGE,
      attentionBias: false,
      outputChannels: 3,
    }],
    ["weights in a norm and patches of 4", {
      ...SMALL_IMAGE,
      normHasWeights: true,
      patch: 4,
      channels: 1,
      outputChannels: 1,
    }],
  ];
  for (const [name, sizes] of variants) {
    test(`agrees with the reference with ${name}`, () => {
      expect(compare(store(place.fresh(), ditCheckpoint(sizes)), sizes)).toBeLessThan(1e-5);
    });
  }

  for (const dtype of ["F16", "BF16"] as const) {
    test(`agrees with the reference on ${dtype}`, () => {
      expect(compare(store(place.fresh(), ditCheckpoint(SMALL_IMAGE, dtype)), SMALL_IMAGE)).toBeLessThan(
        1e-5,
      );
    });
  }

  for (const bits of [2, 3, 4, 8]) {
    test(`agrees with the reference on ${bits} bits, every matrix packed`, async () => {
      const output = place.fresh();
      const { config } = resolveConfig({
        overrides: { solver: "clip", bit_width: bits, group_size: 16, skip_sensitive_layers: false },
      });
      await quantizeCheckpoint({ input: store(place.fresh(), ditCheckpoint()), output, config, kernels });
      expect(compare(output, SMALL_IMAGE)).toBeLessThan(1e-5);
    });
  }

  test("takes a stored buffer of positions for what it is", () => {
    const path = store(place.fresh(), ditCheckpoint(), {
      tensors: { "pos_embed.pos_embed": randomTensor([1, 16, 24], 1, "F32", 1) },
    });
    expect(compare(path, SMALL_IMAGE)).toBeLessThan(1e-5);
  });

  test("sees the inputs of every linear layer", () => {
    const seen = new Set<string>();
    const model = loadDit(store(place.fresh(), ditCheckpoint()), kernels);
    model.forward(new Float32Array(192), [5], [0], { observe: ({ name }) => seen.add(name) });
    expect(seen.size).toBe(1 + 2 * 9 + 2);
  });
});

describe("what is not a model or an input", () => {
  const made = ditCheckpoint();

  test("tensors and configuration that do not fit are refused, listed", () => {
    const failure = (changes: Parameters<typeof store>[2]) =>
      thrown(() => loadModel(store(place.fresh(), made, changes), kernels));
    const error = failure({
      tensors: { "proj_out_1.bias": undefined, "vae.weight": randomTensor([1], 1, "F32", 1) },
    });
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.message).toContain('missing "proj_out_1.bias"; unknown "vae.weight"');
    expect(failure({ config: { out_channels: 3 } }).message).toContain(
      '"proj_out_2.weight" must be [12, 24], got [24, 24]',
    );
    for (
      const [key, value] of [
        ["sample_size", 9],
        ["sample_size", 2 ** 30],
        ["out_channels", 4],
        ["activation_fn", "geglu"],
        ["norm_type", "layer_norm"],
        ["num_attention_heads", -2],
        ["attention_head_dim", 1],
      ] as const
    ) {
      const fault = failure({ config: { [key]: value } });
      expect([fault.name, key, fault.message.includes(`"${key}"`)]).toEqual(["CheckpointError", key, true]);
    }
  });

  test("inputs that do not fit are refused", () => {
    const model = loadDit(store(place.fresh(), made), kernels);
    const one = new Float32Array(192);
    expect(thrown(() => model.forward(new Float32Array(100), [1], [1]))).toBeInstanceOf(TypeError);
    expect(thrown(() => model.forward(one, [1, 2], [1]))).toBeInstanceOf(TypeError);
    expect(thrown(() => model.forward(one, [1], [8])).message).toContain(
      "from 0 to 7, the last for no class, got 8",
    );
    expect(thrown(() => model.forward(one, [NaN], [1]))).toBeInstanceOf(RangeError);
  });

  test("weights that give NaN are found out, with the first block that made it", () => {
    const bad = randomTensor([96, 24], 3, "F32", 0.1);
    (bad.data as Float32Array)[5] = Infinity;
    const path = store(place.fresh(), made, {
      tensors: { "transformer_blocks.1.ff.net.0.proj.weight": bad },
    });
    const error = thrown(() => loadDit(path, kernels).forward(gaussians(1, 192), [1], [1]));
    expect(error).toBeInstanceOf(WeightsError);
    expect(error.tensor).toBe("transformer_blocks.1");
  });
});

describe("drawing", () => {
  const path = store(place.fresh(), ditCheckpoint());
  const model = loadDit(path, kernels);

  test("an image does not depend on its batch, with any sampler", () => {
    for (
      const options of [{ sampler: "ddim" }, { sampler: "ddim", eta: 0.7 }, { sampler: "ddpm" }] as const
    ) {
      const all = generateImages(model, scheduler(), [1, 2, 3], { ...options, steps: 4, seed: 7 });
      const last = generateImages(model, scheduler(), [3], { ...options, steps: 4, seed: 7, firstStream: 2 });
      // A product's rounding may depend on its rows; at t = 999 x0 magnifies it 157 times.
      expect(relativeError(last, all.subarray(384))).toBeLessThan(1e-4);
      expect(relativeError(generateImages(model, scheduler(), [3], { ...options, steps: 4, seed: 8 }), last))
        .toBeGreaterThan(0.1);
    }
  });

  test("guidance combines the prediction with and without a class", () => {
    const noise = gaussians(3, 192);
    const [own, none] = [2, 7].map((label) => model.forward(noise, [999], [label]).slice(0, 192)) as [
      Float32Array,
      Float32Array,
    ];
    const combined = own.map((v, i) => none[i]! + 3 * (v - none[i]!));
    const wanted = noise.slice();
    scheduler().stepDdim(wanted, combined, 999, undefined);
    const got = generateImages(model, scheduler(), [2], { noise, timesteps: [999], guidance: 3 });
    expect(relativeError(got, wanted)).toBeLessThan(1e-4);
  });

  test("takes turns that begin with the noise and end with the image", () => {
    const states = [...imageSteps(model, scheduler(), [1], { steps: 3, seed: 4 })].map(({ timestep }) =>
      timestep
    );
    expect(states).toEqual([999, 500, 0, undefined]);
    const [first] = imageSteps(model, scheduler(), [1], { steps: 3, seed: 4 });
    expect([...first!.samples]).toEqual([...imageNoise(4, 0, 1, 192)]);
  });

  test("options out of range are refused before any work", () => {
    const refused = (labels: number[], options: Parameters<typeof generateImages>[3]) =>
      thrown(() => generateImages(model, scheduler(), labels, options));
    for (const steps of [0, 1001, 2.5]) expect(refused([1], { steps })).toBeInstanceOf(RangeError);
    expect(refused([], {})).toBeInstanceOf(RangeError);
    expect(refused([8], {}).message).toContain("got 8");
    expect(refused([1], { eta: 2 })).toBeInstanceOf(RangeError);
    expect(refused([1], { guidance: NaN })).toBeInstanceOf(RangeError);
    expect(refused([1], { timesteps: [5, 6] })).toBeInstanceOf(RangeError);
    expect(refused([1], { noise: new Float32Array(5) })).toBeInstanceOf(TypeError);
    expect(refused([1], { sampler: "euler" as "ddim" })).toBeInstanceOf(RangeError);
  });
});

describe("noise schedules", () => {
  test("β and ᾱ follow their formulas", () => {
    const linear = scheduler();
    expect(linear.betas[0]).toBe(1e-4);
    expect(linear.betas[999]).toBeCloseTo(0.02, 12);
    expect(linear.betas[500]).toBeCloseTo(1e-4 + 0.0199 * 500 / 999, 12);
    let product = 1;
    for (const beta of linear.betas) product *= 1 - beta;
    expect(linear.alphasCumulative[999]).toBeCloseTo(product, 15);
    // DDPM's well-known end of the linear schedule
    expect(linear.alphasCumulative[999]).toBeCloseTo(4.0358e-5, 8);
    const cosine = scheduler({ beta_schedule: "squaredcos_cap_v2" });
    const f = (t: number) => Math.cos((t / 1000 + 0.008) / 1.008 * Math.PI / 2) ** 2;
    expect(cosine.alphasCumulative[499]).toBeCloseTo(f(500) / f(0), 10);
    expect(cosine.betas[999]).toBe(0.999);
    const scaled = scheduler({
      beta_schedule: "scaled_linear",
      beta_start: 0.01,
      beta_end: 0.04,
      num_train_timesteps: 3,
    });
    expect(scaled.betas[1]).toBeCloseTo(0.15 ** 2, 12);
    expect([...scheduler({ trained_betas: [0.1, 0.2], num_train_timesteps: 2 }).alphasCumulative]).toEqual([
      0.9,
      0.9 * 0.8,
    ]);
  });

  test("timesteps are spaced as diffusers spaces them", () => {
    const of = (
      timestep_spacing: string,
      steps: number,
      more = {},
    ) => [...scheduler({ timestep_spacing, ...more }).timesteps(steps)];
    expect(of("linspace", 5)).toEqual([999, 749, 500, 250, 0]); // round half to even: 749.25, 499.5, 249.75
    expect(of("leading", 4)).toEqual([750, 500, 250, 0]);
    expect(of("leading", 4, { steps_offset: 1 })).toEqual([751, 501, 251, 1]);
    expect(of("trailing", 4)).toEqual([999, 749, 499, 249]);
    expect(of("linspace", 1)).toEqual([999]);
    expect(of("leading", 1000)[999]).toBe(0);
  });

  test("ε, v and x0 of the same image make the same step", () => {
    const [x0, epsilon] = [gaussians(1, 64).map((v) => Math.tanh(v)), gaussians(2, 64)];
    const t = 600, next = 400;
    const alphaBar = scheduler().alphaBar(t);
    const noisy = new Float32Array(64);
    scheduler().addNoise(x0, epsilon, t, noisy);
    const v = epsilon.map((e, i) => Math.sqrt(alphaBar) * e - Math.sqrt(1 - alphaBar) * x0[i]!);
    const to = scheduler().alphaBar(next);
    const wanted = x0.map((value, i) => Math.sqrt(to) * value + Math.sqrt(1 - to) * epsilon[i]!);
    for (
      const [prediction_type, prediction] of [["epsilon", epsilon], ["v_prediction", v], [
        "sample",
        x0,
      ]] as const
    ) {
      const samples = noisy.slice();
      scheduler({ prediction_type }).stepDdim(samples, prediction, t, next);
      expect(relativeError(samples, wanted)).toBeLessThan(1e-5);
    }
  });

  test("x0 is clipped and ε recomputed from it, unless the schedule does not clip", () => {
    const alphaBar = scheduler().alphaBar(300), to = scheduler().alphaBar(200);
    const x = 2, prediction = -1;
    const x0 = (x - Math.sqrt(1 - alphaBar) * prediction) / Math.sqrt(alphaBar);
    expect(x0).toBeGreaterThan(1);
    const stepOf = (fields: Record<string, unknown>) => {
      const samples = Float32Array.of(x);
      scheduler(fields).stepDdim(samples, Float32Array.of(prediction), 300, 200);
      return samples[0]!;
    };
    const clipped = (x - Math.sqrt(alphaBar)) / Math.sqrt(1 - alphaBar);
    expect(stepOf({})).toBeCloseTo(Math.sqrt(to) + Math.sqrt(1 - to) * clipped, 5);
    expect(stepOf({ clip_sample: false })).toBeCloseTo(
      Math.sqrt(to) * x0 + Math.sqrt(1 - to) * prediction,
      5,
    );
  });

  test("a step of DDPM has the posterior's mean and deviation", () => {
    const s = scheduler({ clip_sample: false });
    const t = 500, n = 20_000;
    const [from, to] = [s.alphaBar(t), s.alphaBar(t - 1)], beta = s.betas[t]!;
    const [x, epsilon] = [0.7, -0.4];
    const x0 = (x - Math.sqrt(1 - from) * epsilon) / Math.sqrt(from);
    const mean = Math.sqrt(to) * beta / (1 - from) * x0 + Math.sqrt(1 - beta) * (1 - to) / (1 - from) * x;
    const deviation = Math.sqrt((1 - to) / (1 - from) * beta);
    const noise = new Float32Array(n);
    new RandomStream(3).fillNormal(noise);
    const run = (sampler: Scheduler, variances?: Float32Array) => {
      const samples = new Float32Array(n).fill(x);
      sampler.stepDdpm(samples, new Float32Array(n).fill(epsilon), t, t - 1, noise, variances);
      const average = samples.reduce((sum, v) => sum + v, 0) / n;
      return [average, Math.sqrt(samples.reduce((sum, v) => sum + (v - average) ** 2, 0) / n)] as const;
    };
    const [average, spread] = run(s);
    expect(Math.abs(average - mean)).toBeLessThan(4 * deviation / Math.sqrt(n));
    expect(spread / deviation).toBeCloseTo(1, 1);
    const large = run(scheduler({ clip_sample: false, variance_type: "fixed_large" }))[1];
    expect(large / spread).toBeCloseTo(Math.sqrt(beta) / deviation, 4);
    const learned = scheduler({ clip_sample: false, variance_type: "learned_range" });
    expect(run(learned, new Float32Array(n).fill(-1))[1] / spread).toBeCloseTo(1, 4);
    expect(run(learned, new Float32Array(n).fill(1))[1] / large).toBeCloseTo(1, 4);
    expect(thrown(() => run(learned))).toBeInstanceOf(TypeError);
  });

  test("DDIM with eta 1 is as noisy as DDPM, and the last step adds none", () => {
    const s = scheduler({ clip_sample: false }), n = 4;
    const noise = gaussians(5, n), epsilon = gaussians(6, n), start = gaussians(7, n);
    const [ddim, ddpm] = [start.slice(), start.slice()];
    s.stepDdim(ddim, epsilon, 500, 499, { eta: 1 }, noise);
    s.stepDdpm(ddpm, epsilon, 500, 499, noise);
    expect(relativeError(ddim, ddpm)).toBeLessThan(1e-5);
    const [with1, with2] = [start.slice(), start.slice()];
    s.stepDdpm(with1, epsilon, 0, undefined, noise);
    s.stepDdpm(with2, epsilon, 0, undefined, gaussians(9, n));
    expect([...with1]).toEqual([...with2]);
  });

  test("what is not supported is refused by its key", () => {
    for (
      const [key, value] of [
        ["_class_name", "EulerDiscreteScheduler"],
        ["beta_schedule", "exp"],
        ["prediction_type", "flow"],
        ["thresholding", true],
        ["rescale_betas_zero_snr", true],
        ["beta_end", 1],
        ["num_train_timesteps", 0],
        ["trained_betas", [0.5, 2]],
        ["timestep_spacing", "karras"],
      ] as const
    ) {
      const error = thrown(() => scheduler({ [key]: value }));
      expect([error.name, key, error.message.includes(`"${key}"`)]).toEqual(["CheckpointError", key, true]);
    }
    expect(thrown(() => loadScheduler(place.path))).toBeInstanceOf(CheckpointError);
  });

  test("another solver's file gives the noise of training, and draws with a sampler that is named", () => {
    const folder = place.fresh("solver"), path = join(folder, "scheduler_config.json");
    mkdirSync(folder);
    const own = { _diffusers_version: "0.30.0", beta_end: 0.015, num_train_timesteps: 500 };
    const stored = (fields: Record<string, unknown>) =>
      writeFileSync(path, JSON.stringify({ ...own, solver_order: 2, algorithm_type: "x", ...fields }));
    for (const name of ["DPMSolverMultistep", "EulerAncestralDiscrete", "PNDM", "UniPCMultistep"]) {
      stored({ _class_name: `${name}Scheduler` });
      expect(thrown(() => loadScheduler(folder)).message).toContain("--sampler ddim");
      const { config, alphasCumulative } = loadScheduler(folder, "ddpm");
      expect(config.sampler).toBe("ddpm");
      expect([...alphasCumulative]).toEqual([...scheduler(own).alphasCumulative]);
    }
    for (const fields of [{ _class_name: "FlowMatchEulerDiscreteScheduler" }, {
      _class_name: "DPMSolverMultistepScheduler",
      use_flow_sigmas: true,
    }]) {
      stored(fields);
      expect(thrown(() => loadScheduler(folder, "ddim")).message).toContain(Object.keys(fields).at(-1)!);
    }
  });

  test("a pipeline's schedule lies beside its transformer", () => {
    const root = place.fresh("pipeline");
    for (const name of ["transformer", "scheduler"]) mkdirSync(join(root, name), { recursive: true });
    writeFileSync(
      join(root, "scheduler", "scheduler_config.json"),
      JSON.stringify({ _class_name: "DDPMScheduler" }),
    );
    expect(loadScheduler(join(root, "transformer")).config.sampler).toBe("ddpm");
  });
});

describe("PNG", () => {
  /** Width, height, colour type and pixels of a PNG, from the format's description. */
  function decode(bytes: Uint8Array) {
    const view = new DataView(bytes.buffer);
    expect([...bytes.subarray(0, 8)]).toEqual([137, 80, 78, 71, 13, 10, 26, 10]);
    const chunks: Record<string, Uint8Array> = {};
    for (let at = 8; at < bytes.length;) {
      const length = view.getUint32(at);
      const type = new TextDecoder().decode(bytes.subarray(at + 4, at + 8));
      expect(view.getUint32(at + 8 + length)).toBe(crc32(bytes.subarray(at + 4, at + 8 + length)));
      chunks[type] = bytes.subarray(at + 8, at + 8 + length);
      at += 12 + length;
    }
    expect(Object.keys(chunks)).toEqual(["IHDR", "tEXt", "IDAT", "IEND"]);
    expect(new TextDecoder().decode(chunks["tEXt"])).toMatch(/^Software\0/);
    const header = new DataView(chunks["IHDR"]!.buffer, chunks["IHDR"]!.byteOffset);
    const [width, height, colour] = [header.getUint32(0), header.getUint32(4), header.getUint8(9)];
    const lines = inflateSync(chunks["IDAT"]!);
    const row = width * (colour === 2 ? 3 : 1);
    const pixels: number[] = [];
    for (let y = 0; y < height; y++) {
      expect(lines[y * (row + 1)]).toBe(0);
      pixels.push(...lines.subarray(y * (row + 1) + 1, (y + 1) * (row + 1)));
    }
    return { width, height, colour, pixels };
  }

  test("holds gray and coloured pixels", () => {
    const gray = Uint8Array.of(0, 10, 255, 7, 8, 9);
    expect(decode(encodePng(gray, 3, 2, 1))).toEqual({ width: 3, height: 2, colour: 0, pixels: [...gray] });
    expect(decode(encodePng(gray, 1, 2, 3))).toEqual({ width: 1, height: 2, colour: 2, pixels: [...gray] });
    expect(thrown(() => encodePng(gray, 2, 2, 1))).toBeInstanceOf(TypeError);
    expect(thrown(() => encodePng(gray, 0, 2, 1))).toBeInstanceOf(RangeError);
  });

  test("tiles images and takes [−1, 1] for black to white", () => {
    const images = Float32Array.of(-1, 1, 0, 2, /**/ -3, 1, 1, 1, /**/ 0.5, 0, 0, 0);
    const { pixels, width, height } = tileImages(images, 1, 2, 2);
    expect([width, height]).toEqual([4, 4]);
    expect([...pixels]).toEqual([0, 255, 0, 255, 128, 255, 255, 255, 191, 128, 0, 0, 128, 128, 0, 0]);
    expect([...tileImages(images.slice(0, 4), 1, 2, 1, 2).pixels.subarray(0, 8)]).toEqual([
      0,
      0,
      255,
      255,
      0,
      0,
      255,
      255,
    ]);
  });
});
