/** The name that was probably meant by a wrong one. */

/** Longest text that is compared. */
const MAX_WRONG_LENGTH = 512;

/** The known name nearest to a wrong one, if near: by spelling, or the same last step in another section. */
export function nearestName(wrong: string, known: readonly string[]): string | undefined {
  const plain = (name: string): string => name.toLowerCase().replace(/[^a-z0-9]/g, "");
  const lastStep = (name: string): string => plain(name.slice(name.lastIndexOf(".") + 1));
  if (wrong.length > MAX_WRONG_LENGTH) return undefined;
  let best: string | undefined;
  let bestDistance = Math.max(2, Math.floor(plain(wrong).length / 4)) + 1;
  for (const name of known) {
    const distance = Math.min(
      editDistance(plain(wrong), plain(name)),
      lastStep(wrong) === lastStep(name) ? 1 : Infinity,
    );
    if (distance < bestDistance) [best, bestDistance] = [name, distance];
  }
  return best;
}

/** Levenshtein distance. */
function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next.push(Math.min(row[j]! + 1, next[j - 1]! + 1, row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1)));
    }
    row = next;
  }
  return row[b.length]!;
}
