/** Copies of the host's arrays on a device: for a call, while they are held, or for good. */
import type { ArrayPlaces } from "../kernels.ts";
import type { DeviceBuffer, DeviceMemory } from "./memory.ts";

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
}

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
    if (held.isDeviceNewer) this.memory.download(held.buffer!.handle, array, array.byteOffset);
    this.#letGo(array.buffer, held);
    return array;
  }

  drop(): void {
    this.#isOpen = false;
    for (const [buffer, held] of this.#held) this.#letGo(buffer, held);
  }

  constant<T extends View>(array: T): T {
    if (!this.#constants.has(array) && array.byteLength > 0) {
      const constant = { buffer: undefined };
      this.#constants.set(array, constant);
      this.#gone.register(array, constant);
    }
    return array;
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
      this.#copied.delete(constant);
      this.#copied.add(constant);
      if (constant.buffer !== undefined) return constant.buffer.handle;
    }
    const buffer = this.#borrow(array.byteLength);
    if (buffer === undefined) return undefined;
    if (constant === undefined) this.#borrowed.push(buffer);
    else constant.buffer = buffer;
    if (isRead) this.memory.upload(array, buffer.handle);
    return buffer.handle;
  }

  /** After a call that wrote an array: held ones stay, others come back. */
  wrote(array: View, handle: bigint): void {
    const held = this.#held.get(array.buffer);
    if (held === undefined || !isPart(array)) this.memory.download(handle, array);
    else held.isDeviceNewer = true;
  }

  /** Ends a call. */
  finish(): void {
    for (const buffer of this.#borrowed.splice(0)) this.memory.giveBack(buffer);
    this.#used.clear();
  }

  /** Before the host reads or writes an array that may be held, which it stays. */
  toHost(array: View, isWritten: boolean): void {
    const held = this.#held.get(array.buffer);
    if (held === undefined) return;
    if (held.isDeviceNewer) this.memory.download(held.buffer!.handle, new Uint8Array(array.buffer));
    held.isDeviceNewer = false;
    held.isHostNewer ||= isWritten;
  }

  /** A buffer; copies of arrays that do not change make room, those first that were not used for longest. */
  #borrow(bytes: number): DeviceBuffer | undefined {
    let buffer = this.memory.borrow(bytes);
    for (const constant of this.#copied) {
      if (buffer !== undefined) break;
      if (this.#used.has(constant)) continue;
      this.#forget(constant);
      buffer = this.memory.borrow(bytes);
    }
    return buffer;
  }

  /** Makes room for the scratch of a kernel: nothing stays but what the present call reads. */
  makeRoom(): void {
    for (const constant of this.#copied) if (!this.#used.has(constant)) this.#forget(constant);
    this.memory.trim();
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
