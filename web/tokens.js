// Captions to token ids: text.py's Vocabulary in JavaScript. A token is a string of bytes, each one
// a character from 0 to 255, as atob() gives it.

// What Python's str.strip() takes away.
const EDGES = /^[\p{White_Space}\x1c-\x1f]+|[\p{White_Space}\x1c-\x1f]+$/gu;

export class Vocabulary {
  // data: captions.tiktoken; pattern: cuts a caption into words
  constructor(data, pattern) {
    const lines = data.trim().split("\n").map((line) => line.split(" "));
    this.ranks = new Map(lines.map(([token, rank]) => [atob(token), Number(rank)]));
    this.words = new RegExp(pattern, "gu");
    this.end = this.ranks.size;
  }

  // The tokens of one caption, in lower case, with a blank before each word; <end> last.
  ids(caption) {
    const text = caption.toLowerCase().replace(EDGES, "");
    const words = text ? ` ${text}`.match(this.words) : [];
    return [...words.flatMap((word) => this.merge(word)), this.end];
  }

  // Byte-pair encoding of one word: the pair of lowest rank is joined, the leftmost first, until
  // no pair is a token.
  merge(word) {
    const parts = Array.from(new TextEncoder().encode(word), (b) => String.fromCharCode(b));
    while (parts.length > 1) {
      let best = Infinity, at = 0;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(parts[i] + parts[i + 1]) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (best === Infinity) break;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
    return parts.map((part) => this.ranks.get(part));
  }
}
