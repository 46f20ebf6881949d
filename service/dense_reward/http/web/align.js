// Which token of one response stands for which of another. Pure.

const MOST_EDITS = 300; // beyond it, what lies between the common start and the common end counts as different

/** For each id of `mine` the place of the same token in `theirs`, or -1. In order; by the shortest edit (Myers). */
export function alignment(mine, theirs) {
  const found = new Array(mine.length).fill(-1);
  const most = Math.min(mine.length, theirs.length);
  let start = 0;
  while (start < most && mine[start] === theirs[start]) found[start] = start++;
  let end = 0;
  while (end < most - start && mine.at(-1 - end) === theirs.at(-1 - end)) {
    end += 1;
    found[mine.length - end] = theirs.length - end;
  }
  const middle = shortest(mine.slice(start, mine.length - end), theirs.slice(start, theirs.length - end));
  for (const [one, other] of middle) found[start + one] = start + other;
  return found;
}

/** The pairs of equal places on a shortest path of edits; none if it has too many. */
function shortest(a, b) {
  const furthest = new Map([[1, 0]]); // diagonal -> the furthest place in `a` that is reached on it
  const trace = [];
  for (let edits = 0; edits <= Math.min(MOST_EDITS, a.length + b.length); edits++) {
    trace.push(new Map(furthest));
    for (let diagonal = -edits; diagonal <= edits; diagonal += 2) {
      let x = comesDown(furthest, diagonal, edits) ? furthest.get(diagonal + 1) : furthest.get(diagonal - 1) + 1;
      while (x < a.length && x - diagonal < b.length && a[x] === b[x - diagonal]) x += 1;
      furthest.set(diagonal, x);
      if (x >= a.length && x - diagonal >= b.length) return back(trace, a.length, b.length);
    }
  }
  return [];
}

const comesDown = (furthest, diagonal, edits) =>
  diagonal === -edits || (diagonal !== edits && furthest.get(diagonal - 1) < furthest.get(diagonal + 1));

function back(trace, x, y) {
  const pairs = [];
  for (let edits = trace.length - 1; edits >= 0; edits--) {
    const diagonal = x - y;
    const before = comesDown(trace[edits], diagonal, edits) ? diagonal + 1 : diagonal - 1;
    const startX = edits === 0 ? 0 : trace[edits].get(before);
    const startY = startX - (edits === 0 ? 0 : before);
    while (x > startX && y > startY) pairs.push([--x, --y]);
    [x, y] = [startX, startY];
  }
  return pairs;
}
