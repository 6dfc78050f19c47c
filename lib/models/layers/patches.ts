/** Images as the patches that a diffusion transformer reads and writes. */
import { checkCounts, checkFloats } from "../../native/call.ts";
import * as native from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";

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

const rearrange =
  (doing: string, name: string, kernel: typeof native.patchify) =>
  (kernels: Kernels, from: Float32Array, shape: PatchShape, out: Floats = new Float32Array(from.length)) => {
    const { batch, channels, height, width, patch } = shape;
    checkCounts(doing, { batch, channels, height, width, patch });
    if (patch === 0 || height % patch !== 0 || width % patch !== 0) {
      throw new RangeError(`Cannot ${doing}: patch must divide ${height} × ${width} pixels, got ${patch}`);
    }
    const elements = batch * channels * height * width;
    checkFloats(doing, { [name]: [from, elements], out: [out, elements] });
    kernel(kernels, doing, from, batch, channels, height, width, patch, out);
    return out;
  };

/**
 * Images to the rows that a patch embedding multiplies.
 *
 * **Shapes** `images: f32[batch, channels, height, width]` →
 * `f32[batch, height/patch, width/patch, channels, patch, patch]`. `out` must not be `images`.
 */
export const patchify = rearrange("take images apart", "images", native.patchify);

/**
 * Patches predicted by a diffusion transformer to images: channels last in a token, unlike in {@linkcode
 * patchify}.
 *
 * **Shapes** `tokens: f32[batch, height/patch, width/patch, patch, patch, channels]` →
 * `f32[batch, channels, height, width]`. `out` must not be `tokens`.
 */
export const unpatchify = rearrange("put images together", "tokens", native.unpatchify);
