/** Drawing: images of classes as one picture, latents as numbers. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { readJsonFile } from "../../lib/files/json.ts";
import { checkReplaceable, MADE_BY, writeResult } from "../../lib/files/results.ts";
import { MAX_STEPS } from "../../lib/models/masked/generation.ts";
import {
  type DitConfig,
  encodePng,
  imageSteps,
  loadScheduler,
  modelFrom,
  type SamplerName,
  tileImages,
} from "../../lib/models/mod.ts";
import { type Checkpoint, SafetensorsWriter } from "../../lib/tensor/mod.ts";
import { UsageError, wholeNumber } from "../_command/options.ts";
import { stopIfAsked } from "../_command/run.ts";
import { print, printable, printJson } from "../_command/text.ts";
import { announce, measured, type Task } from "./task.ts";

const DRAWING_STEPS = 50;
/** Pictures of a trace. */
const TRACE_PICTURES = 10;

const LATENTS_SUFFIX = ".safetensors";

/**
 * Why a model's images are latents, and how they become pictures; undefined where they are pictures. The
 * autoencoder is not run here.
 */
function latentsOf({ root }: Checkpoint, { channels }: DitConfig) {
  const path = join(root, "vae", "config.json"), hasVae = existsSync(path);
  if (!hasVae && (channels === 1 || channels === 3)) return undefined;
  // diffusers' own default, which a configuration may leave out
  const stored = hasVae ? { scaling_factor: 0.18215, ...readJsonFile(path) } as Record<string, unknown> : {};
  const factors = ["scaling_factor", "shift_factor"].filter((key) => typeof stored[key] === "number");
  const which = hasVae ? `the decoder in ${printable(join(root, "vae"))}` : "a decoder (an AutoencoderKL)";
  return {
    why: `the model draws latents of ${channels} channels for ${which}, which does not run here`,
    metadata: {
      format: "pt",
      writer: MADE_BY,
      decode: "vae.decode(latents / scaling_factor + shift_factor), each where it is given",
      ...Object.fromEntries(factors.map((key) => [key, `${stored[key]}`])),
    },
  };
}

function saveLatents(
  path: string,
  shape: readonly number[],
  values: Float32Array,
  metadata: Readonly<Record<string, string>>,
): void {
  const specs = [{ name: "latents", dtype: "F32", shape }] as const;
  const reservedHeaderBytes = SafetensorsWriter.headerBytes(specs, metadata);
  using writer = SafetensorsWriter.create(path, { reservedHeaderBytes, metadata });
  writer.add(specs);
  writer.write("latents", 0, new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
  writer.finish();
}

function classesOf(list: string | undefined, config: DitConfig): readonly number[] {
  const asked = list?.split(",").map((text) => wholeNumber("class", text, 0));
  const classes = asked ?? Array.from({ length: Math.min(10, config.classes) }, (_, i) => i);
  const bad = classes.find((label) => label >= config.classes);
  if (bad === undefined) return classes;
  throw new UsageError(`--class must be from 0 to ${config.classes - 1}, got ${bad}`);
}

export async function draw(task: Task, config: DitConfig): Promise<void> {
  const { checkpoint, parsed, log } = task, { flags, values } = parsed;
  const classes = classesOf(values.class, config);
  const zoom = parsed.whole("zoom", 1, 64) ?? (config.sampleSize < 64 ? 8 : 1);
  const seed = parsed.whole("seed", 0) ?? 0, guidance = parsed.number("guidance") ?? 1;
  const sampler = parsed.oneOf<SamplerName>("sampler", ["ddim", "ddpm"]);
  const scheduler = loadScheduler(checkpoint.folder, sampler);
  const steps = parsed.whole("steps", 1, MAX_STEPS) ??
    Math.min(DRAWING_STEPS, scheduler.config.trainTimesteps);
  scheduler.timesteps(steps); // refuses too many
  const batch = guidance === 1 ? classes.length : 2 * classes.length;
  const latents = latentsOf(checkpoint, config), out = values.out ?? `class-${classes.join("-")}.png`;
  const latentsPath = out.replace(/(?:\.png)?$/i, out.endsWith(LATENTS_SUFFIX) ? "" : LATENTS_SUFFIX);
  for (const path of latents === undefined ? [out] : [out, latentsPath]) checkReplaceable(path, flags.force);
  if (latents !== undefined) log(`${latents.why}: they are saved as ${printable(latentsPath)}`);
  const needed = announce(task, { batch, tokens: 0 }, 0, steps);
  task.onStep(0, steps);
  const { kernels, timeParameters, activations } = task;
  const { model } = modelFrom(checkpoint, kernels, { timeParameters, activations });
  if (!("imageElements" in model)) throw new TypeError("Cannot draw: the model writes");
  const turns = imageSteps(model, scheduler, classes, { steps, seed, sampler, guidance });
  const kept: Float32Array<ArrayBuffer>[] = [];
  const started = performance.now();
  for (const { step, steps: all, samples } of turns) {
    const isKept = step === all ||
      (flags.trace &&
        Math.floor(step * (TRACE_PICTURES - 1) / all) > Math.floor((step - 1) * (TRACE_PICTURES - 1) / all));
    if (isKept) kept.push(samples.slice());
    if (flags.trace) log(`step ${step}/${all}`);
    task.onStep(step, all);
    await stopIfAsked(task.signal);
  }
  const seconds = (performance.now() - started) / 1000;
  const elements = model.imageElements;
  if (latents !== undefined) {
    const { channels: depth, sampleSize } = config, shape = [classes.length, depth, sampleSize, sampleSize];
    const values = kept.at(-1)!.subarray(0, classes.length * elements);
    saveLatents(latentsPath, shape, values, {
      ...latents.metadata,
      classes: classes.join(),
      seed: `${seed}`,
    });
  }
  // A row a class: with a trace from noise to image, else all images in one row. Latents have no colours: a
  // tile a channel.
  const channels = config.channels === 3 ? 3 : 1;
  if (config.channels !== channels) log(`${config.channels} channels are no colours: one tile each`);
  const tiles = new Float32Array(kept.length * classes.length * elements);
  for (let i = 0, at = 0; i < classes.length; i++) {
    for (const images of kept) {
      tiles.set(images.subarray(i * elements, (i + 1) * elements), at);
      at += elements;
    }
  }
  const columns = flags.trace ? kept.length * config.channels / channels : Infinity;
  const { pixels, width, height } = tileImages(tiles, channels, config.sampleSize, columns, zoom);
  if (latents === undefined || latentsPath !== out) {
    writeResult(out, encodePng(pixels, width, height, channels), flags.force);
  }
  if (flags.json) {
    const saved = latents === undefined ? {} : { latents: latentsPath };
    const image = { kind: "dit", classes, out, ...saved, width, height, steps, seed, seconds };
    return printJson({ ...image, ...measured(task, needed) });
  }
  print(printable(out));
  log(
    `${classes.length} images of ${width} × ${height} pixels together, ${steps} steps in ${
      seconds.toFixed(2)
    } s`,
  );
}
