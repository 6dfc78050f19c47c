/** The weights of a loaded model of any family, and what runs their linear layers. */
import type { ComingArray, Kernels } from "../../native/mod.ts";
import type { TimeParameters } from "../../time/mod.ts";
import type { ModelSource } from "../family.ts";
import { comingArrays, type LayerObserver, type PassOptions, type Stage, withWeights } from "./blockwise.ts";
import { IntegerProducts } from "./integer_products.ts";
import type { Matrix } from "./linear.ts";
import type { EmbeddingTable, LinearLayer, LoadOptions } from "./tensors.ts";
import { TimeAwareLayers } from "./time_aware.ts";
import { Workspace } from "./workspace.ts";

/** What a forward pass runs on. */
export interface Pass<Config, Parts> {
  readonly kernels: Kernels;
  readonly config: Config;
  readonly parts: Parts;
  readonly workspace: Workspace;
  /** A table with the weights of this run. */
  table(table: EmbeddingTable): EmbeddingTable;
  /** Sees what layers read; undefined where nobody looks. */
  readonly observe: LayerObserver | undefined;
  /** {@linkcode Pass.linear} without anybody looking. */
  run(
    layer: LinearLayer,
    x: Float32Array,
    count: number,
    out: Float32Array<ArrayBuffer>,
    positions?: Int32Array,
  ): void;
  /**
   * Runs a linear layer: `x: f32[count, cols]` → `out: f32[count, rows of the layer]`.
   *
   * @param positions flat position of each row of `x`, undefined where `x` has all positions
   * @param residual values that the output is then added to
   */
  linear(
    layer: LinearLayer,
    x: Float32Array,
    count: number,
    out: Float32Array<ArrayBuffer>,
    positions?: Int32Array,
    residual?: Float32Array,
  ): void;
}

/** A pass of a whole model or of some of its blocks. */
export interface BlockPass<Config, Parts> extends Pass<Config, Parts> {
  /**
   * A block is at work until the next one is: while a device is waited for, what the one behind it reads is
   * read from the checkpoint and copied. Again where a stopped run goes on.
   *
   * @param isWhole whether the head comes behind the last block, and behind the head another pass
   */
  begin(block: number, isWhole?: boolean): void;
}

/** Base of the families' models. */
export abstract class LoadedWeights<Config, Parts> {
  /** Path of the checkpoint, for messages. */
  readonly path: string;
  readonly config: Config;
  readonly kernels: Kernels;
  /** The weights as they are held. */
  readonly parts: Parts;
  /** Bytes of the weights as they are held. */
  readonly weightBytes: number;
  readonly timeParameters: TimeParameters | undefined;
  protected readonly workspace: Workspace;
  protected readonly timeAware: TimeAwareLayers | undefined;
  readonly #products: IntegerProducts;
  #blocks: ReadonlyMap<number, readonly Stage[]> | undefined;

  constructor(
    { path, config, kernels, tensors }: ModelSource<Config>,
    parts: Parts,
    { timeParameters, workspace = new Workspace(), activations }: LoadOptions,
  ) {
    this.path = path;
    this.config = config;
    this.kernels = kernels;
    this.parts = parts;
    this.weightBytes = tensors.bytes;
    this.timeParameters = timeParameters;
    this.workspace = workspace;
    const products = this.#products = new IntegerProducts(kernels, path, activations);
    this.timeAware = timeParameters &&
      new TimeAwareLayers(timeParameters, kernels, this.linearLayers, path, workspace, products);
  }

  abstract get stages(): readonly Stage[];

  get tables(): readonly EmbeddingTable[] {
    return [];
  }

  /** Every linear layer, in the order in which they run. */
  get linearLayers(): readonly LinearLayer[] {
    return this.stages.flatMap(({ layers }) => layers);
  }

  /**
   * While it is set, linear layers without time parameters run at 8 bits, weights by a range a row and inputs
   * by one a position: twice as fast, for a model that makes samples.
   */
  set roundsWeights(isOn: boolean) {
    this.#products.roundsWeights = isOn;
  }

  /** Bytes of scratch held for the largest call so far. */
  get scratchBytes(): number {
    return this.workspace.bytes;
  }

  /** Lets the scratch of earlier calls go, which would stay for calls as large. */
  releaseScratch(): void {
    this.workspace.release();
    this.#products.release();
  }

  /** What kernels read in the block that runs behind one. */
  *#comingBehind(
    block: number,
    isWhole: boolean,
    weights: PassOptions["weights"],
    isCopied: (weights: Matrix) => boolean,
  ): Generator<ComingArray, void> {
    const blocks = this.#blocks ??= Map.groupBy(this.stages, ({ block }) => block);
    const layersOf = (stages: readonly Stage[] = []) =>
      stages.flatMap(({ layers }) => layers.flatMap((layer) => this.#inForce(layer, weights)));
    const after = block + 1, isInside = after < blocks.size - 1;
    const next = layersOf(isInside || isWhole ? blocks.get(after % blocks.size) : []);
    const needed = new Set([...layersOf(blocks.get(block)), ...next].map(({ name }) => name));
    yield* comingArrays(next, needed, isCopied);
  }

  #inForce(layer: LinearLayer, weights: PassOptions["weights"]): LinearLayer[] {
    return this.timeAware?.selected(layer) ?? [withWeights(layer, weights)];
  }

  /** @param tokens of an item; default all rows of a layer's input in equal parts */
  protected pass({ observe, weights }: PassOptions, tokens?: number): BlockPass<Config, Parts> {
    const { kernels, config, parts, workspace, timeAware } = this,
      products = this.#products,
      { arrays } = kernels;
    const run: Pass<Config, Parts>["run"] = (layer, x, count, out, positions) => {
      if (timeAware === undefined) return products.linear(withWeights(layer, weights), x, count, out);
      timeAware.linear(layer, x, count, out, positions, tokens);
    };
    // Plain weights beside others are there to be solved for: kernels read what comes of it.
    const isCopied = (own: Matrix) => "packed" in own || (weights === undefined && !products.roundsWeights);
    const coming = new Map<number, Iterator<ComingArray>>();
    const begin = (block: number, isWhole = false) => {
      const own = coming.get(block) ?? this.#comingBehind(block, isWhole, weights, isCopied);
      coming.set(block, own);
      arrays.ahead(block, own);
    };
    return {
      begin,
      observe,
      run,
      kernels,
      config,
      parts,
      workspace,
      table: (table) => withWeights(table, weights),
      linear(layer, x, count, out, positions, residual) {
        if (observe !== undefined) {
          const own = residual === undefined ? [x] : [x, residual];
          for (const array of own) arrays.release(array);
          observe(layer, x, count, residual);
          for (const array of own) arrays.hold(array);
        }
        run(layer, x, count, out, positions);
      },
    };
  }
}
