// The sampler of gemma_multi.sampling, in JavaScript: logits to one token.
//
// Randomness is a hash of (seed, position, token id), whole numbers up to the last step, so that one
// seed tells the same story here and in Python. What NumPy rounds to float32 is rounded here too.

const BITS = 23;
const MOST_NOISE = 16.7; // -log(-log((2**23 - 0.5) / 2**23)), rounded up
const STEP = 0x9e3779b9;
const COLDEST = 1e-5; // below it, dividing by the temperature overflows
const round = Math.fround;

// The next token of `logits`, a Float32Array. `seen` are the ids read so far, `position` the index
// that the token will have. Options: temperature, top_k, top_p, min_p, repetition_penalty, seed.
export function choose(logits, seen, options, position) {
  const {temperature, top_k, top_p, min_p, seed} = options;
  const best = highest(logits);
  if (!Number.isFinite(best)) throw new Error("the logits are not finite: the model is damaged");
  let scores = penalised(logits, seen, options.repetition_penalty);
  if (temperature < COLDEST) return scores.indexOf(highest(scores));
  const warmth = round(temperature);
  scores = temperature === 1 ? scores : scores.map((score) => score / warmth);
  if (top_k === 0 && top_p === 1 && min_p === 0) return drawOfAll(scores, seed, position);

  let ids = 0 < top_k && top_k < scores.length ? bestOf(scores, top_k) : [...scores.keys()];
  let total = round(logSumExp(ids, scores));
  let logs = new Map(ids.map((id) => [id, round(scores[id] - total)]));
  if (top_p < 1) {
    ids.sort((a, b) => logs.get(b) - logs.get(a) || a - b); // of equals, the lower id
    let sum = 0;
    ids = ids.filter((id, place) => {
      const probability = round(Math.exp(logs.get(id)));
      sum = round(sum + probability);
      return place === 0 || round(sum - probability) < round(top_p);
    });
  }
  if (min_p > 0) {
    const least = round(highest(ids.map((id) => logs.get(id))) + round(Math.log(round(min_p))));
    ids = ids.filter((id) => logs.get(id) >= least);
  }
  return draw(ids, (id) => logs.get(id), seed, position);
}

// Gumbel noise for token `id`, if it were to stand at `position`.
export function gumbel(seed, position, id) {
  const state = [seed >>> 0, Math.floor(seed / 2 ** 32) >>> 0].reduce(
    (hash, word) => scramble(hash ^ scramble(word + STEP)), id);
  const bits = scramble(state ^ scramble(position + STEP)) >>> (32 - BITS);
  return round(-Math.log(round(-Math.log((bits + 0.5) * 2 ** -BITS))));
}

// A bijection of 32-bit words that changes every output bit with every input bit.
function scramble(x) {
  x = Math.imul(x ^ (x >>> 16), 0x21f0aaad);
  x = Math.imul(x ^ (x >>> 15), 0x735a2d97);
  return (x ^ (x >>> 15)) >>> 0;
}

function draw(ids, score, seed, position) {
  let chosen = ids[0], most = -Infinity;
  for (const id of ids) {
    const sum = round(score(id) + gumbel(seed, position, id));
    if (sum > most) [chosen, most] = [id, sum];
  }
  return chosen;
}

// Below the best token's sum by more than noise can be, a token has lost, and needs none.
function drawOfAll(scores, seed, position) {
  const first = scores.indexOf(highest(scores));
  const bar = scores[first] + gumbel(seed, position, first) - MOST_NOISE;
  const possible = [...scores.keys()].filter((id) => scores[id] >= bar);
  return draw(possible, (id) => scores[id], seed, position);
}

function penalised(logits, seen, penalty) {
  if (penalty === 1) return logits;
  const scores = logits.slice();
  for (const id of new Set(seen)) scores[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
  return scores;
}

// The ids of the `count` best scores, and of any that tie with the last of them. The count-th best of
// the maxima of as many blocks is no more than the count-th best score.
function bestOf(scores, count) {
  const size = Math.max(1, Math.floor(scores.length / (4 * count)));
  const maxima = [];
  for (let at = 0; at < scores.length; at += size) maxima.push(highest(scores.subarray(at, at + size)));
  const bound = nth(maxima, count);
  const near = [];
  scores.forEach((score, id) => { if (score >= bound) near.push(id); });
  const least = nth(near.map((id) => scores[id]), count);
  return near.filter((id) => scores[id] >= least);
}

function nth(values, count) {
  return Float32Array.from(values).sort().at(-count);
}

function highest(values) {
  let most = -Infinity;
  for (const value of values) if (!(value <= most)) most = value; // NaN is kept
  return most;
}

function logSumExp(ids, scores) {
  const top = highest(ids.map((id) => scores[id]));
  return top + Math.log(ids.reduce((sum, id) => sum + round(Math.exp(round(scores[id] - top))), 0));
}
