/** Images as the patches that a diffusion transformer reads and writes. */
import type { Kernels } from "../../native/mod.ts";
import { check, checkCount, checkFloats } from "./_checks.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Sizes of images and of the square patches that a transformer sees them as. */
export interface PatchShape {
  readonly batch: number;
  readonly channels: number;
  readonly height: number;
  readonly width: number;
  /** Divides height and width. */
  readonly patch: number;
}

/**
 * Images to the rows that a patch embedding multiplies.
 *
 * **Shapes** `images: f32[batch, channels, height, width]` →
 * `f32[batch, height/patch, width/patch, channels, patch, patch]`. `out` must not be `images`.
 */
export function patchify(kernels: Kernels, images: Float32Array, shape: PatchShape, out?: Floats): Floats {
  return rearrange(kernels, "aq_patchify", "take images apart", { images }, shape, out);
}

/**
 * Patches predicted by a diffusion transformer to images: channels last in a token, unlike in {@linkcode patchify}.
 *
 * **Shapes** `tokens: f32[batch, height/patch, width/patch, patch, patch, channels]` →
 * `f32[batch, channels, height, width]`. `out` must not be `tokens`.
 */
export function unpatchify(kernels: Kernels, tokens: Float32Array, shape: PatchShape, out?: Floats): Floats {
  return rearrange(kernels, "aq_unpatchify", "put images together", { tokens }, shape, out);
}

function rearrange(
  kernels: Kernels,
  call: "aq_patchify" | "aq_unpatchify",
  doing: string,
  from: Readonly<Record<string, Float32Array>>,
  shape: PatchShape,
  into: Floats | undefined,
): Floats {
  const { batch, channels, height, width, patch } = shape, { calls, size, threads } = kernels;
  for (const [name, value] of Object.entries({ batch, channels, height, width, patch })) {
    checkCount(doing, name, value);
  }
  if (patch === 0 || height % patch !== 0 || width % patch !== 0) {
    throw new RangeError(`Cannot ${doing}: patch must divide ${height} × ${width} pixels, got ${patch}`);
  }
  const elements = batch * channels * height * width, out = into ?? new Float32Array(elements);
  const [[name, values]] = Object.entries(from) as [[string, Float32Array]];
  checkFloats(doing, name, values, elements);
  checkFloats(doing, "out", out, elements);
  const b = size(batch), c = size(channels), h = size(height), w = size(width), p = size(patch);
  check(calls[call](values, b, c, h, w, p, out, threads), doing);
  return out;
}
