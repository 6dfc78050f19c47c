/** What a model has made of its own, a file each batch in the work folder, so that a stopped run goes on. */
import { Buffer } from "node:buffer";
import { join } from "node:path";
import { listFolder, readWhole, sha256, writeWhole } from "../files/whole.ts";
import { SOLVED_PREFIX } from "../output/output_folder.ts";

/** Files of batches; they go with those of solved layers. */
const OWN_PREFIX = `${SOLVED_PREFIX}own-`;
/** Bytes of a SHA-256 in hexadecimal, with which a file begins. */
const DIGEST_BYTES = 64;

/** The batches in a folder; each stands there whole or not at all. */
export class KeptSamples {
  readonly #folder: string;
  readonly #identity: string;
  readonly #names: ReadonlySet<string>;

  /** @param identity of the run: what another one has left counts as absent, as does what was changed */
  constructor(folder: string, identity: string) {
    [this.#folder, this.#identity] = [folder, identity];
    this.#names = new Set(listFolder(folder).filter((name) => name.startsWith(OWN_PREFIX)));
  }

  /** Fills `target` with batch `index` if it is there. */
  load(index: number, target: Int32Array | Float32Array): boolean {
    const name = OWN_PREFIX + index, bytes = DIGEST_BYTES + target.byteLength;
    if (!this.#names.has(name)) return false;
    const file = readWhole(join(this.#folder, name)), content = file.subarray(DIGEST_BYTES);
    const digest = Buffer.from(file.subarray(0, DIGEST_BYTES)).toString("latin1");
    if (file.length !== bytes || this.#digest(index, content) !== digest) return false;
    new Uint8Array(target.buffer, target.byteOffset, target.byteLength).set(content);
    return true;
  }

  /** Keeps batch `index`. @throws {OutputError} when the system refuses */
  save(index: number, values: Int32Array | Float32Array): void {
    const content = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
    const file = Buffer.concat([Buffer.from(this.#digest(index, content)), content]);
    writeWhole(join(this.#folder, OWN_PREFIX + index), file);
  }

  #digest(index: number, content: Uint8Array): string {
    return sha256(Buffer.concat([Buffer.from(`${this.#identity}\n${index}\n`), content]));
  }
}
