/**
 * Arrays that stay where kernels work. On the CPU every array does; a GPU has copies of those that it is told of, so
 * that what one kernel has made does not cross the bus before the next one reads it.
 */

/** An array that a kernel reads or writes. */
type View = ArrayBufferView<ArrayBufferLike>;

/** Where arrays are between the calls of kernels. */
export interface ArrayPlaces {
  /** From now on arrays can be held; none is yet. */
  open(): void;
  /**
   * From now on only kernels touch the array, and all others in its memory, until it is released or dropped. One that
   * is held already stays as it is. Nothing is held outside of {@linkcode open} and {@linkcode drop}.
   *
   * @param isScratch whether what the array holds now does not matter
   */
  hold<T extends View>(array: T, isScratch?: boolean): T;
  /** The array is the host's again, with what kernels have made of it. */
  release<T extends View>(array: T): T;
  /** All held arrays are the host's again, their contents whatever they were, and none is held from now on. */
  drop(): void;
  /** The array never changes from now on: a copy may stay as long as there is room. */
  constant<T extends View>(array: T): T;
}

/** All arrays are the host's. */
export const HOST_ARRAYS: ArrayPlaces = {
  open() {},
  hold: (array) => array,
  release: (array) => array,
  drop() {},
  constant: (array) => array,
};
