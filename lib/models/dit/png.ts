/** Writing PNG files, 8 bits, grayscale or RGB, by the runtime's zlib (https://www.w3.org/TR/png/). */
import { crc32, deflateSync } from "node:zlib";
import { MADE_BY } from "../../files/results.ts";
import { checkWhole } from "../../native/call.ts";

const SIGNATURE = Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a);
/** Largest width and height: the format has 31 bits, an image in memory never comes near. */
const MAX_SIDE = 65_535;

/**
 * A PNG file's bytes.
 *
 * **Shapes** `pixels: u8[height, width, channels]`, 1 channel (grayscale) or 3 (RGB)
 *
 * @throws {RangeError | TypeError} when the sizes do not fit
 *
 * @example
 * ```ts
 * import { encodePng } from "./png.ts";
 * console.log(encodePng(Uint8Array.of(0, 128, 255, 64), 2, 2, 1).length > 50);
 * ```
 */
export function encodePng(
  pixels: Uint8Array,
  width: number,
  height: number,
  channels: 1 | 3,
): Uint8Array<ArrayBuffer> {
  checkWhole("encode a PNG", "width", width, 1, MAX_SIDE);
  checkWhole("encode a PNG", "height", height, 1, MAX_SIDE);
  if (channels !== 1 && channels !== 3) {
    throw new RangeError(`Cannot encode a PNG: channels must be 1 or 3, got ${channels}`);
  }
  if (pixels.length !== width * height * channels) {
    throw new TypeError(
      `Cannot encode a PNG: pixels must be ${width * height * channels} bytes, got ${pixels.length}`,
    );
  }
  const header = new Uint8Array(13);
  const view = new DataView(header.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  header.set([8, channels === 1 ? 0 : 2, 0, 0, 0], 8); // bit depth, colour, compression, filters, no interlace
  const row = width * channels;
  const lines = new Uint8Array(height * (row + 1)); // filter 0 in front of each
  for (let y = 0; y < height; y++) lines.set(pixels.subarray(y * row, (y + 1) * row), y * (row + 1) + 1);
  const parts = [
    SIGNATURE,
    chunk("IHDR", header),
    chunk("tEXt", new TextEncoder().encode(`Software\0${MADE_BY}`)),
    chunk("IDAT", deflateSync(lines)),
    chunk("IEND", new Uint8Array()),
  ];
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

function chunk(type: string, data: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(data.length + 12);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(data, 8);
  view.setUint32(8 + data.length, crc32(bytes.subarray(4, 8 + data.length)));
  return bytes;
}

/**
 * Images side by side as bytes, `columns` a row, `[−1, 1]` → `[0, 255]`.
 *
 * **Shapes** `images: f32[count, channels, size, size]` → `u8[height, width, channels]`
 */
export function tileImages(
  images: Float32Array,
  channels: 1 | 3,
  size: number,
  columns: number,
  zoom = 1,
): { readonly pixels: Uint8Array<ArrayBuffer>; readonly width: number; readonly height: number } {
  const count = images.length / (channels * size * size);
  const across = Math.min(columns, count), down = Math.ceil(count / across);
  const width = across * size * zoom, height = down * size * zoom;
  const pixels = new Uint8Array(width * height * channels);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const px = Math.floor(x / zoom), py = Math.floor(y / zoom);
      const image = Math.floor(py / size) * across + Math.floor(px / size);
      if (image >= count) continue;
      for (let c = 0; c < channels; c++) {
        const value = images[((image * channels + c) * size + py % size) * size + px % size]!;
        pixels[(y * width + x) * channels + c] = Math.max(0, Math.min(255, Math.round((value + 1) * 127.5)));
      }
    }
  }
  return { pixels, width, height };
}
