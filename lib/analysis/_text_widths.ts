/**
 * How wide text is where no canvas can say: advances of DejaVu Sans' printable ASCII, from its `hmtx` table.
 * A test reads the font and compares.
 */

/** Units of an em. */
const EM = 2048;
const FIRST = 32;

export const ADVANCES: readonly number[] = [
  [651, 821, 942, 1716, 1303, 1946, 1597, 563, 799, 799, 1024, 1716, 651, 739, 651, 690],
  [1303, 1303, 1303, 1303, 1303, 1303, 1303, 1303, 1303, 1303, 690, 690, 1716, 1716, 1716, 1087],
  [2048, 1401, 1405, 1430, 1577, 1294, 1178, 1587, 1540, 604, 604, 1343, 1141, 1767, 1532, 1612],
  [1235, 1612, 1423, 1300, 1251, 1499, 1401, 2025, 1403, 1251, 1403, 799, 690, 799, 1716, 1024],
  [1024, 1255, 1300, 1126, 1300, 1260, 721, 1300, 1298, 569, 569, 1186, 569, 1995, 1298, 1253],
  [1300, 1300, 842, 1067, 803, 1298, 1212, 1675, 1212, 1212, 1075, 1303, 690, 1303, 1716],
].flat();

/** Of any other character: digits, Greek and most of Latin are about as wide; wide scripts take an em. */
const OTHER = 1303;
/** The first block whose characters are as wide as high. */
const WIDE = 0x1100;
/** How much wider the bold face is, on average over ASCII. */
const BOLD = 1.11;

/** Width of a line of text in pixels. */
export function textWidth(text: string, fontSize: number, isBold = false): number {
  let units = 0;
  for (const character of text) {
    const code = character.codePointAt(0)!;
    units += ADVANCES[code - FIRST] ?? (code >= WIDE && code < 0x2000 || code >= 0x2e80 ? EM : OTHER);
  }
  return units / EM * fontSize * (isBold ? BOLD : 1);
}
