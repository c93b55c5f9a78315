// How many heads two sets share, and how many chance alone would give.
// Two sets of K heads drawn at random from n share X heads, hypergeometric: P(X = s) = C(K, s) C(n - K, K - s) / C(n, K).

const logFactorials = [0];

function logFactorial(n) {
  for (let i = logFactorials.length; i <= n; i++) logFactorials.push(logFactorials[i - 1] + Math.log(i));
  return logFactorials[n];
}

function logChoose(n, k) {
  return k < 0 || k > n ? -Infinity : logFactorial(n) - logFactorial(k) - logFactorial(n - k);
}

function chanceOf(n, k, shared) {
  return Math.exp(logChoose(k, shared) + logChoose(n - k, k - shared) - logChoose(n, k));
}

// P(X >= shared).
function upperTail(n, k, shared) {
  if (shared <= Math.max(0, 2 * k - n)) return 1;
  let sum = 0;
  for (let s = k; s >= shared; s--) sum += chanceOf(n, k, s);
  return Math.min(1, sum);
}

// Smallest values whose probability from below reaches 2.5 % and 97.5 %.
function chanceBand(n, k) {
  let sum = 0;
  let low = null;
  for (let s = Math.max(0, 2 * k - n); s <= k; s++) {
    sum += chanceOf(n, k, s);
    if (low === null && sum >= 0.025) low = s;
    if (sum >= 0.975) return [low, s];
  }
  return [low === null ? k : low, k];
}

// ranks: for every head its place from 1, or 0 if it is not in the list. Shared heads for K = 1 .. kMax.
function overlapCurve(ranksA, ranksB, kMax) {
  const from = new Array(kMax + 1).fill(0);
  for (let i = 0; i < ranksA.length; i++) {
    const k = Math.max(ranksA[i], ranksB[i]);
    if (ranksA[i] && ranksB[i] && k <= kMax) from[k] += 1;
  }
  const shared = [];
  for (let k = 1, sum = 0; k <= kMax; k++) shared.push((sum += from[k]));
  return shared;
}
