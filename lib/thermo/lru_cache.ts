/** A bounded cache that evicts the least recently used value and counts its hits. */
import { checkWhole } from "../native/call.ts";

/** Counts of a cache so far. */
export interface CacheStatistics {
  readonly hits: number;
  readonly misses: number;
  readonly evictions: number;
  readonly entries: number;
}

/**
 * Values by (layer, timestep), at most `capacity` of them.
 *
 * @example
 * ```ts
 * import { LayerTimeCache } from "./lru_cache.ts";
 * const cache = new LayerTimeCache<number>(2);
 * cache.get("blocks.0", 3, () => 42); // computed
 * console.log(cache.get("blocks.0", 3, () => 0), cache.statistics.hits); // 42 1
 * ```
 */
export class LayerTimeCache<Value> {
  // A Map keeps the order of insertion: a value that is used is taken out and put in again.
  readonly #values = new Map<string, Value>();
  #hits = 0;
  #misses = 0;
  #evictions = 0;

  /** @throws {RangeError} when `capacity` is not a whole number ≥ 1 */
  constructor(readonly capacity: number) {
    checkWhole("make a cache", "capacity", capacity, 1);
  }

  /** The value kept for a layer and a timestep, or the result of `compute`; its error keeps nothing. */
  get(layer: string, timestep: number, compute: () => Value): Value {
    const key = `${timestep} ${layer}`;
    const isKept = this.#values.has(key), value = isKept ? this.#values.get(key) as Value : compute();
    if (isKept) {
      this.#hits++;
      this.#values.delete(key);
    } else {
      this.#misses++;
      if (this.#values.size >= this.capacity) {
        this.#values.delete(this.#values.keys().next().value!);
        this.#evictions++;
      }
    }
    this.#values.set(key, value);
    return value;
  }

  get statistics(): CacheStatistics {
    const { size: entries } = this.#values;
    return { hits: this.#hits, misses: this.#misses, evictions: this.#evictions, entries };
  }
}
