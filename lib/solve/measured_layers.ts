/** Layers whose sensitivity is measured, a file each in the work folder, so that a stopped run goes on. */
import { join } from "node:path";
import { listFolder, readOwnText, sha256, writeWhole } from "../files/whole.ts";
import { SOLVED_PREFIX } from "../output/output_folder.ts";
import type { LayerOption } from "../plan/budget.ts";

/** Files of measured layers; they go with those of solved ones. */
const MEASURED_PREFIX = `${SOLVED_PREFIX}costs-`;
/** Longest file: a name, and a choice of bits and groups for each of 64 combinations. */
const MAX_BYTES = 2 ** 16;

/** Content of a file behind its SHA-256. A cost is text: JSON has no NaN, which is one that no plan takes. */
interface Measured {
  readonly identity: string;
  readonly name: string;
  readonly options: readonly (Omit<LayerOption, "cost"> & { readonly cost: string })[];
}

/** The measured layers in a folder; each stands there whole or not at all. */
export class MeasuredLayers {
  readonly #folder: string;
  readonly #identity: string;
  readonly #layers = new Map<string, readonly LayerOption[]>();

  /**
   * @param identity of the run: layers that another one has left, and files that are not as they were written, count
   *   as absent
   */
  constructor(folder: string, identity: string) {
    [this.#folder, this.#identity] = [folder, sha256(identity)];
    for (const file of listFolder(folder).filter((name) => name.startsWith(MEASURED_PREFIX))) {
      const [, digest, content] = /^([0-9a-f]{64})\n(.*)$/s.exec(
        readOwnText(join(folder, file), MAX_BYTES) ?? "",
      ) ?? [];
      if (content === undefined || digest !== sha256(content)) continue;
      const { identity: own, name, options } = JSON.parse(content) as Measured;
      if (own !== this.#identity) continue;
      this.#layers.set(name, options.map((option) => ({ ...option, cost: Number(option.cost) })));
    }
  }

  /** Choices by the name of a layer's weight, with their costs. */
  get layers(): ReadonlyMap<string, readonly LayerOption[]> {
    return this.#layers;
  }

  /** Keeps a layer. @throws {OutputError} when the system refuses */
  add(name: string, options: readonly LayerOption[]): void {
    const costs = options.map((option) => ({ ...option, cost: String(option.cost) }));
    const content = JSON.stringify({ identity: this.#identity, name, options: costs } satisfies Measured);
    const file = `${MEASURED_PREFIX}${sha256(name).slice(0, 16)}`;
    writeWhole(join(this.#folder, file), `${sha256(content)}\n${content}`);
    this.#layers.set(name, options);
  }
}
