/** Copies of the host's arrays on a device: for a call, while they are held, or for good. */
import type { ArrayPlaces, ComingArray } from "../kernels.ts";
import { type DeviceBuffer, type DeviceMemory, suits } from "./memory.ts";

type View = ArrayBufferView<ArrayBufferLike>;

/** A held array's memory. Where neither side is newer both are the same, or nothing is known of either. */
interface Held {
  buffer: DeviceBuffer | undefined;
  isHostNewer: boolean;
  isDeviceNewer: boolean;
  /** Handles of what lies behind an offset. */
  readonly parts: Map<number, bigint>;
}

/** The copy of an array that does not change. */
interface Constant {
  buffer: DeviceBuffer | undefined;
  /** Whether there was a copy before. */
  wasCopied: boolean;
  /** The last block that reads it, counted as blocks come to work. */
  block: number;
}

/** Bytes that are read or copied in one wait: much more would take longer than what is waited for. */
const AHEAD_BYTES = 2 ** 26;

/** Where parts of a held buffer may begin, in bytes: kernels read as much at once. */
const PART_ALIGNMENT = 16;

const isPart = ({ byteOffset }: View) => byteOffset % PART_ALIGNMENT === 0;

/** The arrays of opened kernels on their device. */
export class DeviceArrays implements ArrayPlaces {
  readonly #held = new Map<ArrayBufferLike, Held>();
  /** Arrays that do not change. */
  readonly #constants = new WeakMap<View, Constant>();
  /** Those that have a copy, in the order of their last use. */
  readonly #copied = new Set<Constant>();
  /** Copies of arrays that are gone are given back. */
  readonly #gone = new FinalizationRegistry<Constant>((constant) => this.#forget(constant));
  /** Buffers of the present call. */
  readonly #borrowed: DeviceBuffer[] = [];
  readonly #used = new Set<Constant>();
  /** What the next block reads, while a pass is open. */
  #coming: Iterator<ComingArray> | undefined;
  /** The block at work: as its model counts, and how many came to work. */
  #block = { own: -1, count: 0 };
  /** The block at whose turn there was no room for another copy of the next one's. */
  #fullAt = -1;
  /**
   * Whether a call had to drop what the block at work or the next one reads. With copies of the next one in
   * the way the block's own would be brought again in every pass: from then on nothing is copied ahead.
   */
  #isTight = false;
  /** Whether the device may be at work. */
  #isWorking = false;
  #isOpen = false;

  constructor(readonly memory: DeviceMemory) {}

  open(): void {
    this.drop();
    this.#isOpen = true;
  }

  hold<T extends View>(array: T, isScratch = false): T {
    if (this.#isOpen && !this.#held.has(array.buffer) && array.byteLength > 0) {
      const own = { buffer: undefined, isHostNewer: !isScratch, isDeviceNewer: false, parts: new Map() };
      this.#held.set(array.buffer, own);
    }
    return array;
  }

  release<T extends View>(array: T): T {
    const held = this.#held.get(array.buffer);
    if (held === undefined) return array;
    if (held.isDeviceNewer) this.#download(held.buffer!.handle, array, array.byteOffset);
    this.#letGo(array.buffer, held);
    return array;
  }

  discard<T extends View>(array: T): T {
    const held = this.#held.get(array.buffer);
    if (held !== undefined) this.#letGo(array.buffer, held);
    return array;
  }

  drop(): void {
    this.#isOpen = false;
    this.#coming = undefined;
    for (const [buffer, held] of this.#held) this.#letGo(buffer, held);
  }

  constant<T extends View>(array: T): T {
    if (!this.#constants.has(array) && array.byteLength > 0) {
      const constant = { buffer: undefined, wasCopied: false, block: 0 };
      this.#constants.set(array, constant);
      this.#gone.register(array, constant);
    }
    return array;
  }

  ahead(block: number, coming: Iterator<ComingArray>): void {
    if (block !== this.#block.own) this.#block = { own: block, count: this.#block.count + 1 };
    this.#coming = coming;
  }

  /** Begins copies of what comes next, while the device works. */
  #takeAhead(): void {
    for (let bytes = 0; bytes < AHEAD_BYTES && this.#coming !== undefined;) {
      const { done, value } = this.#coming.next();
      if (done === true) this.#coming = undefined;
      else bytes += Math.max(value.bytesRead, value.array === undefined ? 0 : this.#copyAhead(value.array));
    }
  }

  /** Begins a copy where what the present block and the next one read leaves room; bytes that it takes. */
  #copyAhead(array: View): number {
    const constant = this.#constants.get(array), { count } = this.#block;
    if (constant === undefined || this.#isTight) return 0;
    this.#touch(constant, count + 1);
    if (constant.buffer !== undefined || this.#fullAt === count) return 0;
    const buffer = this.#borrowAhead(array.byteLength, constant);
    if (buffer === undefined) this.#fullAt = count;
    else this.#copy(array, constant, buffer);
    return buffer === undefined ? 0 : array.byteLength;
  }

  /** A buffer that is free, or that of a copy which neither the block at work nor the next one reads. */
  #borrowAhead(bytes: number, wanted: Constant): DeviceBuffer | undefined {
    const buffer = this.memory.borrowBeside(bytes);
    if (buffer !== undefined) return buffer;
    const other = this.#dropped(wanted).find((own) => !this.#isOfBlock(own) && suits(own.buffer!, bytes));
    if (other === undefined) return undefined;
    this.#forget(other);
    return this.memory.borrowBeside(bytes);
  }

  #copy(array: View, constant: Constant, buffer: DeviceBuffer): void {
    constant.buffer = buffer;
    constant.wasCopied = true;
    this.#copied.add(constant);
    this.memory.upload(array, buffer.handle);
  }

  /** A copy, if there is one, was used last. */
  #touch(constant: Constant, block: number): void {
    constant.block = Math.max(constant.block, block);
    if (this.#copied.delete(constant)) this.#copied.add(constant);
  }

  /** Whether any array is held. */
  get isHolding(): boolean {
    return this.#held.size > 0;
  }

  /**
   * A handle for an argument of a call, its contents there where the call reads them.
   *
   * @returns undefined where the device has no room
   */
  handleOf(array: View, isRead: boolean, isWritten: boolean): bigint | undefined {
    const held = this.#held.get(array.buffer);
    if (held !== undefined) return this.#heldHandle(array, held, isRead, isWritten);
    const constant = isWritten ? undefined : this.#constants.get(array);
    if (constant !== undefined) {
      this.#used.add(constant);
      this.#touch(constant, this.#block.count);
      if (constant.buffer !== undefined) return constant.buffer.handle;
    }
    const buffer = this.#borrow(array.byteLength, constant);
    if (buffer === undefined) return undefined;
    if (constant !== undefined) this.#copy(array, constant, buffer);
    else {
      this.#borrowed.push(buffer);
      if (isRead) this.memory.upload(array, buffer.handle);
    }
    return buffer.handle;
  }

  /** After a call that wrote an array: held ones stay, others come back. */
  wrote(array: View, handle: bigint): void {
    this.#isWorking = true;
    const held = this.#held.get(array.buffer);
    if (held === undefined || !isPart(array)) this.#download(handle, array);
    else held.isDeviceNewer = true;
  }

  /** Ends a call. */
  finish(): void {
    for (const buffer of this.#borrowed.splice(0)) this.memory.giveBack(buffer);
    this.#used.clear();
    this.#isWorking = true;
  }

  /** Waits for all work; what comes next is begun before. */
  #download(handle: bigint, into: View, offset = 0): void {
    if (this.#isWorking) this.#takeAhead();
    this.memory.download(handle, into, offset);
    this.#isWorking = false;
  }

  /** Before the host reads or writes an array that may be held, which it stays. */
  toHost(array: View, isWritten: boolean): void {
    const held = this.#held.get(array.buffer);
    if (held === undefined) return;
    if (held.isDeviceNewer) this.#download(held.buffer!.handle, new Uint8Array(array.buffer));
    held.isDeviceNewer = false;
    held.isHostNewer ||= isWritten;
  }

  /** A buffer; copies of arrays that do not change make room, but not those that the call reads. */
  #borrow(bytes: number, wanted?: Constant): DeviceBuffer | undefined {
    let buffer = this.memory.borrow(bytes);
    if (buffer !== undefined) return buffer;
    for (const constant of this.#dropped(wanted)) {
      if (this.#used.has(constant)) continue;
      this.#giveWay(constant);
      buffer = this.memory.borrow(bytes);
      if (buffer !== undefined) break;
    }
    return buffer;
  }

  /**
   * Copies in the order in which they make room for another: those first that were not used for longest. For
   * one whose own copy was dropped before it is the other way round: who reads all again and again finds
   * those that stay, and not each one gone just before its turn.
   */
  #dropped(wanted: Constant | undefined): Constant[] {
    return wanted?.wasCopied === true ? this.#newestFirst() : [...this.#copied];
  }

  /** Whether the block at work or the next one reads it. */
  #isOfBlock({ block }: Constant): boolean {
    return block >= this.#block.count;
  }

  /** Copies in the order of their last use, the last first; behind them those of the block at work. */
  #newestFirst(): Constant[] {
    const all = [...this.#copied].reverse();
    return [...all.filter((own) => !this.#isOfBlock(own)), ...all.filter((own) => this.#isOfBlock(own))];
  }

  /** Makes room for the scratch of a kernel: nothing stays but what the present call reads. */
  makeRoom(): void {
    for (const constant of this.#copied) if (!this.#used.has(constant)) this.#giveWay(constant);
    this.memory.trim();
  }

  /** A copy is dropped for a call's sake. */
  #giveWay(constant: Constant): void {
    this.#isTight ||= this.#isOfBlock(constant);
    this.#forget(constant);
  }

  #forget(constant: Constant): void {
    this.#copied.delete(constant);
    if (constant.buffer !== undefined) this.memory.giveBack(constant.buffer);
    constant.buffer = undefined;
  }

  #heldHandle(array: View, held: Held, isRead: boolean, isWritten: boolean): bigint | undefined {
    const { buffer: { byteLength }, byteOffset } = array;
    if (!isPart(array)) {
      this.toHost(array, isWritten);
      const buffer = this.#borrow(array.byteLength);
      if (buffer === undefined) return undefined;
      this.#borrowed.push(buffer);
      if (isRead) this.memory.upload(array, buffer.handle);
      return buffer.handle;
    }
    held.buffer ??= this.#borrow(byteLength);
    if (held.buffer === undefined) return undefined;
    const { handle } = held.buffer;
    // all of it: what is not written now may be read later
    if (held.isHostNewer) this.memory.upload(new Uint8Array(array.buffer), handle);
    held.isHostNewer = false;
    if (byteOffset === 0) return handle;
    const known = held.parts.get(byteOffset);
    if (known !== undefined) return known;
    const part = this.memory.part(handle, byteOffset, byteLength - byteOffset);
    held.parts.set(byteOffset, part);
    return part;
  }

  #letGo(buffer: ArrayBufferLike, held: Held): void {
    for (const part of held.parts.values()) this.memory.free(part);
    if (held.buffer !== undefined) this.memory.giveBack(held.buffer);
    this.#held.delete(buffer);
  }
}
