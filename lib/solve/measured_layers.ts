/** Layers whose sensitivity is measured, a file each in the work folder, so that a stopped run goes on. */
import { join } from "node:path";
import { listFolder, sha256 } from "../files/whole.ts";
import { readKept, writeKept } from "../output/kept_file.ts";
import { SOLVED_PREFIX } from "../output/output_folder.ts";
import type { LayerOption } from "../plan/budget.ts";

/** Files of measured layers; they go with those of solved ones. */
const MEASURED_PREFIX = `${SOLVED_PREFIX}costs-`;

/** A layer's choices; the costs are an array behind it. */
interface Header {
  readonly name: string;
  readonly options: readonly Omit<LayerOption, "cost">[];
}

/** The measured layers in a folder; each stands there whole or not at all. */
export class MeasuredLayers {
  readonly #folder: string;
  readonly #identity: string;
  readonly #layers = new Map<string, readonly LayerOption[]>();

  /**
   * @param identity of the run: layers that another one has left, and files that are not as they were
   *   written, count as absent
   */
  constructor(folder: string, identity: string) {
    [this.#folder, this.#identity] = [folder, sha256(identity)];
    for (const file of listFolder(folder).filter((name) => name.startsWith(MEASURED_PREFIX))) {
      const kept = readKept<Header>(join(folder, file), this.#identity);
      if (kept === undefined) continue;
      const { header: { name, options }, arrays: [costs] } = kept;
      this.#layers.set(name, options.map((option, i) => ({ ...option, cost: costs![i]! })));
    }
  }

  /** Choices by the name of a layer's weight, with their costs. */
  get layers(): ReadonlyMap<string, readonly LayerOption[]> {
    return this.#layers;
  }

  /** Keeps a layer. @throws {OutputError} when the system refuses */
  add(name: string, options: readonly LayerOption[]): void {
    const header: Header = { name, options: options.map(({ cost: _, ...option }) => option) };
    const path = join(this.#folder, `${MEASURED_PREFIX}${sha256(name).slice(0, 16)}`);
    const arrays = [Float64Array.from(options, ({ cost }) => cost)];
    writeKept(path, this.#identity, { header, arrays });
    this.#layers.set(name, options);
  }
}
