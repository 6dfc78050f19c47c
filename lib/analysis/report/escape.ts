/** Text from strangers, such as names in checkpoints: never markup, and nothing in it is hidden. */

export const ENTITIES: Readonly<Record<string, string>> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  '"': "&quot;",
  "'": "&#39;",
};

/** Text for markup and attributes. Characters that turn the reading direction or hide are shown as codes. */
export function escapeHtml(text: string): string {
  return visible(text).replace(/[&<>"']/g, (character) => ENTITIES[character]!);
}

/** Control and direction characters as codes; line ends stay. */
export function visible(text: string): string {
  return text.toWellFormed().replace(
    /(?![\n\t])[\p{Cc}\p{Cf}\u2028\u2029]/gu,
    (character) => `\\u{${character.codePointAt(0)!.toString(16)}}`,
  );
}
