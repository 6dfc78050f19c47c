/** A checkpoint with other values of some tensors in memory: a model runs with the weights of a method. */
import { CheckpointError } from "../../errors.ts";
import { quote } from "../../files/whole.ts";
import { Checkpoint, type CheckpointTensor } from "../../tensor/mod.ts";

/**
 * `original` with float32 values in place of some tensors. Reads the rest from the original, which must stay
 * open and is not closed with it.
 *
 * @throws {CheckpointError} when a replaced tensor is not there or has another number of elements
 */
export class ReplacedCheckpoint extends Checkpoint {
  override readonly tensors: ReadonlyMap<string, CheckpointTensor>;
  readonly #replaced: ReadonlyMap<string, Float32Array>;

  constructor(original: Checkpoint, replaced: ReadonlyMap<string, Float32Array>) {
    super(original);
    const tensors = new Map(original.tensors);
    for (const [name, values] of replaced) {
      const tensor = original.tensors.get(name);
      if (tensor?.info.elements !== values.length) {
        const { path } = original, got = tensor?.info.elements ?? "no such name";
        throw new CheckpointError(
          `Cannot replace tensor ${quote(name)}: ${
            quote(path)
          } must have it with ${values.length} elements, got ${got}`,
          { path, tensor: name },
        );
      }
      tensors.set(name, {
        ...tensor,
        info: { ...tensor.info, dtype: "F32", byteOffset: 0, byteLength: values.byteLength },
      });
    }
    this.tensors = tensors;
    this.#replaced = replaced;
  }

  override read(name: string, byteStart?: number, byteEnd?: number): Uint8Array<ArrayBuffer> {
    const values = this.#replaced.get(name);
    if (values === undefined) return super.read(name, byteStart, byteEnd);
    return new Uint8Array(values.buffer, values.byteOffset, values.byteLength).slice(byteStart, byteEnd);
  }

  override readInto(name: string, byteStart: number, target: Uint8Array): void {
    if (!this.#replaced.has(name)) super.readInto(name, byteStart, target);
    else target.set(this.read(name, byteStart, byteStart + target.length));
  }

  /** The files are the original's to close. */
  override close(): void {}
}
