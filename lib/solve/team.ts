/**
 * Tasks that solve one model together, block by block: each runs its own samples, and sums and solved layers
 * go through a folder that all of them see. A file is there whole or not at all, and a task that begins again
 * writes the same ones, so that no task has to know what became of another.
 */
import { basename, dirname, join } from "node:path";
import { setTimeout as wait } from "node:timers/promises";
import { OutputError } from "../errors.ts";
import { giveBack } from "../quant/array_memory.ts";
import { listFolder, quote, remove, sha256 } from "../files/whole.ts";
import { readKept, writeKept } from "../output/kept_file.ts";
import { makeOwnFolder } from "../output/own_folder.ts";
import type { Shard } from "../output/shard_folders.ts";
import { pause, type RunOptions } from "../progress.ts";
import { loadSolvedLayer, type SolvedLayer } from "./solved_layers.ts";

/** Which task this is, and where all meet. */
export interface TeamPlace {
  readonly shard: Shard;
  /** Folder of what the tasks exchange, of this run alone. */
  readonly folder: string;
  /** Longest wait for another task. */
  readonly waitMilliseconds: number;
}

/** Sums over a task's samples, or over all. */
export interface TeamSums {
  /** Numbers that are added up as well, as counts. */
  readonly counts: readonly number[];
  readonly sums: readonly Float64Array<ArrayBuffer>[];
}

/** Time between two looks for a file: little at first. */
const FIRST_LOOK_MILLISECONDS = 10, LOOK_MILLISECONDS = 1000;

/** Of the names of folders of what tasks exchange. */
export const EXCHANGE_PREFIX = "blocks-";
const SUMS_PREFIX = "sums-";

/** Thrown where other tasks have solved all layers of a stage and removed the sums that were waited for. */
class AlreadySolved extends Error {}

/** One candidate of a model, solved by several tasks. */
export class Team {
  #current: readonly string[] | undefined;

  constructor(
    readonly place: TeamPlace,
    /** Index and identity of the candidate, as `saveSolvedLayer` takes them. */
    readonly candidate: number,
    readonly identity: string,
    readonly options: RunOptions,
  ) {
    makeOwnFolder(place.folder);
  }

  /** Whether this task solves a layer, by its number among all. */
  solves(number: number): boolean {
    const { index, count } = this.place.shard;
    return number % count === index - 1;
  }

  /** Tells the others this task's sums. @param what of a stage, under whose name it is forgotten */
  publish(stage: string, what: string, { counts, sums }: TeamSums): void {
    const path = this.#sumsPath(stage, what, this.place.shard.index);
    writeKept(path, this.identity, { header: { counts }, arrays: sums }, false);
  }

  /**
   * Sums of all tasks, in their order. Those of this one are given back.
   *
   * @throws {OutputError} where one does not come, or its sums are of another size
   * @throws {AlreadySolved} within {@linkcode unlessSolved} where nobody needs them any more
   */
  async all(stage: string, what: string, own: TeamSums): Promise<TeamSums> {
    this.publish(stage, what, own);
    const sizes = own.sums.map(({ length }) => length);
    giveBack(...own.sums); // they are in the folder
    let total: { counts: number[]; sums: Float64Array<ArrayBuffer>[] } | undefined;
    for (let index = 1; index <= this.place.shard.count; index++) {
      const { header: { counts }, arrays } = await this.#awaited(
        `sums of ${what} of ${JSON.stringify(stage)}`,
        index,
        () => {
          const kept = readKept<{ counts: number[] }>(this.#sumsPath(stage, what, index), this.identity);
          const isOver = kept === undefined &&
            this.#current?.every((name) => this.solved(name) !== undefined);
          if (isOver === true) throw new AlreadySolved();
          return kept;
        },
      );
      const sums = arrays as Float64Array<ArrayBuffer>[];
      this.#checkSizes(what, index, sums, sizes);
      if (total === undefined) total = { counts: [...counts], sums };
      else {
        for (const [i, value] of counts.entries()) total.counts[i]! += value;
        for (const [i, own] of sums.entries()) addTo(total.sums[i]!, own);
        giveBack(...sums);
      }
    }
    return total!;
  }

  /** Takes part in solving layers, until other tasks have solved all of them; undefined then. */
  async unlessSolved<T>(names: readonly string[], run: () => Promise<T>): Promise<T | undefined> {
    this.#current = names;
    try {
      return await run();
    } catch (error) {
      if (error instanceof AlreadySolved) return undefined;
      throw error;
    } finally {
      this.#current = undefined;
    }
  }

  /** A layer that some task has solved; undefined where it is not there yet. */
  solved(name: string): SolvedLayer | undefined {
    const { place: { folder }, candidate, identity } = this;
    return loadSolvedLayer(folder, candidate, identity, name);
  }

  /** A layer that another task solves. @param number among all @throws {OutputError} if none comes */
  async layer(name: string, number: number): Promise<SolvedLayer> {
    const index = number % this.place.shard.count + 1;
    return await this.#awaited(`layer ${JSON.stringify(name)}`, index, () => this.solved(name));
  }

  /** All layers of a stage are solved: nobody needs the sums of this task. */
  forget(stage: string): void {
    const { folder, shard: { index } } = this.place, prefix = `${SUMS_PREFIX}${index}-${stageKey(stage)}-`;
    for (const name of listFolder(folder)) if (name.startsWith(prefix)) remove(join(folder, name));
  }

  /** @throws {OutputError} unless another task's sums have the sizes of this one's */
  #checkSizes(what: string, index: number, sums: readonly Float64Array[], sizes: readonly number[]): void {
    const wanted = sizes.join(", "), got = sums.map(({ length }) => length).join(", ");
    const { shard: { count }, folder } = this.place;
    if (got === wanted) return;
    throw new OutputError(
      `Cannot add up sums of ${what}: shard ${index}/${count} must have ${wanted} numbers, as this one, got ${got}: ` +
        "by the memory of a machine moments are whole or in blocks; give all shards the same --max-memory, and --resume",
      { path: folder },
    );
  }

  #sumsPath(stage: string, what: string, index: number): string {
    return join(this.place.folder, `${SUMS_PREFIX}${index}-${stageKey(stage)}-${stageKey(what)}`);
  }

  async #awaited<T>(what: string, index: number, look: () => T | undefined): Promise<T> {
    const { place: { shard: { count }, folder, waitMilliseconds }, options: { signal, onEvent } } = this;
    const begun = performance.now();
    for (let isTold = false, next = FIRST_LOOK_MILLISECONDS;;) {
      const found = look();
      if (found !== undefined) return found;
      const waited = performance.now() - begun;
      if (waited >= waitMilliseconds) {
        const minutes = Math.round(waitMilliseconds / 60_000 * 100) / 100, parts = dirname(folder);
        const others = listFolder(parts).filter((name) =>
          name.startsWith(EXCHANGE_PREFIX) && name !== basename(folder)
        );
        throw new OutputError(
          `Cannot go on: ${what} from shard ${index}/${count} must be in ${
            quote(folder)
          } within ${minutes} minutes, got nothing${
            others.length === 0
              ? ""
              : ` (${
                others.join(", ")
              } beside it is of another configuration, input, version or instruction set)`
          }: all shards must run at the same time, with the same configuration and input, and see that folder; give the ` +
            "command again with --resume",
          { path: folder },
        );
      }
      if (waited > 5000 && !isTold) {
        isTold = true;
        onEvent?.({ kind: "stage", message: `waiting for ${what} from shard ${index}/${count}` });
      }
      await pause(signal);
      await wait(Math.min(next, waitMilliseconds));
      next = Math.min(LOOK_MILLISECONDS, 1.5 * next);
    }
  }
}

const stageKey = (text: string) => sha256(text).slice(0, 16);

function addTo(sums: Float64Array, more: Float64Array): void {
  for (let i = 0; i < sums.length; i++) sums[i] = sums[i]! + more[i]!;
}
